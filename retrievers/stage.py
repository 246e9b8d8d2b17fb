"""A retriever that stands before another one: what caches, recordings and rerankers share."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self

from retrievers.base import Retriever


class Stage:
    """As an asynchronous context manager it enters and leaves `inner` too."""

    def __init__(self, inner: Retriever) -> None:
        self.inner = inner

    async def __aenter__(self) -> Self:
        if isinstance(self.inner, AbstractAsyncContextManager):
            await self.inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # `inner` first: its searches then fail, one that is stuck included, and what this stage waits for comes to an end.
        try:
            if isinstance(self.inner, AbstractAsyncContextManager):
                await self.inner.__aexit__(kind, error, trace)
        finally:
            await self.leave()

    async def leave(self) -> None:
        """Let go of what this stage itself holds; `inner` is left already."""
        raise NotImplementedError


def innermost(retriever: Any) -> Any:
    """What all stages stand before. A stage has a `read` whether or not that has one."""
    while isinstance(retriever, Stage):
        retriever = retriever.inner
    return retriever
