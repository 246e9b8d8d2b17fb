"""Muon for the weight matrices of a model and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class MuonAndAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for some parameters and torch.optim.AdamW for others.

    Groups and state of both are its own, so that schedules, checkpoints and whatever sets a rate see one optimizer.
    """

    def __init__(
        self,
        matrices: Sequence[torch.nn.Parameter],
        others: Sequence[torch.nn.Parameter],
        *,
        rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Set up both.

        Args:
            matrices: of two dimensions each, for Muon.
            others: for AdamW.
            rate: the learning rate. Muon's update of a matrix [A, B] is multiplied by 0.2 sqrt(max(A, B)), which gives it
                the root mean square of one of AdamW (arXiv 2502.16982, section 2.2).
            betas, eps: AdamW's.
            weight_decay: of all but the vectors among `others`.
        """
        self._muon = torch.optim.Muon(
            [{"params": list(matrices)}], lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for p in others if p.dim() > 1], "weight_decay": weight_decay},
                {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=rate,
            betas=betas,
            eps=eps,
        )
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Have both work on the groups and the state of this one."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    def step(self, closure: Any = None) -> None:
        """Take the step of both, with the gradients that are there; nothing calls for a `closure`."""
        self._muon.step()
        self._adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Groups and state are then new ones."""
        super().load_state_dict(state_dict)
        self._share()


def make_muon(
    model: torch.nn.Module, *, rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> MuonAndAdamW:
    """Make the optimizer of what is trained of a model of transformers, with an adapter or without.

    Muon gets the matrices, among them both factors of an adapter, of all layers but the embeddings and the output layer:
    the rows of these stand for a token each, and most of them have no gradient in a step. See `MuonAndAdamW` for the rest.
    """
    outer = [model.get_input_embeddings(), model.get_output_embeddings()]
    outer += [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    of_tokens = {id(parameter) for module in outer if module is not None for parameter in module.parameters()}
    matrices, others = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_inner = parameter.dim() == 2 and id(parameter) not in of_tokens
            (matrices if is_inner else others).append(parameter)
    return MuonAndAdamW(matrices, others, rate=rate, betas=betas, eps=eps, weight_decay=weight_decay)
