"""`agentrl index` and `agentrl serve-retriever`: from a corpus to an index, to hits, to a service."""

from __future__ import annotations

import asyncio
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agentrl.config import ConfigError
from agentrl.config.yaml12 import parse_value
from retrievers.backends import (
    build_index,
    check_one_corpus,
    check_options,
    describe_index,
    identify_index,
    identify_reranker,
    index_folder,
    open_stages,
)
from retrievers.base import Hit
from retrievers.index.manifest import Manifest

_SHOWN_CHARACTERS = 400


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Read `name=value` options, whose values are YAML.

    Raises:
        ConfigError: if one is written otherwise.
    """
    options: dict[str, Any] = {}
    for item in given:
        name, separator, value = item.partition("=")
        if not separator or not name:
            raise ConfigError(f"option {item!r}: write it as name=value, such as k1=1.2")
        try:
            options[name] = parse_value(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"option {item!r}: the value is not valid YAML: {error}") from error
    return options


def build(corpus: Path, out: Path, kind: str, console: Console, **options: Any) -> Manifest:
    """Build an index, showing its progress; see `retrievers.backends.build_index`.

    Raises:
        RetrieverError: as `build_index`.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    work = "indexing passages" if kind == "lucene" else "encoding passages"
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        task = bars.add_task("checking passages", total=None)

        def on_progress(done: int, total: int | None) -> None:
            description = "checking passages" if total is None else work
            bars.update(task, completed=done, total=total, description=description)

        return build_index(corpus, out, kind, on_progress=on_progress, **options)


def inspection(folder: Path) -> Table:
    """Describe an index as a table.

    Raises:
        RetrieverError: if the folder is no sound index.
    """
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    for name, value in describe_index(folder).items():
        rows.add_row(name, Text(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)))
    return rows


def sources(indexes: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of `open_stages`: the options go to the first index.

    Raises:
        RetrieverError: if an index is missing or damaged, does not take the options, or is of another corpus than others.
    """
    for number, index in enumerate(indexes):
        check_options(index_folder(index), {} if number else options)
    check_one_corpus(indexes)
    return [{"source": index, **({} if number else options)} for number, index in enumerate(indexes)]


def search(
    indexes: Sequence[str], queries: Sequence[str], k: int, options: Mapping[str, Any], rerank: str | None
) -> Group:
    """Search and return the hits as a person reads them.

    Raises:
        RetrieverError: if an index cannot be opened or searched.
    """
    retriever = open_stages(sources(indexes, options), rerank)
    rows = asyncio.run(retriever.search(queries, k))
    retriever.close()
    parts: list[Any] = []
    for query, hits in zip(queries, rows, strict=True):
        parts += [Text(query, style="bold"), *(_hit(rank, hit) for rank, hit in enumerate(hits, 1))]
        if not hits:
            parts.append(Text("  nothing was found", style="dim"))
    return Group(*parts)


def _hit(rank: int, hit: Hit) -> Padding:
    head = Text.assemble((f"{rank}. ", "bold"), hit.title or hit.id, (f"  {hit.score:.4f}  {hit.id}", "dim"))
    text = Text(textwrap.shorten(" ".join(hit.text.split()), _SHOWN_CHARACTERS, placeholder=" …"))
    return Padding(Group(head, text), (0, 0, 0, 2))


def serve(
    indexes: Sequence[str],
    options: Mapping[str, Any],
    console: Console,
    *,
    rerank: str | None,
    cache: Path | None,
    host: str,
    port: int,
    k: int,
    token_env: str | None,
    log_requests: bool,
) -> None:
    """Serve indexes over HTTP until interrupted. What searches has a process of its own, and comes back when it dies.

    Raises:
        ConfigError: if the token is not in the environment.
        RetrieverError: if an index cannot be opened, or nothing can listen there.
    """
    from retrievers.base import Retriever
    from retrievers.service.process import ProcessRetriever
    from retrievers.service.server import make_app
    from retrievers.service.server import serve as run
    from retrievers.stages.cache import CachedRetriever

    token = None if token_env is None else os.environ.get(token_env)
    if token_env is not None and not token:
        raise ConfigError(f"--token-env {token_env}: the environment has no such variable; set it to the token")
    about = [describe_index(index_folder(index)) for index in indexes]
    plan = {"indexes": sources(indexes, options), "rerank": rerank}
    retriever: Retriever = ProcessRetriever("retrievers.backends:open_stages", plan)
    if cache is not None:
        parts = [identify_index(index, {} if number else options) for number, index in enumerate(indexes)]
        ranked = None if rerank is None else identify_reranker(rerank)
        retriever = CachedRetriever(retriever, cache, json.dumps([parts, ranked], sort_keys=True))
    shown = {name: about[0][name] for name in ("documents", "corpus", "corpus_sha256")}
    run(
        make_app(retriever, default_k=k, about=shown, token=token),
        host=host,
        port=port,
        log_requests=log_requests,
        on_ready=lambda url: console.print(f"serving {shown['documents']:,} passages at {url}", highlight=False),
    )
