"""A retriever as the HTTP service uses it: with a deadline, counted, its failures turned into refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from retrievers.base import CannotReadError, Hit, Retriever, RetrieverError, clean_text
from retrievers.service.limits import Refusal
from retrievers.service.process import RetrieverStartingError
from retrievers.service.prometheus import Metrics
from retrievers.stages.cache import probe

_Result = TypeVar("_Result")

_HEALTH_SECONDS = 1.0


class Service:
    """One retriever and its numbers. `timeout_seconds` are given to each call."""

    def __init__(self, retriever: Retriever, timeout_seconds: float) -> None:
        self._retriever, self._timeout_seconds = retriever, timeout_seconds
        self.metrics = Metrics()
        self._checked = -_HEALTH_SECONDS
        self._health: tuple[str, dict[str, str]] = ("starting", {})
        self._check = asyncio.Lock()

    async def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """Raises Refusal."""
        self.metrics.searched(len(queries))
        rows = await self.run(lambda: self._retriever.search(queries, k))
        if len(rows) != len(queries):
            raise Refusal(503, f"the retriever gave {len(rows)} lists of hits for {len(queries)} queries")
        return rows

    async def run(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """Raises Refusal."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await call()
        except CannotReadError as error:
            raise Refusal(501, str(error)) from error
        except TimeoutError as error:
            self.metrics.failed()
            raise Refusal(504, f"the retriever took longer than {self._timeout_seconds} s") from error
        except RetrieverError as error:
            self.metrics.failed()
            starting = isinstance(error, RetrieverStartingError)
            raise Refusal(503, str(error), {"Retry-After": "1"} if starting else None) from error

    async def health(self) -> tuple[str, dict[str, str]]:
        """The status and, where it is not "ok", the reason; everybody may ask, so it searches once a second at most."""
        async with self._check:
            if time.monotonic() - self._checked >= _HEALTH_SECONDS:
                self._health = await self._probe()
                self._checked = time.monotonic()
            return self._health

    async def _probe(self) -> tuple[str, dict[str, str]]:
        try:
            await self.run(lambda: probe(self._retriever))
        except Refusal as refusal:
            starting = isinstance(refusal.__cause__, RetrieverStartingError)
            return "starting" if starting else "failing", {"detail": clean_text(refusal.detail)}
        return "ok", {}
