"""A GRPOTrainer of TRL whose rollouts come from the pool and whose advantages come from agentrl's estimators.

TRL keeps the loss, the optimizer, schedules, checkpoints and logging. This is the one file that touches names which TRL
does not document; `PRIVATE_HOOKS` lists them and a contract test checks each, so that an upgrade of TRL fails here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from agentrl.training.llds import displacement, per_token
from agentrl.training.sampling import ScoredBatch
from agentrl.types import Trajectory

# Methods and attributes of TRL 1.16's GRPOTrainer that this module overrides or reads.
PRIVATE_HOOKS = (
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_compute_loss",
    "_metrics",
    "_tokenizer",
    "_step",
    "_save_checkpoint",
    "_load_from_checkpoint",
    "loss_type",
)

# The types of TRL's loss whose mean over tokens `StratifiedTrainer._normalised` can take.
LINEAR_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")


class StratifiedTrainer(GRPOTrainer):
    """TRL's loss over agentrl's batches.

    Log-probabilities are computed episode by episode, without padding and with logits at the model's own tokens only.
    Loss and gradients equal those of TRL's padded pass (a test holds them to 1e-5) at a fraction of time and memory.

    Advantages are one for each episode or, from estimators that rate turns, one for each turn's tokens. Episodes that are
    not trained have no scored token; the model does not run for them. TRL's dapo loss then divides by the tokens of the
    others; its grpo, bnpo and dr_grpo losses divide by the step's number of episodes or micro-batches, these included.
    """

    def __init__(
        self,
        *args: Any,
        sample: Callable[[int], ScoredBatch],
        questions: int,
        llds_weight: float = 0.0,
        llds_tolerance: float = 1e-3,
        importance: tuple[Literal["truncate", "mask"], float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up training on what `sample` returns.

        Args:
            args: TRL's own.
            sample: returns the next batch, which has the given number of episodes.
            questions: how many questions the whole run takes, which is the length of TRL's own data.
            llds_weight: the weight of the LLDS term (see agentrl.training.llds), which takes the mean over tokens that
                the loss takes. The log-probabilities to preserve are the sampler's, so with one update for each batch of
                fresh rollouts the term is 0; it acts on rollouts of an older adapter. 0 computes nothing.
            llds_tolerance: in nats per token; an action whose mean log-probability fell by no more counts as unchanged.
            importance: mode and cap of the weights that correct for rollouts of older weights, see
                `importance_weights`; None weighs nothing.
            kwargs: TRL's own.

        Raises:
            ValueError: if an LLDS setting is negative, or LLDS is on and the loss is none of `LINEAR_LOSSES`.
        """
        if llds_weight < 0 or llds_tolerance < 0:
            raise ValueError(
                f"llds_weight and llds_tolerance must be at least 0, got {llds_weight!r} and {llds_tolerance!r}"
            )
        super().__init__(
            *args,
            # TRL demands a reward function; ours are scored where the episodes run, and this one is never called.
            reward_funcs=_never_called,
            # TRL counts its steps by this data; which questions a batch has is up to `sample`.
            train_dataset=Dataset.from_dict({"prompt": [str(position) for position in range(questions)]}),
            **kwargs,
        )
        if llds_weight and self.loss_type not in LINEAR_LOSSES:
            raise ValueError(f"LLDS needs a loss of {', '.join(LINEAR_LOSSES)}, got {self.loss_type!r}")
        self._sample = sample
        self._llds_weight = llds_weight
        self._llds_tolerance = llds_tolerance
        self._importance = importance
        self._to_weigh: dict[str, torch.Tensor] | None = None
        self._scored_mask: torch.Tensor | None = None
        self._last_logps: torch.Tensor | None = None
        self._differences: list[tuple[float, float, int]] = []
        self._weights: list[tuple[float, int, int]] = []
        self._ratios: list[torch.Tensor] = []
        self._actions: list[tuple[int, int]] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._sample(len(inputs))
        for name, value in batch.metrics.items():
            self._metrics["train"][name].append(value)
        tensors = batch_tensors(batch.trajectories, self._tokenizer.pad_token_id, batch.trained)
        advantages = torch.tensor(batch.advantages, dtype=torch.float32)
        if advantages.dim() == 2:
            advantages = spread_over_tokens(advantages, tensors["turn_index"], tensors["completion_mask"])
        tensors["advantages"] = advantages
        tensors = {name: tensor.to(self.accelerator.device) for name, tensor in tensors.items()}
        tensors["num_items_in_batch"] = self.accelerator.gather(tensors["tool_mask"].sum()).sum()
        if self.beta != 0.0:
            tensors["ref_per_token_logps"] = self._reference_logps(tensors)
        return tensors

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the last step that was taken, as the schedule of checkpoints would."""
        self._save_checkpoint(self.model, trial=None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy = self.accelerator.unwrap_model(model or self.model)
        # Where there is a reference beside it, transformers loads that alone and leaves the trained adapter as it began.
        if len(policy.peft_config) > 1:
            policy.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            policy.set_adapter("default")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to TRL's metrics what was observed in each micro-batch, before the update.

        logprobs/difference_max, _mean: how far the sampler's log-probabilities are from the trainer's, in nats.
        ratio/positive_q01, _q50, _q99: quantiles of exp(trainer's - sampler's log-probability) over the model's tokens of
            A >= 0. A = 0 counts, as it does for LLDS, whose work these quantiles show: such tokens are not trained, but
            drift with those that are.
        importance/mean, _cut_share: of the weights of rollouts of older weights, the mean and the share that was cut.
        llds/actions_fallen_share: the share of the actions of A >= 0 that fell, if LLDS is on.
        """
        if self._differences:
            largest, totals, tokens = zip(*self._differences, strict=True)
            logs |= {"logprobs/difference_max": max(largest), "logprobs/difference_mean": sum(totals) / sum(tokens)}
            self._differences.clear()
        if self._weights:
            total, cut, count = (sum(values) for values in zip(*self._weights, strict=True))
            logs |= {"importance/mean": total / count, "importance/cut_share": cut / count}
            self._weights.clear()
        if self._ratios:
            # NumPy, because torch.quantile refuses more than 16 million values.
            low, middle, high = np.quantile(torch.cat(self._ratios).numpy(), (0.01, 0.5, 0.99)).tolist()
            logs |= {"ratio/positive_q01": low, "ratio/positive_q50": middle, "ratio/positive_q99": high}
            self._ratios.clear()
        if self._actions:
            actions, fallen = (sum(counts) for counts in zip(*self._actions, strict=True))
            logs |= {"llds/actions_fallen_share": fallen / actions}
            self._actions.clear()
        super().log(logs, start_time)

    def _reference_logps(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities under the model as it was when training began."""
        model = self.accelerator.unwrap_model(self.model)
        ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], dim=1)
        attention = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], dim=1)
        self._scored_mask = tensors["tool_mask"]
        with torch.no_grad(), _reference_adapter(model):
            return self._get_per_token_logps_and_entropies(
                self.model, ids, attention, tensors["completion_ids"].size(1)
            )[0]

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        # TRL does not hand the mask to the log-probability pass, which needs it to leave out the environment's tokens.
        self._scored_mask = inputs["completion_mask"] * inputs["tool_mask"]
        own = self._scored_mask.bool()
        # TRL would count the zeros of a micro-batch without a scored token in the means that it logs.
        self._to_weigh = weighed = dict(inputs)
        with nullcontext() if own.any() else self._metrics_apart():
            loss = super()._compute_loss(model, weighed)
        logps = self._last_logps
        # Kept with their graph, they would hold the activations of this micro-batch during the next.
        self._last_logps = logps.detach()
        if own.any():
            self._observe(self._last_logps, inputs, own)
        if self._llds_weight:
            loss = loss + self._llds_weight * self._llds(model, logps, inputs, own)
        return loss

    def _weigh(self, inputs: dict[str, torch.Tensor], logps: torch.Tensor) -> None:
        """Multiply the advantages in `inputs` by importance weights; TRL reads them after the log-probabilities [B, C]."""
        own = self._scored_mask.bool()
        weights = importance_weights(logps, inputs["sampling_per_token_logps"], *self._importance)
        inputs["advantages"] = per_token(inputs["advantages"], own) * weights
        if own.any():
            cut = weights[own] != (logps - inputs["sampling_per_token_logps"])[own].exp()
            self._weights.append((weights[own].sum().item(), int(cut.sum()), int(own.sum())))

    def _observe(self, logps: torch.Tensor, inputs: dict[str, torch.Tensor], own: torch.Tensor) -> None:
        """Keep for `log` how log-probabilities [B, C] differ from the sampler's at the tokens in `own` [B, C]."""
        change = logps - inputs["sampling_per_token_logps"]
        difference = change[own].abs()
        self._differences.append((difference.max().item(), difference.sum().item(), difference.numel()))
        positive = own & (per_token(inputs["advantages"], own) >= 0)
        if positive.any():
            self._ratios.append(change[positive].exp().cpu())

    def _llds(
        self, model: Any, logps: torch.Tensor, inputs: dict[str, torch.Tensor], own: torch.Tensor
    ) -> torch.Tensor:
        """Return the LLDS term before its weight and log it as llds/loss, as a mean over the step's micro-batches."""
        found = displacement(
            logps,
            inputs["sampling_per_token_logps"],
            inputs["advantages"],
            own,
            inputs["turn_index"],
            self._llds_tolerance,
        )
        term = self._normalised(model, found.penalty, inputs)
        # TRL's loss is a micro-batch's part of the step's; its metrics are means over the micro-batches.
        self._metrics["train"]["llds/loss"].append(term.item() * self.current_gradient_accumulation_steps)
        if found.actions.item():
            self._actions.append((int(found.actions), int(found.fallen)))
        return term

    def _normalised(self, model: Any, values: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean over the tokens of `inputs` that TRL's loss type takes, of values [B, C]; differentiable.

        With a ratio of 1 and no divergence from the reference, TRL's loss of one token is its negative advantage, so that
        its loss over all tokens, for the advantages -values, is their mean as the loss type defines it.
        """
        # With nothing to score, the log-probabilities are zeros and the model does not run.
        self._scored_mask = torch.zeros_like(inputs["tool_mask"])
        zeros = torch.zeros_like(values)
        unchanged = dict.fromkeys(("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"), zeros)
        with self._metrics_apart():
            return super()._compute_loss(model, {**inputs, **unchanged, "advantages": -values})

    @contextmanager
    def _metrics_apart(self) -> Iterator[None]:
        """Drop the metrics that TRL's loss appends meanwhile."""
        kept, self._metrics = self._metrics, defaultdict(lambda: defaultdict(list))
        try:
            yield
        finally:
            self._metrics = kept

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        compute_entropy: bool = False,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Return log-probabilities and entropies [B, C] at the model's own tokens of the completions, 0 elsewhere.

        The model does not run for an episode without such a token.
        """
        rows = [
            _episode_logps(model, ids[attended], positions, self.temperature, logits_to_keep, tail)
            if positions.numel()
            else _nothing_scored(logits_to_keep, ids.device)
            for ids, attended, positions, tail in zip(
                input_ids,
                attention_mask.bool(),
                [torch.nonzero(scored).squeeze(1) for scored in self._scored_mask],
                attention_mask[:, -logits_to_keep:].sum(1).tolist(),
                strict=True,
            )
        ]
        self._last_logps = logps = torch.stack([row[0] for row in rows])
        if self._importance is not None and self._to_weigh is not None:
            self._weigh(self._to_weigh, logps.detach())
        self._to_weigh = None
        entropies = torch.stack([row[1] for row in rows]) if compute_entropy else None
        return logps, entropies, None


def _episode_logps(
    model: Any, ids: torch.Tensor, scored: torch.Tensor, temperature: float, width: int, completion_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score one unpadded episode.

    `ids` [P+C] is prompt and completion, `scored` [S] the positions within the completion that are the model's own.
    Returns log-probabilities and (detached) entropies, each [width], 0 at all other positions.
    """
    positions = scored + (ids.size(0) - completion_length)
    # The logits that predict a token stand one position before it.
    logits = model(input_ids=ids[None], logits_to_keep=positions - 1, use_cache=False).logits[0].float() / temperature
    log_normaliser = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(1, ids[positions][:, None]).squeeze(1) - log_normaliser
    logps = chosen.new_zeros(width).index_put((scored,), chosen)
    with torch.no_grad():
        log_probabilities = logits - log_normaliser[:, None]
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        entropies = entropy.new_zeros(width).index_put((scored,), entropy)
    return logps, entropies


def _nothing_scored(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and entropies of an episode without a scored token, each [width]."""
    # A gradient is asked for so that backward() works, to no effect, on a micro-batch of such episodes alone.
    return torch.zeros(width, device=device, requires_grad=True), torch.zeros(width, device=device)


def batch_tensors(
    trajectories: Sequence[Trajectory], pad_id: int, trained: Sequence[bool] | None = None
) -> dict[str, torch.Tensor]:
    """Lay trajectories out as TRL expects: prompts padded left, completions right.

    Returns prompt_ids and prompt_mask [B, P]; completion_ids, completion_mask, tool_mask, sampling_per_token_logps and
    turn_index (0 at padding) [B, C]. tool_mask is 1 at the model's own tokens, and 0 at the environment's, at padding and
    all over an episode whose environment failed or that `trained` [B] leaves out; None leaves out no other. An episode
    without a token, whose environment failed in its first turn, is one padding token that no mask counts as trained.

    Raises:
        ValueError: if `trained` has not one entry for each trajectory.
    """
    width = max(1, max(len(t.completion_ids) for t in trajectories))
    prompt_width = max(len(t.prompt_ids) for t in trajectories)
    size = len(trajectories)
    out = {
        "prompt_ids": torch.full((size, prompt_width), pad_id),
        "prompt_mask": torch.zeros((size, prompt_width), dtype=torch.long),
        "completion_ids": torch.full((size, width), pad_id),
        "completion_mask": torch.zeros((size, width), dtype=torch.long),
        "tool_mask": torch.zeros((size, width), dtype=torch.long),
        "turn_index": torch.zeros((size, width), dtype=torch.long),
        "sampling_per_token_logps": torch.zeros((size, width)),
    }
    chosen = [True] * size if trained is None else trained
    for row, (trajectory, is_trained) in enumerate(zip(trajectories, chosen, strict=True)):
        prompt, completion = trajectory.prompt_ids, trajectory.completion_ids
        out["prompt_ids"][row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        out["prompt_mask"][row, prompt_width - len(prompt) :] = 1
        out["completion_mask"][row, : max(1, len(completion))] = 1
        if completion:
            out["completion_ids"][row, : len(completion)] = torch.tensor(completion)
            if trajectory.valid and is_trained:
                out["tool_mask"][row, : len(completion)] = torch.tensor(trajectory.action_mask, dtype=torch.long)
            out["turn_index"][row, : len(completion)] = torch.tensor(trajectory.turn_index)
            out["sampling_per_token_logps"][row, : len(completion)] = torch.tensor(trajectory.logprobs)
    return out


def importance_weights(
    logps: torch.Tensor, sampler_logps: torch.Tensor, mode: Literal["truncate", "mask"], cap: float
) -> torch.Tensor:
    """Return w = exp(logp - sampler's logp) for each token [B, C], min(w, cap) or 0 where w is not within 1/cap to cap.

    Truncated importance sampling (Ionides, Journal of Computational and Graphical Statistics 17, 2008) for rollouts of
    older weights: unbiased up to what is cut, and of bounded variance.
    """
    weights = (logps - sampler_logps).exp()
    if mode == "truncate":
        return weights.clamp(max=cap)
    return torch.where((weights > cap) | (weights < 1 / cap), 0.0, weights)


def spread_over_tokens(
    advantages: torch.Tensor, turn_index: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """Give each token the advantage of its turn: [B, T] for T turns and turn_index [B, C] make [B, C], 0 at padding.

    Turns beyond T are those of episodes that are not trained on, and get 0.
    """
    missing = int(turn_index.max()) + 1 - advantages.shape[1]
    padded = torch.nn.functional.pad(advantages, (0, max(0, missing)))
    return padded.gather(1, turn_index) * completion_mask


def _reference_adapter(model: Any) -> Any:
    # TRL copies an adapter that training starts from under the name "ref"; without one, the base model is the reference.
    from trl.trainer.utils import use_adapter

    return use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)


def _never_called(**unused: Any) -> list[float]:
    raise RuntimeError("TRL called its reward function, but agentrl scores rewards where the episodes run")


def grpo_config(**settings: Any) -> GRPOConfig:
    """TRL's settings with those that agentrl's batches rely on.

    Raises:
        ValueError: if the loss is dr_grpo and `max_completion_length`, the constant that it divides by, is not given.
    """
    # No other loss uses it: sequence-length limits are enforced while an episode runs.
    settings.setdefault("max_completion_length", None)
    if settings.get("loss_type") == "dr_grpo" and settings["max_completion_length"] is None:
        raise ValueError("loss dr_grpo divides by max_completion_length, which must be given")
    return GRPOConfig(
        # The data order is agentrl's own.
        shuffle_dataset=False,
        remove_unused_columns=False,
        logging_steps=1,
        logging_first_step=False,
        log_completions=False,
        disable_tqdm=True,
        **settings,
    )
