"""Whether a run collapses, judged by the metrics of its steps, and how much signal it can expect.

A rule compares the mean of a metric over the last `window` steps with what it was before. Windows overlap with none that
they are compared with, so that nothing is said before `2 * window` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from agentrl.advantages import by_stratum
from agentrl.config import WatchConfig
from agentrl.types import AgentRLError

# A fall must be larger than what steps of one policy differ by: so many standard errors of the difference of two windows.
_ERRORS = 5.0
# A policy that is right as often as this has good reasons for little entropy and for groups whose rewards do not vary.
_RIGHT, _LEARNED = "correct/share", 0.9
# What is left of a metric's first window, or of its best, when it has collapsed.
_ENTROPY_LEFT, _SEARCHES_LEFT = 0.05, 0.1
_ENTROPY_GROWN, _ENTROPY_NATS = 3.0, 1.0
_LOGPROB_NATS = 0.5
_ONE_STRATUM, _SEVERAL_STRATA = 0.98, 0.9


class CollapseError(AgentRLError):
    """The policy collapsed, and `training.watch.on_collapse` ends the run for that."""


class RollBack(AgentRLError):
    """The policy collapsed, and the run goes on from an older checkpoint.

    Attributes:
        reason: what the metrics show.
        step: after which step that was.
        target: the number of steps to keep.
    """

    def __init__(self, reason: str, step: int, target: int) -> None:
        super().__init__(reason, step, target)
        self.reason, self.step, self.target = reason, step, target

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason}; the run goes back to step {self.target}"


class Watch:
    """Looks at one step after another and says, once, what has collapsed."""

    def __init__(self, settings: WatchConfig, history: Iterable[Mapping[str, Any]] = ()) -> None:
        """`history` are the metrics of the steps that were taken before, of which nothing is said any more."""
        self._settings = settings
        self._lines = list(history)
        self._known = set(self._found())

    def see(self, metrics: Mapping[str, Any]) -> list[str]:
        """Take in the metrics of a step; return a sentence for each kind of collapse that shows with it, and did not before.

        A metric that is missing or null is not judged.
        """
        self._lines.append(metrics)
        found = self._found()
        new = [reason for name, reason in found.items() if name not in self._known]
        self._known = set(found)
        return new

    def _found(self) -> dict[str, str]:
        view = _View(self._lines, self._settings)
        return {name: reason for name, rule in _RULES.items() if (reason := rule(view)) is not None}


class _View:
    """The steps of a run so far, as means over windows of them."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], settings: WatchConfig) -> None:
        self.lines, self.settings = lines, settings
        self.steps = f"over the last {settings.window} steps"

    def windows(self, read: str | Callable[[Mapping[str, Any]], float | None]) -> _Windows | None:
        """Return the windows of a metric, given by its name or by what reads it from a step.

        None before two windows are full, or if the newest steps lack it. Earlier steps without it are left out.
        """
        if isinstance(read, str):
            name = read
            read = lambda line: line.get(name)  # noqa: E731, a reader like those that are given
        values = [read(line) for line in self.lines]
        found = [float(value) for value in values if value is not None]
        window = self.settings.window
        if None in values[-window:] or len(found) < 2 * window:
            return None
        return _Windows(sliding_window_view(np.asarray(found), window))

    def has_learned(self) -> bool:
        right = self.windows(_RIGHT)
        return right is not None and right.now >= _LEARNED

    def fell(self, name: str, left: float) -> tuple[float, float] | None:
        """Return the peak of a metric and its present mean if that is below `left` of the peak, and not by chance."""
        found = self.windows(name)
        if found is None or found.now >= left * found.peak or found.peak - found.now <= _ERRORS * found.noise:
            return None
        return found.peak, found.now


class _Windows:
    """A metric over windows [n, window] of the steps of a run, each a step after the one before."""

    def __init__(self, values: np.ndarray) -> None:
        window, means = values.shape[1], values.mean(1)
        self.first, self.now = float(means[0]), float(means[-1])
        # The largest mean of a window that ended before the last one began.
        self.peak = float(means[:-window].max())
        # The standard error of the difference of two means, from how steps differ within windows.
        self.noise = math.sqrt(2 * float(values.var(1, ddof=1).mean()) / window)


def _earned(metrics: Mapping[str, Any]) -> float | None:
    """Return the mean reward before penalties, which is at least 0."""
    mean = metrics.get("reward/mean")
    return None if mean is None else mean + metrics.get("reward/penalty", 0.0)


def _reward(view: _View) -> str | None:
    if (fall := view.fell(_earned, 1 - view.settings.fall)) is None:
        return None
    return f"the mean reward fell from {fall[0]:.3f} to {fall[1]:.3f} {view.steps}"


def _answers(view: _View) -> str | None:
    if (fall := view.fell("ends/answered", 1 - view.settings.fall)) is None:
        return None
    return f"the share of episodes that end with an answer fell from {fall[0]:.0%} to {fall[1]:.0%} {view.steps}"


def _searches(view: _View) -> str | None:
    if (fall := view.fell("searches/mean", _SEARCHES_LEFT)) is None:
        return None
    return f"the policy stopped searching: {fall[1]:.2f} searches an episode {view.steps}, after {fall[0]:.2f}"


def _strata(view: _View) -> str | None:
    found = view.windows(lambda line: max(_shares(line).values(), default=None))
    if found is None or found.first >= _SEVERAL_STRATA or found.now < _ONE_STRATUM:
        return None
    shares = _shares(view.lines[-1])
    return (
        f"{found.now:.0%} of the episodes are in one stratum ({max(shares, key=shares.__getitem__)}) {view.steps}, after "
        f"{found.first:.0%} in the largest at the start, so that there is nothing left to compare within strata"
    )


def _shares(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: values["share"] for name, values in by_stratum(metrics).items() if values.get("share") is not None}


def _entropy_gone(view: _View) -> str | None:
    found = view.windows("entropy")
    if found is None or view.has_learned() or found.now >= _ENTROPY_LEFT * found.first:
        return None
    return f"entropy fell from {found.first:.3g} to {found.now:.3g} nats a token {view.steps}"


def _entropy_grown(view: _View) -> str | None:
    found = view.windows("entropy")
    if found is None or found.now <= max(_ENTROPY_GROWN * found.first, found.first + _ENTROPY_NATS):
        return None
    return f"entropy grew from {found.first:.3g} to {found.now:.3g} nats a token {view.steps}"


def _kl(view: _View) -> str | None:
    found, most = view.windows("kl"), view.settings.max_kl
    if found is None or found.now <= most:
        return None
    return (
        f"the KL divergence from the model that training began with is {found.now:.3g} nats a token {view.steps}, and "
        f"training.watch.max_kl is {most:g}"
    )


def _signal(view: _View) -> str | None:
    found, right = view.windows("advantages/no_signal_share"), view.windows(_RIGHT)
    if found is None or right is None or right.now >= _LEARNED or found.now < view.settings.max_no_signal:
        return None
    return (
        f"{found.now:.0%} of the groups had no learning signal {view.steps}, with {right.now:.0%} of the answers right"
    )


def _correct(view: _View) -> str | None:
    found = view.windows("logprobs/correct_mean")
    if found is None or found.peak - found.now <= max(_LOGPROB_NATS, _ERRORS * found.noise):
        return None
    return f"the log-probability of correct episodes fell from {found.peak:.3f} to {found.now:.3f} nats a token {view.steps}"


def _repetition(view: _View) -> str | None:
    found = view.windows("repetition")
    # Some protocols make a policy repeat itself from the start.
    if found is None or found.now <= max(view.settings.max_repetition, (1 + found.first) / 2):
        return None
    return (
        f"{found.now:.0%} of what the model wrote repeats what it wrote before in the same episode {view.steps}, after "
        f"{found.first:.0%} at the start"
    )


_RULES: Mapping[str, Callable[[_View], str | None]] = {
    "reward": _reward,
    "answers": _answers,
    "searches": _searches,
    "strata": _strata,
    "entropy gone": _entropy_gone,
    "entropy grown": _entropy_grown,
    "kl": _kl,
    "signal": _signal,
    "correct": _correct,
    "repetition": _repetition,
}


def no_signal_share(accuracy: float, group_size: int) -> float:
    """Return the expected share of groups whose rewards are all the same: p^G + (1 - p)^G.

    That holds of rewards 0 and 1 where every question is answered with one probability p, `accuracy`, in G independent
    episodes. Where p differs between questions the share is larger, because this is convex in p.
    """
    return accuracy**group_size + (1 - accuracy) ** group_size


def forecast(accuracy: float, group_size: int, source: str) -> str:
    """Return a line on how many groups will teach nothing, with what to do about it if that is more than half of them.

    Args:
        accuracy: the share of right answers, from 0 to 1.
        source: what measured it.
    """
    share = no_signal_share(accuracy, group_size)
    line = (
        f"forecast: at {source} {accuracy:.3f}, about {share:.0%} of the groups of {group_size} will have no learning signal "
        "(rewards 0 or 1, one accuracy for all questions; more where questions differ)"
    )
    if share <= 0.5:
        return line
    advice = ["set advantages.selection.enabled=true"]
    if 0 < accuracy < 1:
        larger = f"{no_signal_share(accuracy, 2 * group_size):.0%} with {2 * group_size}"
        advice.insert(0, f"raise rollout.group_size ({larger})")
    advice.append("take harder questions" if accuracy > 0.5 else "begin with easier questions or a trained adapter")
    return f"{line}: {', '.join(advice[:-1])}, or {advice[-1]}"
