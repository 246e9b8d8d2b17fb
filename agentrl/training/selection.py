"""Which groups of a step are trained on, and how many more questions to ask meanwhile."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

# So many times as many questions as groups are still missing are asked at once, and no more.
_MOST_AT_ONCE = 4
# The steps whose share of groups with a signal tells what to expect of the next.
_REMEMBERED_STEPS = 8


class Selection:
    """Picks the first `wanted` groups with a learning signal, in the order of their questions.

    Groups get done in any order, and those of short episodes first. Which are picked does not depend on that: a group
    counts once all groups of earlier questions are done.
    """

    def __init__(self, wanted: int, most: int, expected: float = 1.0) -> None:
        """At most `most` questions may be asked; `expected` is the share of groups that can be expected to have a signal."""
        self._wanted = wanted
        self._most = most
        self._expected = max(expected, 1 / _MOST_AT_ONCE)
        self._signal: dict[int, bool] = {}
        self.asked = 0

    @property
    def found(self) -> int:
        """How many of the wanted groups are found, wherever they stand."""
        return min(self._wanted, sum(self._signal.values()))

    @property
    def missing(self) -> int:
        """How many further questions to ask now, so that enough groups can be expected to have a signal."""
        under_way = self.asked - len(self._signal)
        expected = sum(self._signal.values()) + under_way * self._expected
        # Rounded, because 0.6 * 5 is a little more than 3.
        needed = math.ceil(round((self._wanted - expected) / self._expected, 6))
        return max(0, min(needed, self._most - self.asked))

    def ask(self, count: int) -> None:
        """Take note that `count` further questions were asked."""
        self.asked += count

    def add(self, index: int, has_signal: bool) -> None:
        """Take note of the group of the question that was asked as number `index`, counted from 0."""
        self._signal[index] = has_signal

    @property
    def done(self) -> list[bool] | None:
        """Of each group of the step whether it has a signal, in the order of their questions; None while that is open."""
        signal: list[bool] = []
        while sum(signal) < self._wanted and len(signal) < self._most:
            if len(signal) not in self._signal:
                return None
            signal.append(self._signal[len(signal)])
        return signal


class SignalShare:
    """The share of groups that had a learning signal in the last steps, from the steps' metrics."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED_STEPS)

    def observe(self, metrics: Mapping[str, float]) -> None:
        if "selection/sampled_groups" in metrics:
            self._steps.append((metrics["selection/sampled_groups"], metrics["selection/dropped_groups"]))

    @property
    def value(self) -> float:
        """From 0 to 1; 1 before the first step."""
        sampled = sum(step[0] for step in self._steps)
        return 1 - sum(step[1] for step in self._steps) / sampled if sampled else 1.0
