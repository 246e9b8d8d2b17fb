"""A retriever that lives in a Ray actor, seen as a `Retriever` with a deadline and retries."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError

from agentrl.config import RetrieverConfig
from retrievers.base import Hit, RetrieverError
from retrievers.breaker import CircuitBreaker


class ActorRetriever:
    """Calls `search` of a Ray actor, behind a circuit breaker. A dead actor, which Ray restarts, is found again."""

    def __init__(self, actor: Any, settings: RetrieverConfig) -> None:
        self._actor = actor
        self._timeout = settings.timeout_seconds
        self._attempts = settings.retries + 1
        self._breaker = CircuitBreaker()

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`. Raises RetrieverError after the last attempt."""
        outcome: list[list[Hit]] | str = ""
        for attempt in range(self._attempts):
            if attempt:
                await asyncio.sleep(min(5.0, 0.2 * 2**attempt) * random.uniform(0.5, 1.5))
            outcome = await self._breaker.run(lambda: self._ask(list(queries), k), lambda o: isinstance(o, str))
            if not isinstance(outcome, str):
                return outcome
        raise RetrieverError(f"the retriever failed {self._attempts} times: {outcome}")

    async def _ask(self, queries: list[str], k: int) -> list[list[Hit]] | str:
        """Return the answer of one attempt, or why there is none."""
        try:
            return await asyncio.wait_for(self._actor.search.remote(queries, k), self._timeout)
        except TimeoutError:
            return f"no answer within {self._timeout:g} s"
        except RayActorError as error:
            return await self._restarted(error)
        except RetrieverError as error:
            return str(error)

    async def _restarted(self, error: RayActorError) -> str:
        """Wait until Ray has made the actor anew, so that the next attempt is not spent on its start."""
        try:
            await asyncio.wait_for(self._actor.ping.remote(), self._timeout)
        except (TimeoutError, RayActorError, RetrieverError):
            return f"its process died ({error.__class__.__name__}) and is not back"
        return f"its process died ({error.__class__.__name__})"
