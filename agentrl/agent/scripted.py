"""Episodes that follow a script instead of a model, through the real protocol and the real retriever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentrl.agent.codec import Codec
from agentrl.agent.episode import Agent
from agentrl.config import AgentConfig
from agentrl.engines.base import Generation, Sampling
from agentrl.types import EnvironmentFailure, FailureCause, Question, Trajectory
from retrievers.base import Retriever


@dataclass(frozen=True, slots=True)
class ScriptPlayer:
    """Plays scripts with one retriever, which fetches `k` passages a search."""

    config: AgentConfig
    codec: Codec
    retriever: Retriever
    k: int

    async def play(self, question: Question, turns: Sequence[str]) -> Trajectory:
        """Play an episode in which the model says `turns`, one after another, and nothing once they are over.

        Raises:
            EnvironmentFailure: if retriever or protocol raise what they do not document.
        """
        agent = Agent(self.config, self.codec, _Script(turns, self.codec), self.retriever, self.k)
        played = await agent.run(question, f"script/{question.id}", temperature=1.0, seed=0, timeout=120.0)
        if played.cause is FailureCause.CODE:
            # A fault of the code would fail one question after the other.
            raise EnvironmentFailure(f"the script of question {question.id} failed: {played.failure}")
        return played


class _Script:
    """An engine that says the turns of a script, one after another, with probability 1."""

    def __init__(self, turns: Sequence[str], codec: Codec) -> None:
        self._turns = iter(turns)
        self._codec = codec

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        ids = tuple(self._codec.encode(next(self._turns, "")))[: sampling.max_tokens]
        return Generation(ids, (0.0,) * len(ids), "stop", 0)

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        raise NotImplementedError("a script has no weights")
