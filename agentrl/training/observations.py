"""What is observed of log-probabilities while a batch is trained on, as metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch

from agentrl.training.llds import per_token


class Observations:
    """Sums over the tokens of a step, and the means that are logged of them.

    Everything covers the episodes that the model runs for. Without a KL term, LLDS or a bonus for entropy, those of
    advantage 0 are not among them.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._largest = 0.0
        self._ratios: list[torch.Tensor] = []

    def add(self, name: str, total: float, count: int) -> None:
        """Add `count` observations with the sum `total` to the mean of that name."""
        self._sums[name] += total
        self._counts[name] += count

    def see_sampler(self, change: torch.Tensor, advantages: torch.Tensor, own: torch.Tensor) -> float:
        """Take note of the trainer's log-probabilities minus the sampler's [B, C], and return the largest difference."""
        difference = change[own].abs()
        largest = float(difference.max())
        self._largest = max(self._largest, largest)
        self.add("logprobs/difference_mean", float(difference.sum()), difference.numel())
        positive = own & (per_token(advantages, own) >= 0)
        self._ratios.append(change[positive].exp().cpu())
        return largest

    def see_update(
        self,
        change: torch.Tensor,
        advantages: torch.Tensor,
        own: torch.Tensor,
        *,
        loss: str,
        by_episode: bool,
        low: float,
        high: float,
    ) -> None:
        """Take note of what clipping cuts.

        Args:
            change: [B, C], by how much log-probabilities have changed since before the batch.
            advantages: [B] or [B, C].
            own: bool [B, C], where they count.
            loss: TRL's name of it. sapo and vespo weigh ratios and cut none; cispo cuts those above `high` alone.
            by_episode: whether it is the ratio of a whole episode that is cut.
            low, high: ratios are cut below 1 - `low` and above 1 + `high`.
        """
        if loss in ("sapo", "vespo"):
            return
        if by_episode:
            change = ((change * own).sum(1, keepdim=True) / own.sum(1, keepdim=True).clamp(min=1)).expand_as(change)
        ratios = change[own].exp()
        if loss == "cispo":
            self.add("clip_ratio/high", int((ratios > high).sum()), ratios.numel())
            return
        chosen = per_token(advantages, own)[own]
        self.add("clip_ratio/low", int(((ratios < 1 - low) & (chosen < 0)).sum()), ratios.numel())
        self.add("clip_ratio/high", int(((ratios > 1 + high) & (chosen > 0)).sum()), ratios.numel())

    @classmethod
    def together(cls, observations: Iterable[Observations]) -> Observations:
        """Return all of them as one."""
        joined = cls()
        for some in observations:
            for name, total in some._sums.items():
                joined.add(name, total, some._counts[name])
            joined._largest = max(joined._largest, some._largest)
            joined._ratios += some._ratios
        return joined

    def logs(self) -> dict[str, float]:
        """Return the metrics, as means over tokens.

        logprobs/difference_max, _mean: how far the sampler's log-probabilities are from the trainer's before the batch, in
            nats.
        ratio/positive_q01, _q50, _q99: quantiles of exp(trainer's before the batch - sampler's log-probability) over the
            model's tokens of A >= 0.
        entropy, kl: in nats; kl by k3, at the weights of each update.
        kl/penalty: what was taken off advantages.
        clip_ratio/low, _high: the share of tokens whose ratio to the policy before the batch clipping cuts: the episode's
            ratio with gspo and luspo, _high alone with cispo, neither with sapo and vespo.
        importance/mean, _cut_share: the mean of the importance weights, and the share of them that was cut.
        llds/loss, llds/actions_fallen_share: the term before its weight, and the share of the actions of A >= 0 that fell.
        """
        logs = {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        if "logprobs/difference_mean" in logs:
            logs["logprobs/difference_max"] = self._largest
        ratios = torch.cat(self._ratios) if self._ratios else torch.empty(0)
        if len(ratios):
            # NumPy, because torch.quantile refuses more than 16 million values.
            low, middle, high = np.quantile(ratios.numpy(), (0.01, 0.5, 0.99)).tolist()
            logs |= {"ratio/positive_q01": low, "ratio/positive_q50": middle, "ratio/positive_q99": high}
        return logs
