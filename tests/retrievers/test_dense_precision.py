"""Vectors in two bytes a number, and an encoder in half precision, find nearly what float32 finds."""

# The fixtures of another module are arguments of these tests.
# ruff: noqa: F811

import asyncio

import numpy as np
import pytest
from test_dense import WORDS, build, corpus, index, model, retriever, search  # noqa: F401

from retrievers.backends import open_index
from retrievers.base import RetrieverError
from retrievers.dense.encoder import Encoder, EncoderOptions
from retrievers.dense.faiss_index import INDEX_NAME


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gives_nearly_the_same_vectors_and_an_index_finds_the_same_with_it(
    model, index, retriever, dtype
):
    half = Encoder(EncoderOptions(model), device="cpu", dtype=dtype).encode_queries(WORDS[:4])
    whole = Encoder(EncoderOptions(model), device="cpu").encode_queries(WORDS[:4])
    assert half.dtype == np.float32
    assert 0 < np.abs(half - whole).max() < 0.05
    other = open_index(str(index), threads=1, device="cpu", dtype=dtype)
    for exact, near in zip(search(retriever, WORDS[:4], 5), search(other, WORDS[:4], 5), strict=True):
        assert [hit.score for hit in near] == pytest.approx([hit.score for hit in exact], abs=0.05)
    assert asyncio.run(other.ping())["dtype"] == dtype
    other.close()


def test_a_precision_that_does_not_exist_is_refused(model):
    with pytest.raises(RetrieverError, match="dtype is 'half' and must be one of float32, float16, bfloat16"):
        Encoder(EncoderOptions(model), device="cpu", dtype="half")


def test_an_fp16_index_finds_what_a_flat_one_finds_in_half_the_bytes(retriever, model, corpus, tmp_path):
    for kind in ("flat", "fp16"):
        build(corpus, tmp_path / kind, model, kind=kind)
    other = open_index(str(tmp_path / "fp16"), threads=1, device="cpu")
    queries = WORDS[:6]
    for exact, near in zip(search(retriever, queries, 5), search(other, queries, 5), strict=True):
        assert [hit.score for hit in near] == pytest.approx([hit.score for hit in exact], abs=1e-3)
    assert asyncio.run(other.ping())["kind"] == "fp16"
    other.close()
    sizes = {kind: (tmp_path / kind / INDEX_NAME).stat().st_size for kind in ("flat", "fp16")}
    assert sizes["fp16"] < 0.6 * sizes["flat"]
