"""Search-R1 as it is, defects included, so that what they do to results can be measured. Use `search_tags` otherwise."""

from __future__ import annotations

import re
from collections.abc import Sequence

from agentrl.agent.protocols.tags import SearchTags
from agentrl.config import ConfigError
from agentrl.types import INVALID, SEARCH, Action, Turn
from retrievers.base import Hit

_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class SearchR1(SearchTags):
    """The protocol and the scorer of Search-R1 (arXiv 2503.09516), after its code at commit a14dc3a, in our own words.

    Its limits are settings: `prompt: chat`, `max_turns: 4` with `mistakes_are_turns: true`, `max_turn_tokens: 500`,
    `max_observation_tokens: 500`, `max_episode_tokens: 4096` and `retriever.k: 3`; its prompts have at most 2048 tokens. For
    its wording, set `instruction_file`; {question} stands there for the question.

    Reproduced, since it changes results:

    - The answer that counts is the last <answer> of everything that the model has read or written, if there are at least
      two: the first is taken for the prompt's own. An instruction with two examples in it, as Search-R1's, makes an
      episode without an answer count as having given the second.
    - Passages are shown as they are, so that an <answer> in one counts as the model's, and </information> closes it early.
    - An observation is cut at its limit wherever that falls, which can take </information> off.
    - An action is the first pair of tags anywhere, in a thought too; it may be empty.
    - A mistake is answered outside <information>, costs a turn, and never ends an episode before the last turn. The words
      between the tags that the correction names, " and ", are an answer to the scorer, in an episode that gives no other.
    - A search in the last turn is not executed. It stands in the turn's action, where Search-R1's statistics count it;
      `Trajectory.searches` and the strata still count what was executed.

    Not reproduced, since an episode's ids only grow and each sampled one keeps its log-probability:

    - Sampling 500 tokens, cutting the text at the tag and encoding it anew. Here the tag stops the turn; a turn whose
      </answer> comes before its </search> therefore ends at the former, and the end token is trained where it is sampled.
    - Dropping the start of the context, with the question, beyond 4096 tokens. Here the episode ends as truncated.
    - Control tokens in passages. Here they are neutralised.
    - What is no part of a protocol: groups by row index, mini-batches that ignore rollouts per prompt, top_p 0.95 against
      the full softmax, and its validation and its server.
    """

    def _set_up(self) -> None:
        """Raises ConfigError where no answer could ever count, or for a tool that Search-R1 does not have."""
        super()._set_up()
        if list(self.tools) != [SEARCH]:
            raise ConfigError("agent.tools: protocol search_r1 has only `search`")
        if not _ANSWER.search(self.ask("")):
            raise ConfigError(
                "agent.instruction: protocol search_r1 takes the first <answer>…</answer> for one in the instruction, so "
                "there must be one; leave `instruction` out for our wording"
            )

    def parse(self, text: str) -> Action:
        match = _ACTION.search(text)
        if match is None:
            return Action(INVALID, "no <search> or <answer> was closed")
        return Action(match.group(1), match.group(2).strip())

    def observation(self, result: str | Sequence[Hit], limit: int, ended: bool = False) -> str:
        if isinstance(result, str):
            lines = self.codec.neutralise(result)
        else:
            # Search-R1 takes the title as it stands in the index, in its quotes.
            heads = [self.codec.neutralise(hit.contents).partition("\n") for hit in result]
            lines = "".join(
                f"Doc {rank}(Title: {title}) {text}\n" for rank, (title, _, text) in enumerate(heads, start=1)
            )
        return self.codec.cut(f"\n\n<information>{lines.strip()}</information>\n\n", limit, at_word=False)

    def correction(self, problem: str, ended: bool = False) -> str:
        return (
            "\nThat was not a valid action. A query has to stand between <search> and </search>, the final answer between "
            "<answer> and </answer>. Try again.\n"
        )

    def answer(self, prompt: str, turns: Sequence[Turn]) -> str | None:
        whole = prompt + "".join(turn.text + turn.observation for turn in turns)
        found = _ANSWER.findall(whole)
        return found[-1].strip() if len(found) > 1 else None
