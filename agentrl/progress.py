"""How far a run, an evaluation or a command has come: what a display is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` in a phase of a step; after a step its metrics as well.

    Attributes:
        step: the number of optimizer steps taken.
        phase: what is going on, such as `rollout` or `train`.
        done, total: in the phase's own units; a total of 0 means that it is not known.
        metrics: of the step that has just ended, by name.
        notice: a line to keep on the screen, and nothing else; the phase goes on.
    """

    step: int
    phase: str
    done: int
    total: int
    metrics: dict[str, float] | None = None
    notice: str = ""


OnProgress = Callable[[Progress], None]
