"""From the section `retriever` of a config to what an agent searches: Ray actors for indexes, and the stages above them."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError

from agentrl.config import Config, ConfigError, DataConfig, IndexConfig, RetrieverConfig
from agentrl.registry import look_up
from agentrl.runs.logs import process_name
from retrievers.backends import check_one_corpus, identify_index, identify_reranker, index_folder, retriever_class
from retrievers.base import Hit, Retriever, RetrieverError
from retrievers.clients.breaker import CircuitBreaker
from retrievers.clients.remote import HttpRetriever
from retrievers.clients.wire import load_format
from retrievers.stages.cache import CachedRetriever, RecordingRetriever, ReplayRetriever
from retrievers.stages.hybrid import HybridRetriever


def index_actor(config: Config, index: IndexConfig, name: str) -> Any:
    """Start a Ray actor that searches an index, with a name for `ray.get_actor`; it comes back when it dies.

    Raises:
        RetrieverError: if the folder is no sound index.
    """
    import ray

    folder = index_folder(config.data.resolve_index(index.index))
    return (
        ray.remote(retriever_class(folder))
        .options(
            name=name,
            num_cpus=1,
            num_gpus=config.retriever.gpus,
            max_restarts=-1,
            max_concurrency=1000,
            runtime_env={"env_vars": process_name(name)},
        )
        .remote(str(folder.absolute()), **index.options)
    )


def make_retriever(settings: RetrieverConfig, data: DataConfig, identity: str, actors: Sequence[Any]) -> Retriever:
    """Make what an agent searches, in the process of the agent.

    Args:
        identity: as `retriever_identity` returns it.
        actors: those of `settings.indexes`.

    Raises:
        ConfigError, RetrieverError: if a part cannot be made.
    """
    if settings.replay is not None:
        return ReplayRetriever(data.resolve(settings.replay))
    retriever = _source(settings, actors)
    if settings.rerank is not None:
        # torch is heavy, and only this stage needs it.
        from retrievers.stages.rerank import CrossEncoder, RerankingRetriever

        retriever = RerankingRetriever(retriever, CrossEncoder(settings.rerank.model), depth=settings.rerank.depth)
    if settings.cache is not None:
        retriever = CachedRetriever(retriever, data.resolve(settings.cache), identity, settings.cache_mib << 20)
    if settings.record is not None:
        retriever = RecordingRetriever(retriever, data.resolve(settings.record), identity)
    return retriever


def _source(settings: RetrieverConfig, actors: Sequence[Any]) -> Retriever:
    if settings.kind == "object":
        return look_up(settings.target, {}, "retriever.target", ConfigError)(**settings.options)
    if settings.kind == "http":
        return HttpRetriever(
            settings.url,
            settings.timeout_seconds,
            settings.retries,
            token=_token(settings),
            wire=None if settings.wire is None else load_format(settings.wire),
        )
    parts = [ActorRetriever(actor, settings) for actor in actors]
    return parts[0] if len(parts) == 1 else HybridRetriever(parts)


def _token(settings: RetrieverConfig) -> str | None:
    if settings.token_env is None:
        return None
    token = os.environ.get(settings.token_env)
    if not token:
        raise ConfigError(f"retriever.token_env: the environment has no {settings.token_env}; set it to the token")
    return token


def retriever_identity(settings: RetrieverConfig, data: DataConfig) -> str:
    """Name all that decides what is found, as JSON: what is cached or recorded under one name is never given for another.

    Raises:
        RetrieverError: if an index or the reranker is missing or damaged, or indexes to be fused are of different corpora.
    """
    parts: dict[str, Any] = {}
    sources = [data.resolve_index(index.index) for index in settings.indexes]
    check_one_corpus(sources)
    for number, (source, index) in enumerate(zip(sources, settings.indexes, strict=True)):
        parts[f"index {number}"] = identify_index(source, index.options)
    if settings.kind != "index":
        parts |= {"url": settings.url, "wire": settings.wire, "target": settings.target, "options": settings.options}
    if settings.rerank is not None:
        parts["rerank"] = identify_reranker(settings.rerank.model, settings.rerank.depth)
    return json.dumps(parts, sort_keys=True)


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
