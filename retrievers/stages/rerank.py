"""Ranks the first hits of a retriever anew with a cross-encoder (Nogueira and Cho 2019, arXiv 1901.04085)."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from retrievers.base import Hit, Retriever, RetrieverError, RetrieverWrapper, check_search, clean_query, read
from retrievers.batching import MicroBatches
from retrievers.models import in_length_order, load_model, load_tokenizer, model_folder, pick_device, weights_sha256

MAX_BATCH = 16
"""Queries whose hits are scored together."""

# Far more than tokens have on average, so that hardly a text loses a token that the model would have read.
_CHARACTERS_A_TOKEN = 16


class CrossEncoder:
    """A model that reads a query and a passage together and says how well they fit. Use it on one thread at a time.

    Attributes:
        sha256: of the weights and the tokenizer.
        device: where it computes.
    """

    def __init__(self, path: str, *, max_tokens: int = 512, batch: int = 32, device: str | None = None) -> None:
        """Load the model.

        Args:
            path: see `retrievers.models.model_folder`. A model with one output scores by it; one with two, by the
                second minus the first.
            max_tokens: of query and passage together; the longer of the two is cut.
            batch: pairs that the model takes at once.
            device: None takes a GPU where there is one.

        Raises:
            RetrieverError: if the model or the device is not there, or an argument does not fit the model.
        """
        folder = model_folder(path)
        self._tokenizer: Any = load_tokenizer(folder)
        self.device = pick_device(device)
        self._model: Any = load_model("AutoModelForSequenceClassification", folder, device=self.device)
        self._torch: Any = importlib.import_module("torch")
        if self._model.config.num_labels not in (1, 2):
            raise RetrieverError(f"cross-encoder {path} has {self._model.config.num_labels} outputs; it needs 1 or 2")
        if max_tokens < 8 or batch < 1:
            raise RetrieverError(f"max_tokens {max_tokens} must be at least 8 and batch {batch} at least 1")
        self._batch = batch
        self._max_tokens = min(max_tokens, self._tokenizer.model_max_length, self._model.config.max_position_embeddings)
        self.sha256 = weights_sha256(folder)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The score of each pair of query and passage; only their order within a query means something."""
        if not pairs:
            return []
        items: list[dict[str, list[int]]] = []
        # A tokenizer needs much memory for texts that it then cuts, so it gets little of them, and few at once.
        for start in range(0, len(pairs), self._batch):
            part = pairs[start : start + self._batch]
            encoded = self._tokenizer(
                [clean_query(query) for query, _ in part],
                [passage[: self._max_tokens * _CHARACTERS_A_TOKEN] for _, passage in part],
                truncation="longest_first",
                max_length=self._max_tokens,
            )
            items += [{name: encoded[name][position] for name in encoded} for position in range(len(part))]
        return in_length_order(
            [len(item["input_ids"]) for item in items],
            self._batch,
            lambda positions: self._compute([items[position] for position in positions]),
        )

    def _compute(self, items: list[dict[str, list[int]]]) -> list[float]:
        torch = self._torch
        inputs = self._tokenizer.pad(items, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            logits_B_L = self._model(**inputs).logits.float()
        return (logits_B_L[:, -1] - (logits_B_L[:, 0] if logits_B_L.shape[1] == 2 else 0)).tolist()


class RerankingRetriever(RetrieverWrapper):
    """Takes the `depth` best hits of another retriever, scores each with a cross-encoder and returns the `k` best.

    A hit's score is the cross-encoder's, which can differ in the last bits with what else is scored at the same time. Ties
    keep the first retriever's order.
    """

    def __init__(self, retriever: Retriever, model: CrossEncoder, *, depth: int = 50) -> None:
        """Remember both; the first retriever stays the caller's to close.

        Raises:
            RetrieverError: if `depth` is invalid.
        """
        if depth < 1:
            raise RetrieverError(f"depth is {depth} and must be at least 1")
        super().__init__(retriever)
        self._model, self._depth = model, depth
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rerank")
        self._batches: MicroBatches[tuple[str, list[Hit]], list[Hit]] = MicroBatches(
            self._thread.submit, self._answer, MAX_BATCH
        )

    async def leave(self) -> None:
        """Stop the worker, which may be in the middle of a batch."""
        await asyncio.to_thread(self.close)

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the `k` best hits of each query, best first, in the order of the queries.

        Raises:
            RetrieverError: if an argument is invalid, or the retriever or the model fails.
        """
        check_search(queries, k)
        found = await self.inner.search(queries, max(self._depth, k))
        ranked = await self._batches.ask(list(zip(queries, found, strict=True)))
        return [hits[:k] for hits in ranked]

    async def read(self, document_id: str) -> Hit | None:
        """Return the whole document as the first retriever knows it. Raises RetrieverError as that does."""
        return await read(self.inner, document_id)

    async def ping(self) -> dict[str, object]:
        """Describe the stage and what the first retriever says. Raises RetrieverError as that does."""
        inner: Any = self.inner
        about = await inner.ping() if hasattr(inner, "ping") else {}
        return {**about, "reranker_sha256": self._model.sha256, "rerank_depth": self._depth}

    def close(self) -> None:
        """Stop the worker once the queries before were answered. Closing twice does nothing."""
        self._thread.shutdown()

    def _answer(self, asks: list[tuple[str, list[Hit]]]) -> list[list[Hit]]:
        """On the worker: the hits of each query in the model's order. Raises RetrieverError if torch fails."""
        pairs = [(query, hit.contents) for query, hits in asks for hit in hits]
        try:
            scores = iter(self._model.score(pairs))
        except (RuntimeError, ValueError, MemoryError) as error:
            raise RetrieverError(f"reranking failed: {error}") from error
        return [
            sorted((replace(hit, score=next(scores)) for hit in hits), key=lambda hit: -hit.score) for _, hits in asks
        ]
