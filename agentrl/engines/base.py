"""The contract between an episode and what samples its tokens: ids in, ids and log-probabilities out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

NOT_FINITE = "the model's logits are not finite: its weights, or those of its adapter, hold infinity or no numbers"
"""The message of an engine whose model computes no distribution."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one turn. `temperature` 0 is greedy. `stop` strings end the turn and stay part of it.

    There is no top_p, top_k or min_p: they would sample from another distribution than the one that is trained.
    """

    max_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What was sampled. `logprobs` are natural logarithms at the sampling temperature, one for each id.

    `finish` is "stop" after a stop string or the end token, which is the last of the ids, and "length" when `max_tokens`
    ran out. `adapter_version` names the weights that produced every one of these ids.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]
    adapter_version: int


class Engine(Protocol):
    trainable: ClassVar[bool]
    """Whether ids and log-probabilities are exactly those that were sampled, which training needs."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Continue `prompt_ids`. Any number of calls may be under way at once; one that is cancelled frees its place.

        With a seed the ids depend on nothing but prompt, sampling and weights, up to the rounding of batches of another
        size. At temperature 0 the log-probabilities are those at temperature 1.

        Raises:
            EnvironmentFailure: if the engine could not answer, or the model's logits are not finite.
        """
        ...

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        """Use the PEFT adapter with these files (by name) for every generation that starts from now on.

        Raises:
            EnvironmentFailure: if the adapter cannot be loaded.
        """
        ...

    async def load_weights(self, version: int, folder: str) -> None:
        """Use the model in this folder, of the same architecture and without an adapter, from now on.

        Raises:
            EnvironmentFailure: if it cannot be loaded.
        """
        ...

    async def sleep(self) -> None:
        """Wait for the generations under way, then give back as much of a GPU's memory as can be had again by `wake`.

        Until then nothing may be generated or loaded. An engine on a CPU, or on another machine, has no such memory and does
        nothing. Nor does one that sleeps already.

        Raises:
            EnvironmentFailure: if it cannot.
        """
        ...

    async def wake(self) -> None:
        """Be as before `sleep`. An engine that is awake stays as it is.

        Raises:
            EnvironmentFailure: if it cannot, for instance because somebody else has the memory.
        """
        ...

    async def close(self) -> None:
        """End the engine. Generations that have not ended by then, and later ones, raise EnvironmentFailure."""
        ...
