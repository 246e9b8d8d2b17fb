"""What vLLM's worker does slowly on a CPU, done faster: LoRA products, and the drawing of seeded ids.

vLLM's own LoRA kernel gathers both matrices of every layer once for every token, so each token copies the whole adapter
(20 MB in fp32 at rank 16 for a model of 135M parameters) and memory bandwidth decides. Almost always all tokens of a step
use one adapter; here each adapter's matrices are read once for all of its tokens. For an adapter without weights for the
embedding, vLLM multiplies zeros; here nothing. And vLLM's kernel of a decoding step gives a row without an adapter what the
last adapter would add.

vLLM's own sampler draws a random number for each id of the vocabulary, and for a seeded row a second time. See
`agentrl.engines.drawing` for what is drawn here.

And where an output layer shares the embedding's weights, vLLM computes with the old ones after it has loaded others.

vLLM imports this module in the process of its worker, where `CpuExtension` is named as `worker_extension_cls`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

from agentrl.engines.drawing import draw
from agentrl.engines.vllm_worker import Extension

_Groups = list[tuple[int, torch.Tensor | None]]


class CpuExtension(Extension):
    """Being named makes vLLM import this module before it builds LoRA layers and sampler."""

    def pack_tied_heads(self: Any) -> None:
        """Pack the weights of output layers anew, which vLLM does when a layer has weights of its own to load."""
        for layer in self.model_runner.model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


def _groups(indices: torch.Tensor) -> _Groups:
    """Return (adapter slot, rows that use it) for each slot in use; rows None stands for all, slot -1 for no adapter."""
    slots = torch.unique(indices).tolist()
    if len(slots) == 1:
        return [(slots[0], None)] if slots[0] >= 0 else []
    return [(slot, torch.nonzero(indices == slot).squeeze(1)) for slot in slots if slot >= 0]


def _add(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, groups: _Groups) -> None:
    """y += scale * (x Aᵀ) Bᵀ with each row's own A [slots, 1, rank, in] and B [slots, 1, out, rank], in place."""
    for slot, rows in groups:
        a_slot, b_slot = a[slot].flatten(0, -2), b[slot].flatten(0, -2)
        if rows is None:
            y.addmm_(scale * (x @ a_slot.T), b_slot.T)
        else:
            y.index_add_(0, rows, scale * (x[rows] @ a_slot.T) @ b_slot.T)


def _update_metadata(self: Any, *args: Any, **kwargs: Any) -> None:
    _original_update_metadata(self, *args, **kwargs)
    self.token_groups = _groups(self.token_lora_indices)
    self.sampler_groups = _groups(self.sampler_indices)


def _add_lora_linear(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **unused: Any,
) -> None:
    start = 0
    for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
        _add(y[:, start : start + size], x, a, b, scale, self.token_groups)
        start += size


def _add_lora_logits(
    self: Any, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, **unused: Any
) -> None:
    # Logits can be padded beyond the vocabulary that the adapter knows.
    _add(y.view(-1, y.shape[-1])[:, : b.shape[-2]], x.view(-1, x.shape[-1]), a, b, scale, self.sampler_groups)


def _add_lora_embedding(
    self: Any, y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any
) -> None:
    # x is what each row's own A gave.
    for slot, rows in self.token_groups:
        b_slot = b[slot].flatten(0, -2)
        if not b_slot.any():
            continue
        if rows is None:
            y.addmm_(x, b_slot.T)
        else:
            y.index_add_(0, rows, x[rows] @ b_slot.T)


def _sample(
    self: Any,
    logits: torch.Tensor,
    generators: dict[int, torch.Generator],
    k: torch.Tensor | None,
    p: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (ids [rows], log-probabilities [rows, vocabulary]) of logits at the sampling temperature; see `VllmEngine`."""
    if self.logprobs_mode != "processed_logprobs":
        return _original_sample(self, logits, generators, k, p)
    logits = apply_top_k_top_p(logits, k, p)
    return draw(logits.softmax(-1, torch.float32), generators), logits.log_softmax(-1, torch.float32)


_original_update_metadata = PunicaWrapperCPU.update_metadata
_original_add_lora_embedding = PunicaWrapperCPU.add_lora_embedding
_original_sample = TopKTopPSampler.forward_cpu
PunicaWrapperCPU.update_metadata = _update_metadata
PunicaWrapperCPU.add_lora_embedding = _add_lora_embedding
PunicaWrapperCPU.add_lora_logits = _add_lora_logits
PunicaWrapperCPU.add_lora_linear = _add_lora_linear
TopKTopPSampler.forward_cpu = _sample
