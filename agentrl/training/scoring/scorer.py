"""The scoring pass: log-probabilities and entropies at the scored tokens of sequences, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from agentrl.training.scoring.attention import IMPLEMENTATION, Tree
from agentrl.training.scoring.head import Entropy, head_scores
from agentrl.training.scoring.last_layer import only_where_asked
from agentrl.training.scoring.lora import merge_lora
from agentrl.training.scoring.tree import Pack, TokenSequence, pack, pack_behind_trunks
from agentrl.types import AgentRLError

Packing = Literal["prefix_tree", "episodes", "none"]

# How far two ways to compute the same log-probability may differ, in nats.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


class ScoringError(AgentRLError):
    """A model does not compute in packs what it computes of each sequence alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Values at the S scored tokens of a pack, member after member.

    Attributes:
        logps: float32 [S], in nats.
        entropies: float32 [S], in nats, or None.
    """

    logps: torch.Tensor
    entropies: torch.Tensor | None


class Scorer:
    """Scores sequences under a causal language model of transformers, with or without an adapter of PEFT.

    With `prefix_tree`, tokens that sequences of a pack have in common are computed once; with `episodes`, a pack holds them
    side by side; with `none`, each sequence has a pass of its own through the model's own attention and logits, which every
    architecture can do. All three give the same values and gradients up to rounding.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokens: int,
        packing: Packing = "prefix_tree",
        temperature: float = 1.0,
        merge: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Prepare `model` for scoring, and for nothing else: it no longer generates.

        Args:
            model: a PeftModel or a model of transformers.
            tokens: the most tokens of a pack; a longer sequence has a pack of its own.
            packing: see above.
            temperature: logits are divided by it.
            merge: whether LoRA layers compute with merged weights, see `merge_lora`.
            dtype: bfloat16 has matrix products of a model in float32 computed in it; None is the model's own.

        Raises:
            ScoringError: if the model has a layer for logits, or anything else, that packs cannot compute, and `packing` is not
                `none`.
        """
        self.model, self._tokens, self._packing, self._temperature = model, tokens, packing, temperature
        self._within: Callable[[Callable[[], Any]], Any] = lambda compute: compute()
        self._has_trunks = packing == "prefix_tree"
        self._causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._head = self._causal.get_output_embeddings()
        self._dtype = dtype or self._causal.dtype
        if merge:
            merge_lora(model)
        if packing != "none":
            if type(self._head) is not torch.nn.Linear:
                raise ScoringError(
                    f"the layer for logits is a {type(self._head).__name__}, which cannot be computed in chunks; set "
                    "training.packing to none, or target other layers"
                )
            beyond = _beyond_packs(self._causal.config.get_text_config())
            if beyond is not None:
                raise ScoringError(
                    f"{type(self._causal).__name__} has {beyond}, which packs do not compute; set training.packing to none"
                )
            self._attention = self._causal.config._attn_implementation
            self._causal.set_attn_implementation(IMPLEMENTATION)
            only_where_asked(self._causal.base_model)

    def compute_within(self, within: Callable[[Callable[[], Any]], Any]) -> None:
        """Have `within` call what computes a pack: a model that is not all here has its own idea of when its weights are.

        From then on each pack is one pass of the model, and no beginning has a pass of its own.
        """
        self._within, self._has_trunks = within, False

    def packs(self, sequences: Sequence[TokenSequence]) -> Iterator[Pack]:
        """Yield packs that hold every sequence with a scored token once.

        What is to flow back from the scores of a pack must have done so before the next pack is taken: a beginning that
        packs share is computed once, and its gradients come when the last of them is done.
        """
        yield from self._packs(sequences, self._tokens)

    def _packs(self, sequences: Sequence[TokenSequence], tokens: int) -> Iterator[Pack]:
        if self._packing != "none":
            if self._has_trunks:
                yield from pack_behind_trunks(sequences, tokens)
            else:
                yield from pack(sequences, tokens, share=self._packing == "prefix_tree")
            return
        for index, sequence in enumerate(sequences):
            for alone in pack([sequence], tokens):
                yield alone.renumbered(index)

    def score(self, pack: Pack, *, entropy: Entropy = "none") -> Scores:
        """Score the tokens of a pack in one pass of the model."""
        device = next(self._causal.parameters()).device
        with self._precision(device):
            logps, entropies = self._within(lambda: self._predictions(pack, device, entropy))
        places = pack.places.to(device)
        return Scores(logps[places], entropies[places] if entropies is not None else None)

    def _predictions(
        self, pack: Pack, device: torch.device, entropy: Entropy
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return log-probabilities and entropies of the M predictions of a pack."""
        sources, targets = pack.sources.to(device), pack.targets.to(device)
        if self._packing == "none":
            return self._plain(pack, sources, targets, entropy)
        trunk = pack.trunk
        if trunk is not None:
            trunk.require_open()
            if trunk.hidden is None:
                trunk.finish(self._hidden(trunk.ids, torch.arange(len(trunk))[None], Tree.of_trunk(trunk), device))
        own = slice(pack.shared, None)
        hidden = self._hidden(pack.ids[:, own], pack.position_ids[:, own], Tree.of(pack), device)
        if trunk is not None:
            hidden = torch.cat([trunk.hidden.to(hidden.dtype), hidden], dim=1)
        # Here, because what computes without the logits has a backward pass of its own, which knows no autocast.
        bias = None if self._head.bias is None else self._head.bias.to(self._dtype)
        hidden, weight = hidden[0, sources].to(self._dtype), self._head.weight.to(self._dtype)
        return head_scores(hidden, weight, bias, targets, self._temperature, entropy=entropy)

    def _hidden(self, ids: torch.Tensor, position_ids: torch.Tensor, tree: Tree, device: torch.device) -> torch.Tensor:
        """Return the last hidden states [1, N, H] of the tokens of a pass."""
        found = self._causal.base_model(
            input_ids=ids.to(device), position_ids=position_ids.to(device), use_cache=False, tree=tree
        )
        return found.last_hidden_state

    def check(self) -> None:
        """Compare packs with the model's own pass over each of some short sequences.

        Raises:
            ScoringError: if they differ by more than rounding does.
        """
        if self._packing == "none":
            return
        vocabulary = self._head.weight.shape[0]
        # Behind a common beginning, and behind none: as one tree, and as packs that share a trunk, which is worth its pass.
        beginning = list(range(100, 196))
        shapes = ([*beginning, 3, 4, 5], [*beginning, 3, 6, 7, 8], [*beginning, 9], [10, 11, 12, 13])
        rows = [torch.tensor(shape).mul(7919).remainder(vocabulary).numpy() for shape in shapes]
        # Not all of their tokens predict, as in a run.
        sequences = [TokenSequence(row, np.unique([min(8, len(row) - 2), len(row) - 1])) for row in rows]
        training = self.model.training
        self.model.eval()
        try:
            difference = self._difference(sequences)
        except (RuntimeError, AttributeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ScoringError(
                f"{type(self._causal).__name__} cannot be computed in packs ({error}); set training.packing to none"
            ) from error
        finally:
            self.model.train(training)
        if not difference <= _TOLERANCE[self._dtype]:
            raise ScoringError(
                f"{type(self._causal).__name__} does not compute in packs what it computes of each episode alone: "
                f"log-probabilities differ by {difference:.3g} nats; set training.packing to none"
            )

    @torch.no_grad()
    def _difference(self, sequences: Sequence[TokenSequence]) -> float:
        """Return how far packs are from the model's own pass over each sequence, at most, in nats; NaN if they have one."""
        with self._own_attention():
            expected = [self._alone(sequence) for sequence in sequences]
        found = []
        for tokens in (1, 1000):
            for some in self._packs(sequences, tokens):
                found.append(self.score(some).logps - torch.cat([expected[i] for i in some.members]))
        return torch.cat(found).abs().max().item()

    def _alone(self, sequence: TokenSequence) -> torch.Tensor:
        """Return the log-probabilities [S] of a sequence's scored tokens by the model's own pass."""
        (alone,) = pack([sequence], len(sequence.ids))
        device = next(self._causal.parameters()).device
        with self._precision(device):
            logps, _ = self._plain(alone, alone.sources.to(device), alone.targets.to(device), "none")
        return logps[alone.places.to(device)]

    def _plain(
        self, pack: Pack, sources: torch.Tensor, targets: torch.Tensor, entropy: Entropy
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Score one sequence by the logits that the model itself computes, at the M sources alone."""
        # Its option keeps the last ones of them, and a model may scale or cap what its head returns.
        hook = self._head.register_forward_pre_hook(lambda module, hidden: (hidden[0][:, sources],))
        try:
            logits = self.model(input_ids=pack.ids.to(sources.device), use_cache=False).logits[0]
        finally:
            hook.remove()
        log_probabilities = torch.log_softmax(logits.float() / self._temperature, dim=-1)
        logps = log_probabilities.gather(1, targets[:, None]).squeeze(1)
        if entropy == "none":
            return logps, None
        entropies = -(log_probabilities.exp() * log_probabilities).nan_to_num().sum(-1)
        return logps, entropies if entropy == "gradients" else entropies.detach()

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Have weights in fp32, which adapters always are, compute in the precision of the scorer."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        self._causal.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            self._causal.set_attn_implementation(IMPLEMENTATION)


def _beyond_packs(config: Any) -> str | None:
    """Return what of a model's config packs leave out, or None. Short sequences, or coarse numbers, would not show it."""
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1):
            return f"{name} {getattr(config, name)}"
    rope = getattr(config, "rope_parameters", None) or {}
    # Of models with several kinds of layers, each has its own.
    for settings in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        # Their rotation depends on the longest position of a pass, and a pack is another pass than an episode.
        if settings.get("rope_type") in ("longrope", "dynamic"):
            return f"rope_type {settings['rope_type']}"
    return None
