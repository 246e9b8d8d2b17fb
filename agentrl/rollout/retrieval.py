"""A retriever that lives in a Ray actor, seen as a `Retriever` with a deadline and retries."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError

from agentrl.config import RetrieverConfig
from retrievers.base import Hit, RetrieverError
from retrievers.breaker import CircuitBreaker


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why an attempt has no answer."""

    what: str


class ActorRetriever:
    """Calls `search` of a Ray actor, behind a circuit breaker. A dead actor, which Ray restarts, is found again."""

    def __init__(self, actor: Any, settings: RetrieverConfig) -> None:
        self._actor = actor
        self._timeout = settings.timeout_seconds
        self._attempts = settings.retries + 1
        self._breaker = CircuitBreaker("the retriever")

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`. Raises RetrieverError after the last attempt."""
        return await self._try(lambda: self._actor.search.remote(list(queries), k))

    async def read(self, document_id: str) -> Hit | None:
        """See `LuceneRetriever.read`. Raises RetrieverError after the last attempt."""
        return await self._try(lambda: self._actor.read.remote(document_id))

    async def _try(self, call: Callable[[], Any]) -> Any:
        outcome: Any = None
        for attempt in range(self._attempts):
            if attempt:
                await asyncio.sleep(min(5.0, 0.2 * 2**attempt) * random.uniform(0.5, 1.5))
            outcome = await self._breaker.run(lambda: self._ask(call), lambda o: isinstance(o, _Problem))
            if not isinstance(outcome, _Problem):
                return outcome
        raise RetrieverError(f"the retriever failed {self._attempts} times: {outcome.what}")

    async def _ask(self, call: Callable[[], Any]) -> Any:
        """Return the answer of one attempt, or why there is none."""
        try:
            return await asyncio.wait_for(call(), self._timeout)
        except TimeoutError:
            return _Problem(f"no answer within {self._timeout:g} s")
        except RayActorError as error:
            return _Problem(await self._restarted(error))
        except RetrieverError as error:
            return _Problem(str(error))

    async def _restarted(self, error: RayActorError) -> str:
        """Wait until Ray has made the actor anew, so that the next attempt is not spent on its start."""
        try:
            await asyncio.wait_for(self._actor.ping.remote(), self._timeout)
        except (TimeoutError, RayActorError, RetrieverError):
            return f"its process died ({error.__class__.__name__}) and is not back"
        return f"its process died ({error.__class__.__name__})"
