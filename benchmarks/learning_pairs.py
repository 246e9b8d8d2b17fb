"""Whether two variants differ: the same questions after training with the same seeds, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from agentrl.config import ConfigError

RESAMPLES = 10_000


def compare_pairs(records: Sequence[Mapping[str, Any]], reference: str) -> dict[str, dict[str, float]]:
    """Compare each variant with `reference` over the questions and seeds that both have a score for.

    `difference` is of exact match. `low` and `high` bound it with 95 % confidence for other seeds and other questions:
    percentiles of a bootstrap that resamples seeds and questions independently (Owen 2007, "The pigeonhole bootstrap").
    `gained` counts pairs of seed and question that only the variant has right, `lost` those that only the reference has. `p` is
    of McNemar's exact test on these two; it takes pairs as independent and so speaks of these runs alone. `p_holm` is `p` after
    Holm's correction for the number of variants compared here.

    Variants without such questions are left out.

    Raises:
        ConfigError: if runs were scored on different numbers of questions.
    """
    right = {(record["variant"], record["seed"]): record["right"] for record in records if record.get("right")}
    if len(counts := {len(outcomes) for outcomes in right.values()}) > 1:
        raise ConfigError(
            f"runs were scored on {' and '.join(map(str, sorted(counts)))} questions; they cannot be paired"
        )
    found: dict[str, dict[str, float]] = {}
    for variant in dict.fromkeys(record["variant"] for record in records):
        seeds = [seed for name, seed in right if name == variant and (reference, seed) in right]
        if variant == reference or not seeds:
            continue
        differences = np.array([_differences(right[variant, seed], right[reference, seed]) for seed in seeds])
        if not np.isnan(differences).all():
            found[variant] = {"seeds": len(seeds), **_compare(differences)}
    for variant, p in zip(found, holm([one["p"] for one in found.values()]), strict=True):
        found[variant]["p_holm"] = p
    return found


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's step-down correction (Holm 1979), in their order."""
    corrected, least = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values)):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = least
    return corrected


def _differences(one: str, other: str) -> list[float]:
    """Return 1 for each question that only `one` has right, -1 that only `other` has, else 0; NaN where one has no score."""
    if len(one) != len(other):
        raise ConfigError(
            f"runs of one seed were scored on {len(one)} and {len(other)} questions; they cannot be paired"
        )
    return [np.nan if "-" in (a, b) else int(a) - int(b) for a, b in zip(one, other, strict=True)]


def _compare(differences: NDArray[np.floating]) -> dict[str, float]:
    """Compare by `differences` [seeds, questions]."""
    gained, lost = int((differences == 1).sum()), int((differences == -1).sum())
    seeds, questions = differences.shape
    rng = np.random.default_rng(0)
    # How often each is drawn; a pair counts as often as its seed times as its question.
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES).astype(float)
    of_questions = rng.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES).astype(float)
    scored = ~np.isnan(differences)
    total = ((of_seeds @ np.where(scored, differences, 0.0)) * of_questions).sum(1)
    count = ((of_seeds @ scored.astype(float)) * of_questions).sum(1)
    low, high = np.percentile(total[count > 0] / count[count > 0], [2.5, 97.5])
    return {
        "pairs": int(scored.sum()),
        "difference": float(np.nanmean(differences)),
        "low": float(low),
        "high": float(high),
        "gained": gained,
        "lost": lost,
        "p": float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }
