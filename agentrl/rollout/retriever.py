"""From the section `retriever` of a config to what an agent searches: Ray actors for indexes, and the stages above them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from agentrl.config import Config, ConfigError, DataConfig, IndexConfig, RetrieverConfig
from agentrl.registry import look_up
from agentrl.runs.logs import process_name
from retrievers.backends import has_encoder, identify_search, index_folder, retriever_class
from retrievers.base import Hit, Retriever, RetrieverError
from retrievers.clients.remote import HttpRetriever
from retrievers.clients.retrying import AttemptFailed, Retrying
from retrievers.clients.wire import load_format
from retrievers.secrets import from_environment, public_url
from retrievers.stages.cache import CachedRetriever, RecordingRetriever, ReplayRetriever
from retrievers.stages.hybrid import HybridRetriever

_log = logging.getLogger(__name__)


def index_actor(config: Config, index: IndexConfig, name: str) -> Any:
    """Start a Ray actor that searches an index, with a name for `ray.get_actor`; it comes back when it dies.

    Raises:
        RetrieverError: if the folder is no sound index.
    """
    folder = index_folder(config.data.resolve_index(index.index))
    options = index_options(config, index)
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
        .remote(str(folder.absolute()), **options)
    )


def index_options(config: Config, index: IndexConfig) -> dict[str, Any]:
    """Return the options of an index with the device on which its encoder computes, if it has one.

    Ray shows every card to processes that asked for none, and an encoder would take memory of an engine's or the trainer's.

    Raises:
        ConfigError: if the options name a card and the index gets none.
        RetrieverError: if the folder is no sound index.
    """
    options = dict(index.options)
    if not has_encoder(index_folder(config.data.resolve_index(index.index))):
        return options
    device = options.setdefault("device", "cuda" if config.retriever.gpus else "cpu")
    if str(device).startswith("cuda") and not config.retriever.gpus:
        raise ConfigError(
            f"retriever: index {index.index} has the option device {device}, and retriever.gpus is 0; set retriever.gpus to "
            "the card or the share of one that its encoder may use, or device to cpu"
        )
    return options


def make_retriever(settings: RetrieverConfig, data: DataConfig, identity: str, actors: Sequence[Any]) -> Retriever:
    """Make what an agent searches, in the process of the agent.

    Args:
        identity: as `retriever_identity` returns it.
        actors: those of `settings.indexes`.

    Raises:
        ConfigError, RetrieverError: if a part cannot be made.
    """
    return retriever_over(settings, data, identity, [ActorRetriever(actor, settings) for actor in actors])


def retriever_over(
    settings: RetrieverConfig, data: DataConfig, identity: str, indexes: Sequence[Retriever]
) -> Retriever:
    """Make what `make_retriever` makes of `indexes`, which search each of `settings.indexes`. Raises as that does."""
    if settings.replay is not None:
        return ReplayRetriever(data.resolve(settings.replay))
    retriever = _source(settings, indexes)
    if settings.rerank is not None:
        # torch is heavy, and only this stage needs it.
        from retrievers.stages.rerank import CrossEncoder, RerankingRetriever

        model = CrossEncoder(settings.rerank.model, device=settings.rerank.device)
        retriever = RerankingRetriever(retriever, model, depth=settings.rerank.depth)
    if settings.cache is not None:
        retriever = CachedRetriever(retriever, data.resolve(settings.cache), identity, settings.cache_mib << 20)
    if settings.record is not None:
        retriever = RecordingRetriever(retriever, data.resolve(settings.record), identity)
    return retriever


def _source(settings: RetrieverConfig, indexes: Sequence[Retriever]) -> Retriever:
    if settings.kind == "object":
        return look_up(settings.target, {}, "retriever.target", ConfigError)(**settings.options)
    if settings.kind == "http":
        return _http_retriever(settings)
    return indexes[0] if len(indexes) == 1 else HybridRetriever(indexes)


def _http_retriever(settings: RetrieverConfig) -> HttpRetriever:
    return HttpRetriever(
        settings.url,
        settings.timeout_seconds,
        settings.retries,
        token=None if settings.token_env is None else from_environment(settings.token_env, "retriever.token_env"),
        wire=None if settings.wire is None else load_format(settings.wire),
    )


def retriever_identity(settings: RetrieverConfig, data: DataConfig) -> str:
    """Name all that decides what is found, as JSON, so that a cache or recording answers for nothing else.

    Where a server's hits are kept, the server is asked what it searches, once. A server that does not tell is known by its
    URL alone, and a warning says so.

    Raises:
        RetrieverError: if an index or the reranker is missing or damaged, indexes to be fused are of different corpora, or
            the server does not answer.
    """
    indexes = [(data.resolve_index(index.index), index.options) for index in settings.indexes]
    rerank = settings.rerank
    parts = identify_search(indexes, *(() if rerank is None else (rerank.model, rerank.depth)))
    if settings.kind != "index":
        parts |= {"url": settings.url, "wire": settings.wire, "target": settings.target, "options": settings.options}
    if settings.kind == "http" and not (settings.cache is None and settings.record is None):
        parts["server"] = asyncio.run(_describe_server(settings))
    return json.dumps(parts, sort_keys=True)


async def _describe_server(settings: RetrieverConfig) -> dict[str, str]:
    server = _http_retriever(settings)
    try:
        told = await server.describe_index()
    finally:
        await server.close()
    if not told:
        _log.warning(
            "%s does not say which corpus it searches, so hits are kept under its URL alone; "
            "when it searches another corpus, remove what retriever.cache and retriever.record name",
            public_url(settings.url),
        )
    return told


def check_recording(settings: RetrieverConfig) -> None:
    """Refuse to record on several machines, each of which would write a part of the recording to its own disk.

    Raises:
        ConfigError: if there is a recording to be made, and the Ray cluster has more than one machine.
    """
    if settings.record is None:
        return
    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) > 1:
        names = ", ".join(sorted(node["NodeManagerHostname"] for node in alive))
        raise ConfigError(
            f"retriever.record: a recording is one file on one machine, and the Ray cluster has {len(alive)} ({names}), "
            "whose engines would each write their own; record on one machine, or leave retriever.record out"
        )


class ActorRetriever:
    """Searches through a Ray actor; see `Retrying`. A search that nobody waits for any more is cancelled in the actor."""

    def __init__(self, actor: Any, settings: RetrieverConfig) -> None:
        self._actor, self._timeout_seconds = actor, settings.timeout_seconds
        self._retrying = Retrying("the retriever", settings.retries)

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Retriever.search`. Raises RetrieverError if no attempt got an answer."""
        return await self._call(lambda: self._actor.search.remote(list(queries), k))

    async def read(self, document_id: str) -> Hit | None:
        """See `Reader.read`. Raises RetrieverError if no attempt got an answer."""
        return await self._call(lambda: self._actor.read.remote(document_id))

    async def _call(self, start: Callable[[], Any]) -> Any:
        return await self._retrying.call(lambda: self._attempt(start))

    async def _attempt(self, start: Callable[[], Any]) -> Any:
        """The answer of one attempt. Raises AttemptFailed if another one is worth it, else RetrieverError."""
        reference = start()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await reference
        except RetrieverError as error:
            raise AttemptFailed(str(error)) from error
        except RayActorError as error:
            raise AttemptFailed(await self._await_restart(error)) from error
        except RayTaskError as error:
            raise RetrieverError(f"the retriever broke: {error.cause!r}") from error
        except RayError as error:
            raise AttemptFailed(f"{type(error).__name__} {error}") from error
        except TimeoutError as error:
            ray.cancel(reference)
            raise AttemptFailed(f"no answer within {self._timeout_seconds:g} s") from error
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise

    async def _await_restart(self, error: RayActorError) -> str:
        """Wait until Ray has made the actor anew, so that the next attempt is not spent on its start; say what happened."""
        died = f"its process died ({type(error).__name__})"
        try:
            await asyncio.wait_for(self._actor.ping.remote(), self._timeout_seconds)
        except (TimeoutError, RayError, RetrieverError):
            return f"{died} and is not back"
        return died
