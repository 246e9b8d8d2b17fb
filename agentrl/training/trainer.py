"""A GRPOTrainer of TRL whose rollouts come from the pool and whose advantages come from agentrl's estimators.

TRL keeps the loss, the optimizer, schedules, checkpoints and logging. This is the one file that touches names which TRL
and transformers do not document. A contract test names each of them, so that an upgrade fails there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from agentrl.config import Config
from agentrl.training.adapter import save_adapter
from agentrl.training.batch import batch_tensors, spread_over_tokens
from agentrl.training.importance import importance_weights
from agentrl.training.llds import displacement, per_token
from agentrl.training.sampling import ScoredBatch
from agentrl.types import AgentRLError

# The types of TRL's loss whose mean over tokens `StratifiedTrainer._mean_over_tokens` takes.
LINEAR_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")

# The most tokens, padding included, of episodes that share a pass. A pass costs some milliseconds whatever its length.
_PASS_TOKENS = 1024


class NotFiniteError(AgentRLError):
    """A number that the update depends on is infinite or NaN; the optimizer has not taken the step."""


class StratifiedTrainer(GRPOTrainer):
    """TRL's loss over agentrl's batches.

    Log-probabilities are computed with logits at the model's own tokens only, for short episodes of similar length
    together, for each longer one without padding. Loss and gradients equal those of TRL's padded pass (a test holds them
    to 1e-5) at a fraction of time and memory.

    An advantage belongs to an episode or, from estimators that rate turns, to a turn. The model does not run for episodes
    that are not trained. TRL's dapo loss divides by the tokens of the trained episodes alone; its grpo, bnpo and dr_grpo
    losses divide by the number of all episodes or micro-batches of the step.
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
            llds_weight: the weight of the LLDS term (see agentrl.training.llds); 0 computes none. The term is a mean over
                tokens, normalised as the loss is. It preserves the sampler's log-probabilities, so it is 0 for rollouts
                that the present weights have sampled, and acts on those of an older adapter.
            llds_tolerance: in nats per token; an action counts as unchanged if its mean log-probability fell by no more.
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
        self._require_finite("an advantage", advantages.abs().sum().item(), "check the estimator and its rewards")
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The reference of the KL term is the adapter that training begins with, which a resumed run makes again.
        save_adapter(self.accelerator.unwrap_model(self.model), Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        policy = self.accelerator.unwrap_model(model or self.model)
        policy.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        policy.set_adapter("default")

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # transformers asks for the norm just before the optimizer takes its step.
        norm = super()._get_grad_norm(model, grad_norm)
        self._require_finite("the gradient norm", float(norm))
        return norm

    def _require_finite(
        self, what: str, value: float, advice: str = "lower training.learning_rate or training.max_grad_norm"
    ) -> None:
        if not math.isfinite(value):
            raise NotFiniteError(
                f"step {self.state.global_step + 1}: {what} is {value}; the optimizer did not take this step, and the "
                f"weights are still those of the step before: {advice}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to TRL's metrics what was observed in each micro-batch, before the update.

        logprobs/difference_max, _mean: how far the sampler's log-probabilities are from the trainer's, in nats.
        ratio/positive_q01, _q50, _q99: quantiles of exp(trainer's - sampler's log-probability) over the model's tokens of
            A >= 0. Tokens of A = 0 count: nothing trains them, but they drift with those that are trained.
        importance/mean, _cut_share: the mean of the importance weights, and the share of them that was cut.
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
            loss = loss + self._llds_weight * self._llds(logps, inputs, own)
        self._require_finite("the loss", loss.item())
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
        largest = difference.max().item()
        self._require_finite("the difference between a token's log-probabilities in trainer and sampler", largest)
        self._differences.append((largest, difference.sum().item(), difference.numel()))
        positive = own & (per_token(inputs["advantages"], own) >= 0)
        if positive.any():
            self._ratios.append(change[positive].exp().cpu())

    def _llds(self, logps: torch.Tensor, inputs: dict[str, torch.Tensor], own: torch.Tensor) -> torch.Tensor:
        """Return the LLDS term before its weight and log it as llds/loss, as a mean over the step's micro-batches."""
        found = displacement(
            logps,
            inputs["sampling_per_token_logps"],
            inputs["advantages"],
            own,
            inputs["turn_index"],
            self._llds_tolerance,
        )
        term = self._mean_over_tokens(found.penalty, own, inputs)
        # TRL's loss is a micro-batch's part of the step's; its metrics are means over the micro-batches.
        self._metrics["train"]["llds/loss"].append(term.item() * self.current_gradient_accumulation_steps)
        if found.actions.item():
            self._actions.append((int(found.actions), int(found.fallen)))
        return term

    def _mean_over_tokens(
        self, values: torch.Tensor, own: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return this micro-batch's part of the step's mean of `values` [B, C], 0 outside `own` [B, C].

        The mean is the one that TRL's loss type takes of its tokens: over those of the step (dapo) or of the micro-batch
        (bnpo), over each episode's and then over episodes (grpo), or over episodes of `max_completion_length` (dr_grpo).
        """
        if self.loss_type == "dapo":
            return values.sum() / inputs["num_items_in_batch"].clamp(min=1)
        if self.loss_type == "grpo":
            mean = (values.sum(1) / own.sum(1).clamp(min=1)).mean()
        elif self.loss_type == "bnpo":
            mean = values.sum() / own.sum().clamp(min=1)
        else:
            mean = values.sum() / (len(values) * self.max_completion_length)
        return mean / self.current_gradient_accumulation_steps

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
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        episodes = [ids[attended] for ids, attended in zip(input_ids, attention_mask.bool(), strict=True)]
        prompts = attention_mask[:, :-logits_to_keep].sum(1).tolist()
        scored = [torch.nonzero(row).squeeze(1) for row in self._scored_mask]
        # A gradient is asked for so that backward() works, to no effect, where nothing is scored.
        logps = torch.zeros_like(self._scored_mask, dtype=torch.float32, requires_grad=True)
        entropies = torch.zeros_like(self._scored_mask, dtype=torch.float32)
        for rows in _chunks([len(ids) if own.numel() else 0 for ids, own in zip(episodes, scored, strict=True)]):
            chosen, entropy = _score(
                model, head, [episodes[r] for r in rows], [scored[r] + prompts[r] for r in rows], self.temperature
            )
            places = torch.cat([torch.full_like(scored[r], r) for r in rows]), torch.cat([scored[r] for r in rows])
            logps = logps.index_put(places, chosen)
            entropies = entropies.index_put(places, entropy)
        self._last_logps = logps
        if self._importance is not None and self._to_weigh is not None:
            self._weigh(self._to_weigh, logps.detach())
        self._to_weigh = None
        return logps, entropies if compute_entropy else None, None


def _chunks(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indexes of episodes that share a pass, longest first; those of length 0 take part in none."""
    chunk: list[int] = []
    for index in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        if chunk and lengths[chunk[0]] * (len(chunk) + 1) > _PASS_TOKENS:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def _score(
    model: Any, head: torch.nn.Module, episodes: list[torch.Tensor], positions: list[torch.Tensor], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score tokens of unpadded episodes in one pass of the model, whose layer for logits is `head`.

    `episodes` hold ids [T], T for each its own, `positions` [S] those that are scored. Returns log-probabilities and
    (detached) entropies, each [N], of the first episode's tokens, then the second's, and so on.
    """
    rows = torch.cat([torch.full_like(own, row) for row, own in enumerate(positions)])
    columns = torch.cat(positions)
    # Padding on the right needs no mask: under causal attention no token sees it.
    ids = torch.nn.utils.rnn.pad_sequence(episodes, batch_first=True)
    # The logits that predict a token stand one position before it.
    with _logits_at(head, rows, columns - 1):
        logits = model(input_ids=ids, use_cache=False).logits[0].float() / temperature
    log_normaliser = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(1, ids[rows, columns][:, None]).squeeze(1) - log_normaliser
    with torch.no_grad():
        log_probabilities = logits - log_normaliser[:, None]
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return chosen, entropy


@contextmanager
def _logits_at(head: torch.nn.Module, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Have a model compute logits [1, N, V] at N of the places [B, T] alone; its own option takes the same for each row."""
    hook = head.register_forward_pre_hook(lambda module, hidden: (hidden[0][rows, columns][None],))
    try:
        yield
    finally:
        hook.remove()


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
        # transformers would replace a loss that is not finite by the mean of those before.
        logging_nan_inf_filter=False,
        # agentrl writes its own metrics.
        report_to=[],
        remove_unused_columns=False,
        logging_steps=1,
        logging_first_step=False,
        log_completions=False,
        disable_tqdm=True,
        **settings,
    )


def run_settings(config: Config, checkpoints: Path) -> GRPOConfig:
    """TRL's settings for the run that `config` describes; `checkpoints` is the folder that TRL writes them into."""
    rollout, training = config.rollout, config.training
    return grpo_config(
        output_dir=str(checkpoints),
        per_device_train_batch_size=training.micro_batch,
        gradient_accumulation_steps=rollout.group_size * rollout.questions_per_step // training.micro_batch,
        num_generations=rollout.group_size,
        max_steps=training.steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        loss_type=training.loss,
        max_completion_length=config.agent.max_episode_tokens,
        beta=training.kl_coefficient,
        temperature=config.agent.temperature,
        gradient_checkpointing=training.gradient_checkpointing,
        bf16=config.model.dtype == "bfloat16",
        use_cpu=config.device == "cpu",
        seed=config.seed,
        save_strategy="steps",
        save_steps=training.checkpoint_every,
        save_total_limit=training.keep_checkpoints,
    )
