"""Ray Train's set-up of torch, with each process shown its own cards alone."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class _OwnCards(_TorchBackend):
    # transformers takes the first card that it sees, and Ray Train shows every process those of all on its machine.
    share_cuda_visible_devices = False


class OwnCards(TorchConfig):
    """A TorchConfig whose processes see in CUDA_VISIBLE_DEVICES what Ray gave each, and nothing else."""

    @property
    def backend_cls(self) -> Any:
        return _OwnCards
