"""A GRPOTrainer of TRL whose rollouts come from the pool and whose advantages come from agentrl's estimators.

TRL keeps the loss, the optimizer, schedules, checkpoints and logging. This file and `sharded` touch names which
TRL and transformers do not document. A contract test names each of them, so that an upgrade fails there.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOTrainer

from agentrl.runs import new_checkpoint
from agentrl.training.batch import Minibatch, batch_tensors, deal, spread_over_tokens
from agentrl.training.importance import importance_weights
from agentrl.training.kl import kl_estimates
from agentrl.training.llds import displacement, per_token
from agentrl.training.normalisers import part_of_mean, share_of_loss
from agentrl.training.observations import Observations
from agentrl.training.policy import (
    drop_needless_reference,
    is_adapted,
    reference_adapter,
    restore_policy,
    save_policy,
    switch_off_dropout,
)
from agentrl.training.proof import Evidence, require_agreement
from agentrl.training.ranks import ALONE, Ranks, share_out
from agentrl.training.sampling import ScoredBatch
from agentrl.training.scoring import Pack, Scorer, Scores, TokenSequence
from agentrl.training.updates import NOTHING_ADDED, Additions, Updates
from agentrl.types import AgentRLError

# So many episodes of a batch are scored for the proof that engines use the trained weights.
_PROVING_EPISODES = 4


class NotFiniteError(AgentRLError):
    """A number that the update depends on is infinite or NaN; the optimizer has not taken the step."""


class StratifiedTrainer(GRPOTrainer):
    """TRL's loss over agentrl's batches, one optimizer update for each minibatch.

    Log-probabilities come from a `Scorer`, pack by pack; the loss of a pack is TRL's over the episodes of the pack, with
    the normaliser of the whole minibatch. So loss and gradients equal those of TRL's padded pass over the minibatch (tests
    hold them to 1e-5), whatever the packs.

    An advantage belongs to an episode or, from estimators that rate turns, to a turn. The model does not run for an episode
    that is not trained, nor, unless a term of the loss acts on it, for one whose advantages are all 0; both have no
    gradient. Normalisers count the episodes that are trained, those of advantage 0 included (dapo, cispo, vespo and bnpo
    their tokens); grpo, dr_grpo, sapo, luspo and gspo divide by the number of all episodes of the minibatch.
    """

    def __init__(
        self,
        *args: Any,
        sample: Callable[[], ScoredBatch],
        scorer: Callable[[Any], Scorer],
        updates: Updates,
        additions: Additions = NOTHING_ADDED,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        on_trained: Callable[[int], None] = lambda episodes: None,
        keep_checkpoints: int = 2,
        best: Callable[[], int | None] = lambda: None,
        ranks: Ranks = ALONE,
        prove_weights: bool = True,
        reference: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set up training on what `sample` returns.

        Args:
            args: TRL's own.
            sample: returns the next batch, of whole groups.
            scorer: makes the scorer of a model.
            updates: how often a batch is trained on.
            additions: what is added to TRL's loss.
            optimizer: makes the optimizer of a model; None leaves it to TRL.
            on_trained: is called with the number of episodes of the batch that this pass over it is through with.
            keep_checkpoints: so many of the newest checkpoints stay.
            best: returns the step whose checkpoint stays beside them.
            ranks: the processes that train together. `sample` is called on the first alone.
            prove_weights: whether batches are looked at until one shows that the trained weights were used where it was
                sampled; where all weights are trained and there is no `reference`, each is.
            reference: of the KL term where all weights are trained: a copy of the model as it was when training began.
            kwargs: TRL's own.
        """
        # The folder that a checkpoint is being written into.
        self._aside: Path | None = None
        self._keep, self._best = keep_checkpoints, best
        self._make_optimizer = optimizer
        self._ranks = ranks
        settings = kwargs["args"]
        self._kl_coefficient = settings.beta
        trained = [(p, p.data) for p in kwargs["model"].parameters() if p.requires_grad]
        if not is_adapted(kwargs["model"]):
            if self._kl_coefficient and reference is None:
                raise ValueError("a KL term of a model without an adapter needs a reference")
            # TRL would load one from where the model came from, in the precision of training.
            settings.beta = 0.0
        super().__init__(
            *args,
            # TRL demands a reward function; ours are scored where the episodes run, and this one is never called.
            reward_funcs=_never_called,
            # TRL counts its updates by this data; what they train on is up to `sample`.
            train_dataset=Dataset.from_dict({"prompt": [str(update) for update in range(kwargs["args"].max_steps)]}),
            **kwargs,
        )
        settings.beta = self._kl_coefficient
        for parameter, data in trained:
            if parameter.dtype != data.dtype:
                # TRL rounds the adapter of a quantised model to bf16, in which small updates are lost.
                parameter.data = data.to(parameter.device)
        drop_needless_reference(self.accelerator.unwrap_model(self.model))
        switch_off_dropout(self.model)
        # TRL's own term is k3 in the loss.
        of_trl = additions.kl_estimator == "k3" and not additions.kl_in_reward
        self.beta = self._kl_coefficient if of_trl else 0.0
        self._sample = sample
        self._reference = None if reference is None else scorer(reference.to(self.accelerator.device))
        self._scorer = scorer(self.accelerator.unwrap_model(self.model))
        self._updates, self._additions, self._on_trained = updates, additions, on_trained
        self._waiting: deque[Minibatch] = deque()
        self._weights_are_used = not prove_weights
        self._scores: tuple[torch.Tensor, torch.Tensor] | None = None
        # An update is one step of TRL's, which divides by it.
        self.current_gradient_accumulation_steps = 1
        self._observed = Observations()
        self._seconds = 0.0

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Return the names of the parameters that weight decay acts on: matrices, and no vector, such as DoRA's lengths."""
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, where there is none yet."""
        if self.optimizer is None and self._make_optimizer is not None:
            self.optimizer = self._make_optimizer(self.model if model is None else model)
        return super().create_optimizer(model)

    @property
    def batches(self) -> int:
        """The number of batches that are trained on to the end."""
        return self.state.global_step // self._updates.per_batch

    @property
    def needs_batch(self) -> bool:
        """Whether the next update begins with a new batch."""
        return not self._waiting

    @property
    def weights(self) -> dict[str, torch.Tensor] | None:
        """The weights to publish and to save, where they are not those that the model itself has."""
        return None

    @property
    def _acts_on_all(self) -> bool:
        """Whether an episode of advantage 0 has a gradient."""
        return bool(self._kl_coefficient or self._additions.entropy_bonus or self._additions.llds_weight)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the gradients of the next minibatch, and return its loss. `inputs` are TRL's own and say nothing."""
        model.train()
        if self.needs_batch:
            batch = self._ranks.from_first(self._sample)
            started = time.perf_counter()
            self._waiting.extend(self._minibatches(batch))
        else:
            started = time.perf_counter()
        loss = self.backward(self._waiting.popleft())
        self._seconds += time.perf_counter() - started
        return loss

    def _minibatches(self, batch: ScoredBatch) -> Iterator[Minibatch]:
        for name, value in batch.metrics.items():
            self._metrics["train"][name].append(value)
        whole = self.whole_batch(batch)
        generator = torch.Generator().manual_seed(self._updates.seed + self.state.global_step)
        for _ in range(self._updates.epochs):
            shuffled = generator if self._updates.minibatches > 1 else None
            yield from deal(whole, self._updates.group_size, self._updates.minibatches, shuffled)

    def whole_batch(self, batch: ScoredBatch) -> Minibatch:
        """Return a batch as one minibatch, with all that is computed before its first update."""
        tensors = batch_tensors(batch.trajectories, self._tokenizer.pad_token_id, batch.trained)
        advantages = torch.tensor(batch.advantages, dtype=torch.float32)
        self._require_finite("an advantage", advantages.abs().sum().item(), "check the estimator and its rewards")
        if advantages.dim() == 2:
            advantages = spread_over_tokens(advantages, tensors["turn_index"], tensors["completion_mask"])
        tensors["advantages"] = advantages
        own = tensors["tool_mask"].bool()
        acts = own if self._acts_on_all else own & (per_token(advantages, own) != 0)
        whole = Minibatch(tensors, acts.any(1))
        if not self._weights_are_used:
            # Older weights may have been those of the untrained model.
            newest = [set(trajectory.adapter_versions) == {self.batches} for trajectory in batch.trajectories]
            self._weights_are_used = self._proves_weights(whole, torch.tensor(newest))
        if self._kl_coefficient:
            with self._untrained(reference_adapter):
                tensors["ref_per_token_logps"] = self._logps_of_all_ranks(whole)
        if self._updates.per_batch > 1:
            tensors["old_per_token_logps"] = self._logps_of_all_ranks(whole)
        return whole

    @torch.no_grad()
    def _logps(self, batch: Minibatch, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """Return the present log-probabilities [n, C] of the scored tokens of a minibatch's `sequences`, on the CPU."""
        logps = torch.zeros_like(batch.tensors["sampling_per_token_logps"])
        for pack in self._passes(sequences):
            rows, columns = batch.places(sequences, pack)
            logps[torch.tensor(pack.members)[rows], columns] = self._scorer.score(pack).logps.cpu()
        return logps

    def _logps_of_all_ranks(self, batch: Minibatch) -> torch.Tensor:
        """Return the present log-probabilities [n, C] of the episodes that run, of which each rank scores its share."""
        logps = self._logps(batch, self._own_share(batch))
        self._ranks.add_up([logps])
        return logps

    @contextmanager
    def _untrained(self, of_adapted: Callable[[Any], AbstractContextManager[Any]]) -> Iterator[None]:
        """Score with the reference meanwhile, or with the model as `of_adapted` has it if it is one with an adapter."""
        if self._reference is None:
            with of_adapted(self.accelerator.unwrap_model(self.model)):
                yield
            return
        scorer, self._scorer = self._scorer, self._reference
        try:
            yield
        finally:
            self._scorer = scorer

    def _proves_weights(self, batch: Minibatch, newest: torch.Tensor) -> bool:
        """Return whether some of the episodes that the `newest` weights sampled show that the engines use these weights.

        Raises:
            WeightsNotUsed: if they show that the engines do not.
        """
        some = torch.nonzero(batch.runs & newest).flatten()[:_PROVING_EPISODES]
        if not len(some):
            return False
        few = batch.some(some)
        sequences, sampled = few.sequences(), few.tensors["sampling_per_token_logps"][few.own]
        trained = self._logps(few, sequences)[few.own]
        if self._reference is None and not is_adapted(self.accelerator.unwrap_model(self.model)):
            require_agreement(sampled, trained, torch.bfloat16 if self.args.bf16 else torch.float32)
            return False
        with self._untrained(lambda policy: policy.disable_adapter()):
            untrained = self._logps(few, sequences)[few.own]
        return Evidence.of(sampled, trained, untrained).proves_use()

    def _own_share(self, batch: Minibatch) -> list[TokenSequence]:
        """Return the episodes of a minibatch, of which those that other ranks run have no scored token."""
        sequences = batch.sequences()
        if self._ranks.size == 1:
            return sequences
        tokens = [len(sequence.inputs) for sequence in sequences]
        mine = set(share_out(tokens, self._updates.group_size, self._ranks.size)[self._ranks.rank])
        return [s if row in mine else s.without_scores() for row, s in enumerate(sequences)]

    def backward(self, batch: Minibatch) -> torch.Tensor:
        """Add the gradients of a minibatch's loss to the model's, and return the loss."""
        sequences, trained = self._own_share(batch), 0
        if self._additions.llds_weight:
            self._observed.add("llds/loss", 0.0, int(self._ranks.rank == 0))
        total = torch.zeros((), device=self.accelerator.device)
        for pack in self._passes(sequences):
            scores = self._scorer.score(pack, entropy="gradients" if self._additions.entropy_bonus else "values")
            loss = self._loss(batch, pack.members, batch.places(sequences, pack), scores)
            self._require_finite("the loss", loss.item())
            self.accelerator.backward(loss)
            total += loss.detach()
            trained += len(pack.members)
            self._on_trained(trained)
        if bool(batch.own.any()):
            # Where nothing ran the gradient is 0, which is no reason for the optimizer's momentum to stand still.
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._add_up(total, parameters)
        return total

    def _passes(self, sequences: Sequence[TokenSequence]) -> Iterator[Pack]:
        """Yield the packs that this process runs the model for."""
        return self._scorer.packs(sequences)

    def _add_up(self, loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace a minibatch's loss and the gradients of what is trained by their sums over the ranks."""
        self._ranks.add_up([loss, *(parameter.grad for parameter in parameters)])

    def _loss(
        self, batch: Minibatch, members: tuple[int, ...], places: tuple[torch.Tensor, torch.Tensor], scores: Scores
    ) -> torch.Tensor:
        """Return the part of the minibatch's loss that some of its episodes have."""
        inputs = batch.rows(members, scores.logps.device)
        own = inputs["tool_mask"].bool()
        zeros = torch.zeros_like(inputs["sampling_per_token_logps"])
        at = tuple(place.to(zeros.device) for place in places)
        logps, entropies = zeros.index_put(at, scores.logps), zeros.index_put(at, scores.entropies)
        old = inputs.get("old_per_token_logps", logps.detach())
        earned = inputs["advantages"]
        if self._kl_coefficient and self._additions.kl_in_reward:
            self._take_off_kl(inputs, old, own)
        self._observe(inputs, earned, logps.detach(), old, entropies.detach(), own)
        if self._additions.importance is not None:
            self._weigh(inputs, old, own)
        # Where TRL asks for log-probabilities it gets these.
        self._scores = logps, entropies
        inputs["num_items_in_batch"] = own.sum()
        with self._metrics_apart():
            loss = super()._compute_loss(self.model, inputs) * share_of_loss(self.loss_type, own, batch)
        self._scores = None
        if self._additions.entropy_bonus:
            loss = loss - self._additions.entropy_bonus * (entropies * own).sum() / batch.own.sum()
        if self._kl_coefficient and not (self.beta or self._additions.kl_in_reward):
            estimates = kl_estimates(logps, inputs["ref_per_token_logps"], self._additions.kl_estimator)
            # TRL weighs its own by these ratios too.
            estimates = (logps.detach() - old).exp() * estimates
            loss = loss + self._kl_coefficient * part_of_mean(
                self.loss_type, estimates * own, own, batch, self.max_completion_length
            )
        if self._additions.llds_weight:
            # Of what an action earned, and not of what corrects it.
            found = displacement(logps, old, earned, own, inputs["turn_index"], self._additions.llds_tolerance)
            term = part_of_mean(self.loss_type, found.penalty, own, batch, self.max_completion_length)
            loss = loss + self._additions.llds_weight * term
            # Counted once for each minibatch.
            self._observed.add("llds/loss", term.item(), 0)
            self._observed.add("llds/actions_fallen_share", int(found.fallen), int(found.actions))
        return loss

    def _take_off_kl(self, inputs: dict[str, torch.Tensor], old: torch.Tensor, own: torch.Tensor) -> None:
        """Take off the advantages in `inputs` what each token is away from the reference before the updates on this batch."""
        estimates = kl_estimates(old, inputs["ref_per_token_logps"], self._additions.kl_estimator)
        penalty = self._kl_coefficient * estimates * own
        inputs["advantages"] = per_token(inputs["advantages"], own) - penalty
        self._observed.add("kl/penalty", float(penalty.sum()), int(own.sum()))

    def _weigh(self, inputs: dict[str, torch.Tensor], old: torch.Tensor, own: torch.Tensor) -> None:
        """Multiply the advantages in `inputs` by importance weights, of the policy before this batch to the sampler's."""
        weights = importance_weights(old, inputs["sampling_per_token_logps"], own, *self._additions.importance)
        inputs["advantages"] = per_token(inputs["advantages"], own) * weights
        chosen = weights[own]
        cut = chosen != (old - inputs["sampling_per_token_logps"])[own].exp()
        self._observed.add("importance/mean", float(chosen.sum()), chosen.numel())
        self._observed.add("importance/cut_share", int(cut.sum()), chosen.numel())

    def _observe(
        self,
        inputs: dict[str, torch.Tensor],
        earned: torch.Tensor,
        logps: torch.Tensor,
        old: torch.Tensor,
        entropies: torch.Tensor,
        own: torch.Tensor,
    ) -> None:
        """Keep for `log` what the log-probabilities and entropies [n, C] of some episodes are at their tokens in `own`.

        `earned` are their advantages [n] or [n, C] as the estimator gave them.
        """
        tokens = int(own.sum())
        largest = self._observed.see_sampler(old - inputs["sampling_per_token_logps"], earned, own)
        self._require_finite("the difference between a token's log-probabilities in trainer and sampler", largest)
        self._observed.see_update(
            logps - old,
            inputs["advantages"],
            own,
            loss=self.loss_type,
            by_episode=self.importance_sampling_level == "sequence",
            low=self.epsilon_low,
            high=self.epsilon_high,
        )
        self._observed.add("entropy", float(entropies[own].sum()), tokens)
        if self._kl_coefficient:
            # Whatever acts, this one is never below 0 and varies least.
            estimates = kl_estimates(logps[own], inputs["ref_per_token_logps"][own], "k3")
            self._observed.add("kl", float(estimates.sum()), tokens)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, **unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        # TRL asks for them in its loss; they are those of the pack at hand.
        return (*self._scores, None)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the last step that was taken, as the schedule of checkpoints would."""
        self._save_checkpoint(self.model, trial=None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with new_checkpoint(Path(self.args.output_dir), self.batches, self._keep, self._best()) as self._aside:
            super()._save_checkpoint(model, trial)
        self._aside = None

    def _get_output_dir(self, trial: Any) -> str:
        return self.args.output_dir if self._aside is None else str(self._aside)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The reference of the KL term is what training begins with, which a resumed run makes again.
        save_policy(self.accelerator.unwrap_model(self.model), Path(output_dir), self.weights)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_policy(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

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
                f"step {self.batches + 1}: {what} is {value}; the optimizer did not take this step, and the "
                f"weights are still those of the step before: {advice}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to TRL's metrics those of `Observations.logs` and the seconds that the updates took."""
        if "loss" in logs:
            observed, self._observed = self._ranks.gathered(self._observed), Observations()
            logs |= Observations.together(observed).logs() | {"seconds/train": self._seconds}
            self._seconds = 0.0
        super().log(logs, start_time)

    @contextmanager
    def _metrics_apart(self) -> Iterator[None]:
        """Drop the metrics that TRL's loss appends meanwhile: means over packs, which are not of one size."""
        kept, self._metrics = self._metrics, defaultdict(lambda: defaultdict(list))
        try:
            yield
        finally:
            self._metrics = kept


def _never_called(**unused: Any) -> list[float]:
    raise RuntimeError("TRL called its reward function, but agentrl scores rewards where the episodes run")
