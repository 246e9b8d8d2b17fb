"""Pretraining on demonstrations: two processes of one thread each, which is faster here than one process of two."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from agentrl.pocket.demonstrations import Demonstration
from agentrl.pocket.model import keep_copying, make_model
from agentrl.progress import OnProgress, Progress


@dataclass(frozen=True, slots=True)
class Pretraining:
    """How the model is trained.

    Attributes:
        steps: of the optimizers.
        tokens: of a batch in each process, with padding, at most.
        processes: each with one thread.
        matrix_rate: the learning rate of Muon, for all matrices but the embeddings.
        rate: of AdamW, for the rest.
        kept: the share of the steps in which the heads that copy stay as they were born.
        read_weight: what a token of an answer that was read weighs in the loss; 1 for other tokens of the model's own.
        guess_weight: what a token of an answer that was not read weighs.
        environment_weight: what a token of prompt and observations weighs, of which a random `environment_share` counts.
        seed: of weights and order.
    """

    steps: int = 700
    tokens: int = 4096
    processes: int = 2
    matrix_rate: float = 0.008
    rate: float = 0.002
    kept: float = 0.8
    read_weight: float = 2.0
    guess_weight: float = 0.1
    environment_weight: float = 0.3
    environment_share: float = 0.2
    seed: int = 0


_WARMUP = 30
# How long a process waits for another at the start and after each step of seconds.
_PATIENCE = timedelta(minutes=3)
_CONSTANT_SHARE, _LAST_RATE = 0.3, 0.02
_REPORT_EVERY = 10


def pretrain(
    settings: Pretraining,
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    on_progress: OnProgress,
) -> tuple[LlamaForCausalLM, list[float]]:
    """Train a new model and return it with the loss of each step over the model's own tokens, in nats a token.

    This process is the first of `settings.processes`; the others are started here and end here.

    Raises:
        RuntimeError: if one of the others dies, within three minutes.
        ValueError: if there are fewer batches than processes.
    """
    # The processes are on this machine, and nothing outside it may join them.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="agentrl-pretraining-") as scratch:
        store = Path(scratch, "store")
        arguments = (settings, demonstrations, tokenizer, store)
        others = [
            context.Process(target=_train, args=(rank, *arguments), daemon=True)
            for rank in range(1, settings.processes)
        ]
        for process in others:
            process.start()
        try:
            trained = _train(0, *arguments, on_progress=on_progress)
        finally:
            for process in others:
                process.join(timeout=10)
                process.kill()
    return trained


def _train(
    rank: int,
    settings: Pretraining,
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    store: Path,
    on_progress: OnProgress = lambda progress: None,
) -> tuple[LlamaForCausalLM, list[float]]:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=settings.processes, timeout=_PATIENCE
    )
    try:
        model = make_model(len(tokenizer), tokenizer.eos_token_id, settings.seed).train()
        # On CPUs the backward pass of torch's fused attention is slower than matrix products.
        model.set_attn_implementation("eager")
        batches = _Batches(settings, demonstrations, tokenizer).of(rank)
        optimizers = _optimizers(model, settings)
        losses = []
        for step in range(settings.steps):
            if step % _REPORT_EVERY == 0:
                on_progress(Progress(step, "pretraining", step, settings.steps))
            scale = _rate(step, settings.steps)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["full"] * scale
            losses.append(_step(model, next(batches), step < settings.kept * settings.steps, settings.processes))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        on_progress(Progress(settings.steps, "pretraining", settings.steps, settings.steps))
        return model.eval(), losses
    finally:
        dist.destroy_process_group()


def _optimizers(model: LlamaForCausalLM, settings: Pretraining) -> list[torch.optim.Optimizer]:
    embeddings = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not embeddings]
    rest = [p for p in model.parameters() if p.dim() != 2 or p is embeddings]
    return [
        torch.optim.Muon([{"params": matrices, "full": settings.matrix_rate}], weight_decay=0.0),
        torch.optim.AdamW([{"params": rest, "full": settings.rate}], betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _rate(step: int, steps: int) -> float:
    """Return the learning rate's factor: a short warm-up, a while at 1, then down half a cosine."""
    part = (step / steps - _CONSTANT_SHARE) / (1 - _CONSTANT_SHARE)
    down = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * max(0.0, part)))
    return min(1.0, (step + 1) / _WARMUP) * down


def _step(model: LlamaForCausalLM, batch: _Batch, keep: bool, processes: int) -> float:
    """Leave the mean gradient over all processes in the weights, and return this one's loss over the model's own tokens."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state[:, :-1]
        # Logits are most of the work, and most tokens have no weight.
        weights, targets = batch.weights[:, 1:], batch.token_ids[:, 1:]
        counted = weights > 0
        logits = model.lm_head(hidden[counted])
    losses, weights = cross_entropy(logits.float(), targets[counted], reduction="none"), weights[counted]
    ((losses * weights).sum() / weights.sum()).backward()
    if keep:
        keep_copying(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    own = batch.own[:, 1:][counted]
    return losses[own].mean().item()


@dataclass(frozen=True, slots=True)
class _Batch:
    """Episodes [B, T], padded on the right; `weights` is 0 at padding and at tokens that are not predicted."""

    token_ids: torch.Tensor
    weights: torch.Tensor
    own: torch.Tensor


class _Batches:
    """Endless batches of episodes of like length; every process draws the same ones and takes its own of them."""

    def __init__(
        self, settings: Pretraining, demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._settings, self._demonstrations = settings, demonstrations
        self._pad = tokenizer.eos_token_id
        self._opening = tokenizer.convert_tokens_to_ids("<answer>")

    def of(self, rank: int) -> Iterator[_Batch]:
        order = random.Random(self._settings.seed)
        masks = torch.Generator().manual_seed(self._settings.seed * self._settings.processes + rank)
        while True:
            drawn = self._epoch(order)
            # All processes take equally many, since they wait for each other after each.
            whole = len(drawn) - len(drawn) % self._settings.processes
            if not whole:
                raise ValueError(
                    f"{len(self._demonstrations)} demonstrations make {len(drawn)} batch(es) of {self._settings.tokens} "
                    f"tokens, too few for {self._settings.processes} processes"
                )
            for batch in drawn[rank : whole : self._settings.processes]:
                yield self._laid_out(batch, masks)

    def _epoch(self, order: random.Random) -> list[list[Demonstration]]:
        # A little noise in the lengths makes batches of other episodes in each epoch.
        ranked = sorted(self._demonstrations, key=lambda d: len(d.token_ids) + order.random() * 8)
        batches: list[list[Demonstration]] = [[]]
        for demonstration in ranked:
            if batches[-1] and (len(batches[-1]) + 1) * len(demonstration.token_ids) > self._settings.tokens:
                batches.append([])
            batches[-1].append(demonstration)
        order.shuffle(batches)
        return batches

    def _laid_out(self, batch: Sequence[Demonstration], masks: torch.Generator) -> _Batch:
        length = max(len(d.token_ids) for d in batch)
        token_ids = torch.full((len(batch), length), self._pad)
        weights, owned = torch.zeros(len(batch), length), torch.zeros(len(batch), length, dtype=torch.bool)
        settings = self._settings
        for row, demonstration in enumerate(batch):
            size = len(demonstration.token_ids)
            own = torch.tensor(demonstration.own)
            token_ids[row, :size] = torch.tensor(demonstration.token_ids)
            owned[row, :size] = own
            drawn = (torch.rand(size, generator=masks) < settings.environment_share) * settings.environment_weight
            weights[row, :size] = torch.where(own, 1.0, drawn)
            answer = slice(demonstration.token_ids.index(self._opening) + 1, size - 1)
            weights[row, answer] = settings.guess_weight if demonstration.guessed else settings.read_weight
        return _Batch(token_ids, weights, owned)


@torch.no_grad()
def score(
    model: LlamaForCausalLM, demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Return the share of queries, and of answers that were read, whose every token is the likeliest after the true ones.

    The keys are "HOPS hops, STRUCTURE: query N" and "HOPS hops, STRUCTURE: answer".
    """
    tags = {kind: tokenizer.convert_tokens_to_ids([f"<{kind}>", f"▁</{kind}>"]) for kind in ("search", "answer")}
    right: dict[str, list[bool]] = defaultdict(list)
    for demonstration in demonstrations:
        ids = demonstration.token_ids
        likeliest = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
        searches = 0
        for begin, (token, own) in enumerate(zip(ids, demonstration.own, strict=True)):
            kind = next((kind for kind, (opening, _) in tags.items() if own and token == opening), None)
            if kind is None or (kind == "answer" and demonstration.guessed):
                continue
            end = ids.index(tags[kind][1], begin)
            searches += kind == "search"
            name = f"{demonstration.hops} hops, {demonstration.structure}: " + (
                f"query {searches}" if kind == "search" else "answer"
            )
            right[name].append(likeliest[begin : end - 1] == ids[begin + 1 : end])
    return {name: round(sum(values) / len(values), 3) for name, values in sorted(right.items())}
