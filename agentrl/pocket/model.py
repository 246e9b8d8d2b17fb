"""A small Llama that is born able to copy.

Copying what was read takes two heads that work together: one in the first layer that tells each token what stood before it,
and one in the second that looks for an earlier token with the same predecessor ("induction heads", Olsson et al. 2022, arXiv
2209.11895). A model of this size finds them late or never. Here they are written into the random weights, and training keeps
them (`keep_copying`) until the other layers have learned to use them.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

_LAYERS, _HIDDEN, _HEADS, _HEAD, _MLP = 4, 192, 4, 64, 448
_CONTEXT = 2048
_THETA = 10_000.0

_EMBEDDING = 0.5
"""The scale of embeddings; the final norm scales logits down again."""
_FINAL_NORM = 0.1
_CONSTANT = 0
"""The channel of the hidden state that is the same in every token, for queries that do not depend on the token."""
_BEFORE_SHARPNESS = 2.6
_BEFORE_PAIRS = 5
_MATCH_SHARPNESS = 16.0
_COPY_GAIN = 6.0
_SLOW = 0.02
"""Radians a token below which a rotary pair hardly turns within an episode."""


def make_model(vocabulary: int, end: int, seed: int) -> LlamaForCausalLM:
    """Return a Llama with random weights and the heads that copy; `end` is the id that ends a text and pads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=_HIDDEN,
        intermediate_size=_MLP,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        head_dim=_HEAD,
        max_position_embeddings=_CONTEXT,
        rope_theta=_THETA,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        initializer_range=0.02,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        _write_copying_heads(model, torch.Generator().manual_seed(seed))
    return model


def _write_copying_heads(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    embeddings = model.model.embed_tokens.weight
    embeddings *= _EMBEDDING / model.config.initializer_range
    embeddings[:, _CONSTANT] = 3 * _EMBEDDING
    model.model.norm.weight.fill_(_FINAL_NORM)
    name, before = _directions(generator), _directions(generator)
    _look_at_the_token_before(model, name, before)
    _look_at_what_followed(model, name, before)
    for layer in model.model.layers[2:]:
        # Heads that say what they look at; where to look is learned.
        for head in range(2):
            rows, own = slice(head * _HEAD, (head + 1) * _HEAD), _directions(generator)
            layer.self_attn.v_proj.weight[rows] = own
            layer.self_attn.o_proj.weight[:, rows] = own.T * _EMBEDDING * _COPY_GAIN


def _directions(generator: torch.Generator) -> torch.Tensor:
    """Return [head, hidden] orthonormal rows that leave the constant channel out: a short name for each token."""
    square = torch.linalg.qr(torch.randn(_HIDDEN - 1, _HEAD, generator=generator))[0]
    return torch.cat([torch.zeros(_HEAD, 1), square.T], dim=1)


def _look_at_the_token_before(model: LlamaForCausalLM, name: torch.Tensor, before: torch.Tensor) -> None:
    """Make head 0 of layer 0 write the short name of the token before in the directions `before` [head, hidden]."""
    attention, half = model.model.layers[0].self_attn, _HEAD // 2
    turns = model.model.rotary_emb.inv_freq.float()[:_BEFORE_PAIRS]
    query, key = attention.q_proj.weight, attention.k_proj.weight
    query[:_HEAD], key[:_HEAD] = 0, 0
    # Query and key agree best where the key's rotation lags by one token. Quick pairs alone tell neighbours apart.
    query[:_BEFORE_PAIRS, _CONSTANT] = _BEFORE_SHARPNESS
    key[:_BEFORE_PAIRS, _CONSTANT] = _BEFORE_SHARPNESS * turns.cos()
    key[half : half + _BEFORE_PAIRS, _CONSTANT] = _BEFORE_SHARPNESS * turns.sin()
    attention.v_proj.weight[:_HEAD] = name
    attention.o_proj.weight[:, :_HEAD] = before.T * _EMBEDDING * 2


def _look_at_what_followed(model: LlamaForCausalLM, name: torch.Tensor, before: torch.Tensor) -> None:
    """Make head 0 of layer 1 look at tokens that stood behind the present one, and write their short names."""
    attention, half = model.model.layers[1].self_attn, _HEAD // 2
    slow = [pair for pair, turn in enumerate(model.model.rotary_emb.inv_freq.tolist()) if turn < _SLOW]
    rows = slow + [pair + half for pair in slow]
    query, key = torch.zeros(_HEAD, _HIDDEN), torch.zeros(_HEAD, _HIDDEN)
    query[rows] = name[: len(rows)] * _MATCH_SHARPNESS**0.5 * 2
    key[rows] = before[: len(rows)] * _MATCH_SHARPNESS**0.5 * 2
    attention.q_proj.weight[:_HEAD], attention.k_proj.weight[:_HEAD] = query, key
    attention.v_proj.weight[:_HEAD] = name
    attention.o_proj.weight[:, :_HEAD] = name.T * _EMBEDDING * _COPY_GAIN


def keep_copying(model: LlamaForCausalLM) -> None:
    """Clear the gradients of the two heads that copy: early steps would break them before they are of use."""
    model.model.embed_tokens.weight.grad[:, _CONSTANT] = 0
    for layer in model.model.layers[:2]:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.grad[:_HEAD] = 0
        attention.o_proj.weight.grad[:, :_HEAD] = 0
