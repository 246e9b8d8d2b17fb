"""Protocols: how the model is asked, where a turn stops, what an action is and how an observation is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol as TypingProtocol

from agentrl.agent.codec import Codec
from agentrl.types import Action, ActionKind
from retrievers.base import Hit

# The head of a hit alone takes about this many tokens.
_LEAST_HIT = 8


class Protocol(TypingProtocol):
    stop: tuple[str, ...]

    def instruction(self) -> str:
        """What the model is told about the protocol, ending where the question follows."""
        ...

    def worked_examples(self, count: int) -> str:
        """Up to two complete episodes, for a model that has never seen the protocol."""
        ...

    def parse(self, text: str) -> Action:
        """Read the action from the model's text of one turn. Never raises: what cannot be read is INVALID."""
        ...

    def observation(self, hits: Sequence[Hit], codec: Codec, limit: int) -> str:
        """Write hits as at most `limit` tokens, complete with the closing tag."""
        ...

    def correction(self, problem: str) -> str:
        """Tell the model what was wrong with its last turn."""
        ...


class SearchTags:
    """Search-R1's tags (arXiv 2503.09516): think, search, information and answer, in our own words.

    A turn is one search or one answer, closed by its tag; free text or a think block may stand before it.
    """

    stop = ("</search>", "</answer>")

    _TAG = re.compile(r"<\s*(/?)\s*(think|search|information|answer)\s*>", re.IGNORECASE)
    _ACTION = re.compile(r"<(search|answer)>(.*)</\1>\s*", re.DOTALL)

    def instruction(self) -> str:
        return (
            "Answer the question at the end. You can look things up in an encyclopedia. First reason briefly inside "
            "<think> and </think>. To look something up, write <search> what you want to find </search>; passages come "
            "back between <information> and </information>. You may search several times. When you know the answer, "
            "write it, as short as possible and without explanation, as <answer> the answer </answer>.\n\n"
        )

    def worked_examples(self, count: int) -> str:
        return "".join(_WORKED_EXAMPLES[:count])

    def parse(self, text: str) -> Action:
        tags = [(match.group(0), match.group(1), match.group(2).lower()) for match in self._TAG.finditer(text)]
        if any(name == "information" for _, _, name in tags):
            return Action(ActionKind.INVALID, "only the search engine writes <information>")
        actions = [(whole, name) for whole, _, name in tags if name in ("search", "answer")]
        if not actions:
            return Action(ActionKind.INVALID, "no <search> or <answer> was closed")
        if len(actions) > 2:
            return Action(ActionKind.INVALID, "more than one action in a turn")
        match = self._ACTION.fullmatch(text, pos=text.find(actions[0][0]))
        if match is None:
            return Action(ActionKind.INVALID, "the tags of the action do not match")
        argument = " ".join(match.group(2).split())
        if not argument:
            return Action(ActionKind.INVALID, f"the {match.group(1)} is empty")
        return Action(ActionKind(match.group(1)), argument)

    def observation(self, hits: Sequence[Hit], codec: Codec, limit: int) -> str:
        titles = [self.neutralise(hit.title) for hit in hits]
        texts = [self.neutralise(" ".join(hit.text.split())) for hit in hits]
        # The last hits are left out when there is no room for the heads of all.
        for count in range(min(len(hits), limit // _LEAST_HIT), 0, -1):
            # A title is bounded too: in a corpus without titles a whole paragraph stands in its place.
            heads = [
                f"Doc {rank}(Title: {codec.cut(title, limit // (count + 3))})"
                for rank, title in enumerate(titles[:count], start=1)
            ]
            frame = len(codec.encode(self._information(heads, [""] * count)))
            # Encoding the parts together can take a few tokens more than apart, so the share shrinks until the whole fits.
            for share in range((limit - frame) // count, -1, -1):
                observation = self._information(heads, [codec.cut(text, share) for text in texts[:count]])
                if len(codec.encode(observation)) <= limit:
                    return observation
        return "\n<information>\nNothing was found.\n</information>\n"

    @staticmethod
    def _information(heads: Sequence[str], texts: Sequence[str]) -> str:
        lines = "\n".join(f"{head} {text}".rstrip() for head, text in zip(heads, texts, strict=True))
        return f"\n<information>\n{lines}\n</information>\n"

    def correction(self, problem: str) -> str:
        return (
            f"\n<information>\nInvalid action: {problem}. Write one <search> query </search> or one "
            "<answer> answer </answer>.\n</information>\n"
        )

    @classmethod
    def neutralise(cls, text: str) -> str:
        """Rewrite the protocol's tags in foreign text, <answer> as [answer], so that no passage can act for the model."""
        return cls._TAG.sub(lambda match: f"[{match.group(1)}{match.group(2)}]", text)


_WORKED_EXAMPLES = (
    "Question: In which country is the city where the river Elbe meets the sea?\n"
    "<think> I need to know where the Elbe meets the sea. </think>\n"
    "<search> mouth of the river Elbe </search>\n"
    "<information>\nDoc 1(Title: Elbe) The Elbe flows into the North Sea at Cuxhaven.\n</information>\n"
    "<think> Now I need the country of Cuxhaven. </think>\n"
    "<search> Cuxhaven </search>\n"
    "<information>\nDoc 1(Title: Cuxhaven) Cuxhaven is a town in Lower Saxony, Germany.\n</information>\n"
    "<think> Cuxhaven is in Germany. </think>\n"
    "<answer> Germany </answer>\n\n",
    "Question: Who painted The Night Watch?\n"
    "<think> I should look this up. </think>\n"
    "<search> The Night Watch painting </search>\n"
    "<information>\nDoc 1(Title: The Night Watch) The Night Watch is a painting of 1642 by Rembrandt.\n</information>\n"
    "<think> The passage names the painter. </think>\n"
    "<answer> Rembrandt </answer>\n\n",
)

PROTOCOLS: dict[str, type[Protocol]] = {"search_tags": SearchTags}
