"""The metrics that describe the episodes of a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from agentrl.advantages import by_stratum, label
from agentrl.advantages.episodes import length
from agentrl.advantages.schedule import StratumRewards
from agentrl.config import LengthConfig
from agentrl.rewards import length_penalty
from agentrl.types import Trajectory, count_failures

# Four tokens rarely repeat by chance, and a loop of a few words shows.
_GRAM = 4


def batch_metrics(
    trajectories: Sequence[Trajectory],
    strata: Sequence[Hashable],
    group_numbers: Sequence[int],
    length_settings: LengthConfig | None = None,
) -> dict[str, float]:
    """Describe N episodes by their `strata` [N] and the numbers of their groups [N].

    Rewards, searches and strata are those of valid episodes; ends, failures and tokens those of all. `logprobs/mean` is the
    sampler's mean log-probability of the model's tokens, `logprobs/correct_mean` that in episodes whose answer earned 1.
    `repetition` is the share of the model's n-grams that repeat one of the same episode. `overlong/share` is that of
    episodes whose turns, tokens or time ran out, and `reward/length_penalty` the mean of what `length_settings` took off.
    """
    count = len(trajectories)
    valid = [(t, s) for t, s in zip(trajectories, strata, strict=True) if t.valid]
    ends = Counter(trajectory.end.value for trajectory in trajectories)
    own = sum(trajectory.model_tokens for trajectory in trajectories)
    metrics = {
        "episodes": float(count),
        "reward/mean": float(np.mean([t.reward for t, _ in valid])),
        "overlong/share": sum(trajectory.overlong for trajectory in trajectories) / count,
        "searches/mean": float(np.mean([len(t.searches) for t, _ in valid])),
        "tokens/model": float(own),
        "tokens/environment": float(sum(t.environment_tokens for t in trajectories)),
        "tokens/prompt": float(sum(len(t.prompt_ids) for t in trajectories)),
        "logprobs/mean": sum(map(_sampled_logprob, trajectories)) / max(1, own),
        "repetition": _repetition(trajectories),
        "seconds/search": sum(call.seconds for t in trajectories for call in t.searches)
        / max(1, sum(len(t.searches) for t in trajectories)),
    }
    metrics |= {f"ends/{end}": number / count for end, number in sorted(ends.items())}
    metrics |= {f"failures/{cause}": float(number) for cause, number in count_failures(trajectories).items()}
    penalties = [0.0 if length_settings is None else length_penalty(t, length_settings) for t, _ in valid]
    if length_settings is not None:
        metrics["reward/length_penalty"] = float(np.mean(penalties))
    correct = [t for (t, _), taken_off in zip(valid, penalties, strict=True) if math.isclose(t.reward + taken_off, 1.0)]
    if correct:
        metrics["logprobs/correct_mean"] = sum(map(_sampled_logprob, correct)) / sum(map(length, correct))
    for key in sorted({s for _, s in valid}, key=str):
        rewards = [t.reward for t, s in valid if s == key]
        metrics[f"strata/{label(key)}/rollouts"] = float(len(rewards))
        metrics[f"strata/{label(key)}/share"] = len(rewards) / len(valid)
        metrics[f"strata/{label(key)}/reward"] = float(np.mean(rewards))
        metrics[f"strata/{label(key)}/reward_variance"] = float(np.var(rewards))
    groups: dict[int, list[tuple[float | None, Hashable]]] = {}
    for trajectory, key, number in zip(trajectories, strata, group_numbers, strict=True):
        if trajectory.valid:
            groups.setdefault(number, []).append((trajectory.reward, key))
    metrics["groups/reward_varies"] = float(np.mean([len({r for r, _ in g}) > 1 for g in groups.values()]))
    metrics["groups/several_strata"] = float(np.mean([len({s for _, s in g}) > 1 for g in groups.values()]))
    return metrics


def advantage_variance(
    advantages: NDArray[np.floating], strata: Sequence[Hashable], group_numbers: Sequence[int], valid: Sequence[bool]
) -> dict[str, float]:
    """Split the variance of advantages [N] or [N, turns] within groups into that between their strata and that within them.

    An episode's advantage is the sum over its turns. Between: the mean of (A_k - A)^2 over the valid episodes, with A_k the mean
    of the episode's stratum in its group and A that of its group; within: the mean of (A_i - A_k)^2.
    """
    whole = advantages.sum(axis=1) if advantages.ndim == 2 else advantages
    groups: dict[int, dict[Hashable, list[float]]] = {}
    for value, key, number, counts in zip(whole, strata, group_numbers, valid, strict=True):
        if counts:
            groups.setdefault(number, {}).setdefault(key, []).append(float(value))
    between = within = 0.0
    for by_key in groups.values():
        mean = np.mean([value for values in by_key.values() for value in values])
        between += sum(len(values) * float(np.mean(values) - mean) ** 2 for values in by_key.values())
        within += sum(len(values) * float(np.var(values)) for values in by_key.values())
    count = max(1, sum(valid))
    return {"advantages/variance_between_strata": between / count, "advantages/variance_within_strata": within / count}


def stratum_rewards(metrics: Mapping[str, float]) -> dict[str, StratumRewards]:
    """Read the rewards by stratum out of a step's metrics."""
    return {
        stratum: StratumRewards(values["rollouts"], values["reward"], values["reward_variance"])
        for stratum, values in by_stratum(metrics).items()
    }


def _repetition(trajectories: Iterable[Trajectory]) -> float:
    """Return the share of the n-grams of tokens, none across turns, that came before in their episode."""
    total = distinct = 0
    for trajectory in trajectories:
        grams = [
            gram for turn in trajectory.turns for gram in zip(*(turn.token_ids[i:] for i in range(_GRAM)), strict=False)
        ]
        total += len(grams)
        distinct += len(set(grams))
    return 1 - distinct / total if total else 0.0


def _sampled_logprob(trajectory: Trajectory) -> float:
    return sum(sum(turn.logprobs) for turn in trajectory.turns)
