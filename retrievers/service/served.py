"""The retriever that a service serves: each call has a deadline and is counted, and a failure has an HTTP status."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.exceptions import HTTPException

from retrievers.base import CannotReadError, Hit, Retriever, RetrieverError, clean_text
from retrievers.service.process import RetrieverStartingError
from retrievers.service.prometheus import Metrics
from retrievers.stages.cache import check_search_works

_Result = TypeVar("_Result")

_HEALTH_SECONDS = 1.0


class ServedRetriever:
    """A retriever and its numbers. Each call may take `timeout_seconds`."""

    def __init__(self, retriever: Retriever, timeout_seconds: float) -> None:
        self._retriever, self._timeout_seconds = retriever, timeout_seconds
        self.metrics = Metrics()
        self._checked = -_HEALTH_SECONDS
        self._health: tuple[str, dict[str, str]] = ("starting", {})
        self._check = asyncio.Lock()

    async def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`. Raises HTTPException as `run` does."""
        self.metrics.searched(len(queries))
        rows = await self.run(lambda: self._retriever.search(queries, k))
        if len(rows) != len(queries):
            raise HTTPException(503, f"the retriever gave {len(rows)} lists of hits for {len(queries)} queries")
        return rows

    async def run(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """Return what a call of the retriever returns.

        Raises:
            HTTPException: of status 501 if it has no whole documents, 503 if it failed or starts, 504 if it was too slow.
        """
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await call()
        except CannotReadError as error:
            raise HTTPException(501, str(error)) from error
        except TimeoutError as error:
            self.metrics.failed()
            raise HTTPException(504, f"the retriever took longer than {self._timeout_seconds} s") from error
        except RetrieverError as error:
            self.metrics.failed()
            starting = isinstance(error, RetrieverStartingError)
            raise HTTPException(503, str(error), {"Retry-After": "1"} if starting else None) from error

    async def health(self) -> tuple[str, dict[str, str]]:
        """The status and, where it is not "ok", the reason. It searches once a second at most, since everybody may ask."""
        async with self._check:
            if time.monotonic() - self._checked >= _HEALTH_SECONDS:
                self._health = await self._check_health()
                self._checked = time.monotonic()
            return self._health

    async def _check_health(self) -> tuple[str, dict[str, str]]:
        try:
            await self.run(lambda: check_search_works(self._retriever))
        except HTTPException as failure:
            starting = isinstance(failure.__cause__, RetrieverStartingError)
            return "starting" if starting else "failing", {"detail": clean_text(failure.detail)}
        return "ok", {}
