"""Training of all weights where several processes hold a share of them each, of their gradients and of their moments.

PyTorch's FSDP2 puts a layer together where it is computed and deals its gradients out again, added up. So each process must
make as many passes as any other; those that have fewer episodes compute nothing that counts.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from agentrl.training.policy import read_weights
from agentrl.training.scoring import Pack, TokenSequence
from agentrl.training.trainer import StratifiedTrainer


class ShardedTrainer(StratifiedTrainer):
    """A StratifiedTrainer of a model without an adapter, of which each of `ranks` keeps a share.

    Everything that reads whole weights is collective: all ranks train, save and end together.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Set up training; the arguments are those of `StratifiedTrainer`. Each rank has loaded the whole model."""
        super().__init__(*args, **kwargs)
        self._whole: dict[str, torch.Tensor] = {}
        for scorer in (self._scorer, self._reference):
            if scorer is not None:
                scorer.compute_within(shard(scorer.model))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The whole weights as they were before the present batch, or after the last one, on the CPU of the first rank."""
        return self._whole

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.needs_batch:
            # The first rank is about to publish them.
            self._gather()
        return super().training_step(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        self._gather()
        return result

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_state_dict_post_hook(_put_together)
        optimizer.register_load_state_dict_pre_hook(_deal_out)
        return optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._gather()
        if self._ranks.rank == 0:
            super()._save_checkpoint(model, trial)
        else:
            # What the first rank writes is put together of what all have.
            self.optimizer.state_dict()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        policy = self.accelerator.unwrap_model(model or self.model)
        restore_weights(policy, read_weights(Path(resume_from_checkpoint)))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Each process has computed its part of it.
        whole = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        return super()._get_grad_norm(model, whole)

    def _gather(self) -> None:
        self._whole = whole_weights(self.accelerator.unwrap_model(self.model), keep=self._ranks.rank == 0)

    def _passes(self, sequences: Sequence[TokenSequence]) -> Iterator[Pack]:
        packs = list(super()._passes(sequences))
        most = max(self._ranks.gathered(len(packs)))
        yield from packs
        nothing = TokenSequence(np.zeros(2, dtype=np.int64), np.ones(1, dtype=np.int64))
        for _ in range(most - len(packs)):
            (idle,) = super()._passes([nothing])
            loss = self._scorer.score(idle).logps.sum() * 0
            if loss.requires_grad:
                self.accelerator.backward(loss)

    def _add_up(self, loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> None:
        # The gradients are added up as they are dealt out.
        self._ranks.add_up([loss])


def shard(model: Any) -> Callable[[Callable[[], Any]], Any]:
    """Deal the weights of a model of transformers out to the processes of torch's group.

    Returns:
        What computes with the model: it calls its argument, during which weights are put together where they are needed.
    """
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in (*layers, model):
        # Else the outermost weights stay as a pass without gradients has left them, also after an update.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # Gradients are sums over episodes and not means over processes; a sum is all that gloo knows.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.compute_within = types.MethodType(lambda self, compute: compute(), model)
    register_fsdp_forward_method(model, "compute_within")
    return model.compute_within


def whole_weights(model: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """Put the weights of a sharded model together, one after another; all processes must call this.

    Returns:
        On the CPU, weights that are tied as one tensor; nothing unless `keep`.
    """
    found: dict[str, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            made[id(tensor)] = _whole(tensor.detach(), keep=keep)
        found[name] = made[id(tensor)]
    return found if keep else {}


def restore_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give a sharded model these whole weights, which each process has read; all must call this."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(_share(weights[name], tensor))


def _whole(tensor: torch.Tensor, *, keep: bool = True) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.cpu() if keep else whole.new_empty(0)


def _share(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this process's share of a tensor, dealt out as another one is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def _put_together(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer as one process would have it, so that a checkpoint does not depend on their number."""
    whole = {
        number: {name: _whole(value) if isinstance(value, DTensor) else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": whole}


def _deal_out(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state that `_put_together` has made as this process's share of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {
        number: {
            name: _share(value, parameters[number]) if getattr(value, "dim", int)() else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return state | {"state": shares}
