"""The contract between an episode and what samples its tokens: ids in, ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one turn. `temperature` 0 is greedy. `stop` strings end the turn and stay part of it."""

    max_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What was sampled. `logprobs` are natural logarithms at the sampling temperature, one for each id.

    `finish` is "stop" after a stop string or the end token, "length" when `max_tokens` ran out. `adapter_version` names
    the weights that produced every one of these ids.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]
    adapter_version: int


class Engine(Protocol):
    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Continue `prompt_ids`. Any number of calls may be under way at once.

        Raises:
            EnvironmentFailure: if the engine could not answer.
        """
        ...

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        """Use the PEFT adapter with these files (by name) for every generation that starts from now on.

        Raises:
            EnvironmentFailure: if the adapter cannot be loaded.
        """
        ...
