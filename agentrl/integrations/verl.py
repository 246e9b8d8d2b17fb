"""agentrl's advantages in verl: importing this module registers them with verl, as `agentrl_stratified` and so on.

verl imports it by itself where agentrl is installed (entry point `verl.plugins`). It is written for verl 0.9, whose
trainers hand an advantage estimator the rewards and the response mask of each token, the id of each row's prompt and the
section `algorithm` of the config. So rows are sorted into strata by their response masks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from verl.trainer.ppo.core_algos import register_adv_est

from agentrl.advantages import AdvantageError, compute
from agentrl.integrations import ESTIMATORS_OF_ROLLOUTS
from agentrl.registry import look_up

SECTION = "agentrl"
"""The key below `algorithm` that holds the options."""


def observations(response_mask: torch.Tensor) -> list[int]:
    """Return for each row of a response mask [n, T] the number of observations that the model went on from.

    It is the number of stretches of 1 less one: what stands between two of them came from the environment. Where each
    observation is the answer to one search, it is the number of searches (arXiv 2510.06214). verl leaves an observation
    that would overflow the response out of the row, so it is not counted.
    """
    own = response_mask.bool()
    starts = own[:, :1].sum(1) + (own[:, 1:] & ~own[:, :-1]).sum(1)
    return (starts - 1).clamp(min=0).tolist()


MASK_STRATIFIERS: dict[str, Callable[[torch.Tensor], Sequence[Hashable]]] = {"observations": observations}


def estimate(
    name: str,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: NDArray[Any],
    config: Mapping[str, Any] | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the advantages of n rollouts as verl wants them, [n, T] twice: at the model's tokens the rollout's, else 0.

    A row without a token of the model's, such as verl's padding, takes no part.

    Args:
        name: the estimator, as in `agentrl.advantages.ESTIMATORS`.
        token_level_rewards: [n, T]; a rollout's reward is the sum of its row.
        response_mask: [n, T], 1 at the model's tokens.
        index: [n] ids of prompts (verl's `uid`).
        config: verl's `algorithm`. Its section `agentrl` has the options of `agentrl.advantages.compute` and of the
            estimator, and `strata`: "observations", or the import path `package.module:function` of a function from a
            response mask [n, T] to n keys.
        unused: what verl hands to some estimators beside.

    Raises:
        AdvantageError: as `agentrl.advantages.compute`, if there is no such `strata` or it does not return n keys, or if
            verl has taken tokens out of the response mask.
    """
    options = dict((config or {}).get(SECTION) or {})
    strata_of = look_up(options.pop("strata", "observations"), MASK_STRATIFIERS, "strata", AdvantageError)
    _check_mask_is_whole(config or {})
    rows = response_mask.bool().any(1)
    mask = response_mask[rows]
    strata = strata_of(mask)
    if len(strata) != len(mask):
        raise AdvantageError(
            f"algorithm.{SECTION}.strata must give {len(mask)} keys, one for each row, got {len(strata)}"
        )
    rewards = token_level_rewards.sum(1)
    values = torch.zeros_like(rewards)
    values[rows] = compute(
        rewards[rows],
        groups=np.asarray(index)[rows.cpu().numpy()],
        strata=strata,
        estimator=name,
        lengths=mask.sum(1),
        **options,
    ).values
    advantages = values[:, None] * response_mask
    return advantages, advantages


def _check_mask_is_whole(config: Mapping[str, Any]) -> None:
    correction = config.get("rollout_correction") or {}
    if correction.get("rollout_rs") and not correction.get("bypass_mode"):
        raise AdvantageError(
            "algorithm.rollout_correction.rollout_rs takes tokens out of the response mask before advantages are "
            "computed, so strata cannot be read off it: set rollout_rs to null, or bypass_mode to true"
        )


for _name in ESTIMATORS_OF_ROLLOUTS:
    register_adv_est(f"agentrl_{_name}")(partial(estimate, _name))
