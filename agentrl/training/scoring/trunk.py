"""The beginning that packs in a row share, computed once for all of them.

A pack behind a trunk runs its other tokens alone, and these look at the trunk's keys and values. What they see is cut off
from the pass that made it: gradients gather there pack after pack, and go back through that pass once, after the last
pack. By the chain rule they are those of packs that run the trunk themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Trunk:
    """Keys and values of each layer, and the last hidden states, of the first tokens of some packs.

    Attributes:
        ids: long [1, P].
        asked: long [A], the tokens whose last hidden states a pack reads, ascending.
        hidden: [1, P, H] in float32, once it is there, with the gradients of the packs.
    """

    def __init__(self, ids: torch.Tensor, asked: torch.Tensor) -> None:
        self.ids, self.asked = ids, asked
        self.hidden: torch.Tensor | None = None
        self._made: list[torch.Tensor] = []
        self._shown: list[torch.Tensor] = []
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._closed = False

    def __len__(self) -> int:
        return self.ids.shape[1]

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take the keys and values [1, K, P, D] that a layer has computed of the trunk."""
        # A layer that is computed again in the backward pass comes a second time, after the end too.
        if not self._closed and layer not in self._layers:
            self._layers[layer] = self._cut(key), self._cut(value)

    def finish(self, hidden: torch.Tensor) -> None:
        """Take the last hidden states [1, P, H]; then the trunk is complete."""
        self.hidden = self._cut(hidden)

    def before(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values [1, K, N, D] of a pack's own tokens behind those of the trunk."""
        keys, values = self._layers[layer]
        return torch.cat([keys.to(key.dtype), key], dim=2), torch.cat([values.to(value.dtype), value], dim=2)

    def require_open(self) -> None:
        """Raise RuntimeError if the gradients of the trunk are done."""
        if self._closed:
            raise RuntimeError("packs are scored and go backward one after another, before the next one is taken")

    def close(self) -> None:
        """Take the gradients that have gathered back through the trunk's pass, and let go of it."""
        self._closed = True
        pairs = [(made, seen.grad) for made, seen in zip(self._made, self._shown, strict=True) if seen.grad is not None]
        self._made, self._shown, self._layers, self.hidden = [], [], {}, None
        if pairs:
            _backward(pairs)

    def _cut(self, made: torch.Tensor) -> torch.Tensor:
        # In bf16 a sum over many packs would lose what each of them adds.
        seen = made.detach().float()
        if made.requires_grad:
            seen.requires_grad_()
            seen.register_hook(self._refuse_late)
            self._made.append(made)
            self._shown.append(seen)
        return seen

    def _refuse_late(self, gradient: torch.Tensor) -> None:
        self.require_open()


def _backward(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    torch.autograd.backward([made for made, _ in pairs], [gradient.to(made.dtype) for made, gradient in pairs])
