"""Draws token ids from their probabilities, for the transformers engine and for vLLM on a CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Ids in a block. Near the square root of a vocabulary, which gives the fewest random numbers a row.
_BLOCK = 256


def draw(probabilities: torch.Tensor, generators: Mapping[int, torch.Generator]) -> torch.Tensor:
    """Draw one id for each row of `probabilities` [rows, vocabulary] and return the ids [rows].

    Row i uses `generators[i]`, a generator on the CPU, and torch's default one where it has none. What a row draws depends
    on its own probabilities and generator alone. An id of probability 0 is never drawn.

    Among values p / e with one e ~ Exp(1) for each p, the largest falls on an index with probability p / Σp (a race of
    exponential clocks; the Gumbel-max trick is its logarithm). A first race picks a block of the vocabulary by the sums of
    the blocks, a second one the id within that block. A row of V ids so takes about 2 √V random numbers instead of V.

    Inverting the cumulative distribution would take a single number. But rounding, which differs between batches of another
    size, moves all boundaries behind it, and the same seed then gives another id far more often than a race does.
    """
    rows, vocabulary = probabilities.shape
    missing = -vocabulary % _BLOCK
    padded = torch.nn.functional.pad(probabilities, (0, missing)) if missing else probabilities
    blocks = padded.view(rows, -1, _BLOCK)
    count = blocks.shape[1]
    noise = torch.empty(rows, count + _BLOCK)
    if len(generators) < rows:
        noise.exponential_()
    for row, generator in generators.items():
        noise[row].exponential_(generator=generator)
    noise = noise.to(probabilities.device)
    block = (blocks.sum(-1) / noise[:, :count]).argmax(-1)
    within = blocks[torch.arange(rows, device=block.device), block]
    return block * _BLOCK + (within / noise[:, count:]).argmax(-1)
