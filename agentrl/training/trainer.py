"""A GRPOTrainer of TRL whose rollouts come from the pool and whose advantages come from agentrl's estimators.

TRL keeps the loss, the optimizer, schedules, checkpoints and logging. This is the one file that touches names which TRL
does not document; `PRIVATE_HOOKS` lists them and a contract test checks each, so that an upgrade of TRL fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

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
)


class StratifiedTrainer(GRPOTrainer):
    """TRL's loss over agentrl's batches.

    Log-probabilities are computed episode by episode, without padding and with logits at the model's own tokens only.
    Loss and gradients equal those of TRL's padded pass (a test holds them to 1e-5) at a fraction of time and memory.
    """

    def __init__(self, *args: Any, sample: Callable[[list[int]], ScoredBatch], questions: int, **kwargs: Any) -> None:
        """`sample` turns the positions of a step's questions in the data order, each repeated group-size times, into a
        batch in that order; `questions` is the length of the data order, which TRL walks from first to last."""
        super().__init__(
            *args,
            # TRL demands a reward function; ours are scored where the episodes run, and this one is never called.
            reward_funcs=_never_called,
            train_dataset=Dataset.from_dict({"prompt": [str(position) for position in range(questions)]}),
            **kwargs,
        )
        self._sample = sample
        self._scored_mask: torch.Tensor | None = None
        self._last_logps: torch.Tensor | None = None
        self._differences: list[tuple[float, float]] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._sample([int(row["prompt"]) for row in inputs])
        for name, value in batch.metrics.items():
            self._metrics["train"][name].append(value)
        tensors = batch_tensors(batch.trajectories, self._tokenizer.pad_token_id)
        tensors["advantages"] = torch.tensor(batch.advantages, dtype=torch.float32)
        tensors = {name: tensor.to(self.accelerator.device) for name, tensor in tensors.items()}
        tensors["num_items_in_batch"] = self.accelerator.gather(tensors["tool_mask"].sum()).sum()
        if self.beta != 0.0:
            tensors["ref_per_token_logps"] = self._reference_logps(tensors)
        return tensors

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to TRL's metrics how far the sampler's log-probabilities are from the trainer's, before the update."""
        if self._differences:
            largest, means = zip(*self._differences, strict=True)
            logs |= {"logprobs/difference_max": max(largest), "logprobs/difference_mean": sum(means) / len(means)}
            self._differences.clear()
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
        loss = super()._compute_loss(model, inputs)
        own = self._scored_mask.bool()
        if own.any():
            difference = (self._last_logps - inputs["sampling_per_token_logps"])[own].abs()
            self._differences.append((difference.max().item(), difference.mean().item()))
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        compute_entropy: bool = False,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Return log-probabilities and entropies [B, C] at the model's own tokens of the completions, 0 elsewhere."""
        rows = [
            _episode_logps(
                model, ids[attended], torch.nonzero(scored).squeeze(1), self.temperature, logits_to_keep, tail
            )
            for ids, attended, scored, tail in zip(
                input_ids,
                attention_mask.bool(),
                self._scored_mask.bool(),
                attention_mask[:, -logits_to_keep:].sum(1).tolist(),
                strict=True,
            )
        ]
        logps = torch.stack([row[0] for row in rows])
        self._last_logps = logps.detach()
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


def batch_tensors(trajectories: Sequence[Trajectory], pad_id: int) -> dict[str, torch.Tensor]:
    """Lay trajectories out as TRL expects: prompts padded left, completions right.

    Returns prompt_ids and prompt_mask [B, P]; completion_ids, completion_mask, tool_mask (1 at the model's own tokens,
    0 at the environment's, at padding and all over an episode whose
    environment failed) and sampling_per_token_logps [B, C]. An episode without a token, whose
    environment failed in its first turn, is one padding token that no mask counts as trained.
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
        "sampling_per_token_logps": torch.zeros((size, width)),
    }
    for row, trajectory in enumerate(trajectories):
        prompt, completion = trajectory.prompt_ids, trajectory.completion_ids
        out["prompt_ids"][row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        out["prompt_mask"][row, prompt_width - len(prompt) :] = 1
        out["completion_mask"][row, : max(1, len(completion))] = 1
        if completion:
            out["completion_ids"][row, : len(completion)] = torch.tensor(completion)
            if trajectory.valid:
                out["tool_mask"][row, : len(completion)] = torch.tensor(trajectory.action_mask, dtype=torch.long)
            out["sampling_per_token_logps"][row, : len(completion)] = torch.tensor(trajectory.logprobs)
    return out


def _reference_adapter(model: Any) -> Any:
    # TRL copies an adapter that training starts from under the name "ref"; without one, the base model is the reference.
    from trl.trainer.utils import use_adapter

    return use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)


def _never_called(**unused: Any) -> list[float]:
    raise RuntimeError("TRL called its reward function, but agentrl scores rewards where the episodes run")


def grpo_config(**settings: Any) -> GRPOConfig:
    """TRL's settings with those that agentrl's batches rely on."""
    return GRPOConfig(
        # The data order is agentrl's own, so TRL walks it from the first question to the last.
        shuffle_dataset=False,
        # Sequence-length limits are enforced while an episode runs.
        max_completion_length=None,
        remove_unused_columns=False,
        logging_steps=1,
        logging_first_step=False,
        log_completions=False,
        disable_tqdm=True,
        **settings,
    )
