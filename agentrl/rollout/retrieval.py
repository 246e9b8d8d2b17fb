"""A retriever that lives in a Ray actor, seen as a `Retriever` with a deadline and retries."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError

from agentrl.config import RetrieverConfig
from retrievers.base import Hit, RetrieverError


class ActorRetriever:
    """Calls `search` of a Ray actor. A dead actor that Ray restarts is found again by the next attempt."""

    def __init__(self, actor: Any, settings: RetrieverConfig) -> None:
        self._actor = actor
        self._timeout = settings.timeout_seconds
        self._attempts = settings.retries + 1

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`. Raises RetrieverError after the last attempt."""
        problem = ""
        for attempt in range(self._attempts):
            if attempt:
                await asyncio.sleep(min(5.0, 0.2 * 2**attempt) * random.uniform(0.5, 1.5))
            try:
                return await asyncio.wait_for(self._actor.search.remote(list(queries), k), self._timeout)
            except TimeoutError:
                problem = f"no answer within {self._timeout:g} s"
            except RayActorError as error:
                problem = f"its process died ({error.__class__.__name__})"
            except RetrieverError as error:
                problem = str(error)
        raise RetrieverError(f"the retriever failed {self._attempts} times: {problem}")
