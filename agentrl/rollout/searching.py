"""From the section `retriever` of a config to what an agent searches: Ray actors for indexes, and the stages above them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from agentrl.config import Config, ConfigError, DataConfig, IndexConfig, RetrieverConfig
from agentrl.registry import look_up
from agentrl.rollout.retrieval import ActorRetriever
from retrievers.base import Retriever
from retrievers.cache import CachedRetriever, RecordingRetriever, ReplayRetriever
from retrievers.hybrid import HybridRetriever
from retrievers.opening import check_one_corpus, identify_index, identify_reranker, index_folder, retriever_class
from retrievers.remote import HttpRetriever
from retrievers.wire import load_format


def index_actor(config: Config, index: IndexConfig, name: str) -> Any:
    """Start a Ray actor that searches an index, with a name for `ray.get_actor`; it comes back when it dies.

    Raises:
        RetrieverError: if the folder is no sound index.
    """
    import ray

    folder = index_folder(config.data.resolve_index(index.index))
    return (
        ray.remote(retriever_class(folder))
        .options(name=name, num_cpus=1, num_gpus=config.retriever.gpus, max_restarts=-1, max_concurrency=1000)
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
        from retrievers.rerank import CrossEncoder, RerankingRetriever

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
