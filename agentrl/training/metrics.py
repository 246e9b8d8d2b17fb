"""The metrics that describe the episodes of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from agentrl.advantages import by_stratum, label
from agentrl.advantages.episodes import length
from agentrl.advantages.schedule import StratumRewards
from agentrl.config import RewardConfig
from agentrl.rewards import exact_match, penalty
from agentrl.types import SEARCH, Trajectory, count_failures

# Four tokens rarely repeat by chance, and a loop of a few words shows.
_GRAM = 4

NOTES = "estimator/"
"""What stands before the names of an estimator's notes among the metrics of a step."""


def batch_metrics(
    trajectories: Sequence[Trajectory],
    strata: Sequence[Hashable],
    group_numbers: Sequence[int],
    reward_settings: Sequence[RewardConfig] = (),
) -> dict[str, float]:
    """Describe N episodes by their `strata` [N] and the numbers of their groups [N].

    Rewards, searches and strata are those of valid episodes; ends, failures and tokens those of all. `logprobs/mean` is the
    sampler's mean log-probability of the model's tokens, `logprobs/correct_mean` that in episodes whose answer is an accepted
    one, and `correct/share` the share of these.
    `repetition` is the share of the model's n-grams that repeat one of the same episode. `overlong/share` is that of
    episodes whose turns, tokens or time ran out. `rewards/NAME` is the mean of what the reward of that name came to before
    its weight, over the episodes that have it, and `reward/penalty` the mean of what rewards below 0 took off.
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
    calls = [call for trajectory, _ in valid for call in trajectory.calls]
    for tool, number in sorted(Counter(call.tool for call in calls if call.tool != SEARCH).items()):
        metrics[f"calls/{tool}"] = number / len(valid)
    if calls:
        metrics["refused/share"] = sum(bool(call.error) for call in calls) / len(calls)
    metrics |= {f"ends/{end}": number / count for end, number in sorted(ends.items())}
    metrics |= {f"failures/{cause}": float(number) for cause, number in count_failures(trajectories).items()}
    metrics["reward/penalty"] = float(np.mean([penalty(t, reward_settings) for t, _ in valid]))
    for name in sorted({name for t, _ in valid for name in t.reward_parts}):
        metrics[f"rewards/{name}"] = float(np.mean([t.reward_parts[name] for t, _ in valid if name in t.reward_parts]))
    correct = [t for t, _ in valid if exact_match(t) == 1.0]
    metrics["correct/share"] = len(correct) / len(valid)
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


def stratum_rewards(metrics: Mapping[str, float]) -> dict[str, StratumRewards]:
    """Read the rewards by stratum out of a step's metrics."""
    return {
        stratum: StratumRewards(values["rollouts"], values["reward"], values["reward_variance"])
        for stratum, values in by_stratum(metrics).items()
    }


def estimator_notes(metrics: Mapping[str, float]) -> dict[str, float]:
    """Read what the estimator noted of a step out of the step's metrics."""
    return {name.removeprefix(NOTES): value for name, value in metrics.items() if name.startswith(NOTES)}


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
