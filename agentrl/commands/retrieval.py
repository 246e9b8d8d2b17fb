"""`agentrl index` and `agentrl serve-retriever`: from a corpus to an index, to hits, to a service."""

from __future__ import annotations

import asyncio
import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
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
    identify_search,
    index_folder,
    open_stages,
)
from retrievers.base import Hit
from retrievers.index.manifest import Manifest
from retrievers.secrets import from_environment

_SHOWN_CHARACTERS = 400
# Hits that a request may ask for, unless more is the default.
_MAX_K = 100


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


def print_index(folder: Path, console: Console) -> None:
    """Describe an index: in a terminal as a table that folds what is too long, else one uncut line for each value.

    Raises:
        RetrieverError: if the folder is no sound index.
    """
    described = {
        name: f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        for name, value in describe_index(folder).items()
    }
    if console.is_terminal:
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="bold", overflow="fold")
        rows.add_column(overflow="fold")
        for name, value in described.items():
            rows.add_row(name, Text(value))
        console.print(rows)
        return
    width = max(map(len, described))
    for name, value in described.items():
        _print_line(console, Text(f"{name.ljust(width)}  {value}"))


def stage_options(indexes: Sequence[str], options: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return each index with its options: those that were given are the first one's.

    Raises:
        RetrieverError: if an index is missing or damaged, does not take the options, or is of another corpus than others.
    """
    given = [(index, {} if number else options) for number, index in enumerate(indexes)]
    for index, its_options in given:
        check_options(index_folder(index), its_options)
    check_one_corpus(indexes)
    return given


def _stages(given: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The first argument of `open_stages`."""
    return [{"source": index, **options} for index, options in given]


def search(
    indexes: Sequence[str],
    queries: Sequence[str],
    k: int,
    options: Mapping[str, Any],
    rerank: str | None,
    console: Console,
) -> None:
    """Search and print the hits: in a terminal the beginning of each passage, else all of it on one line.

    Raises:
        RetrieverError: if an index cannot be opened or searched.
    """
    retriever = open_stages(_stages(stage_options(indexes, options)), rerank)
    rows = asyncio.run(retriever.search(queries, k))
    retriever.close()
    for query, hits in zip(queries, rows, strict=True):
        _print_line(console, Text(query, style="bold"))
        if not hits:
            _print_line(console, Text("  nothing was found", style="dim"))
        for rank, hit in enumerate(hits, 1):
            _print_hit(console, rank, hit)


def _print_hit(console: Console, rank: int, hit: Hit) -> None:
    head = Text.assemble((f"  {rank}. ", "bold"), hit.title or hit.id, (f"  {hit.score:.4f}  {hit.id}", "dim"))
    text = " ".join(hit.text.split())
    if console.is_terminal:
        shown = textwrap.shorten(text, _SHOWN_CHARACTERS, placeholder=" …")
        console.print(head, Padding(Text(shown, overflow="fold"), (0, 0, 0, 2)), sep="\n")
    else:
        _print_line(console, head)
        _print_line(console, Text(f"  {text}"))


def _print_line(console: Console, line: Text) -> None:
    """Print a line that only a terminal itself may wrap."""
    console.print(line, soft_wrap=True)


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
        RetrieverError: if the token is not in the environment, an index cannot be opened, or nothing can listen there.
    """
    from retrievers.base import Retriever
    from retrievers.service.process import ProcessRetriever
    from retrievers.service.server import make_app
    from retrievers.service.server import serve as run
    from retrievers.stages.cache import CachedRetriever

    token = None if token_env is None else from_environment(token_env, "--token-env")
    given = stage_options(indexes, options)
    about = describe_index(index_folder(indexes[0]))
    identity = json.dumps(identify_search(given, rerank), sort_keys=True)
    retriever: Retriever = ProcessRetriever(
        "retrievers.backends:open_stages", {"indexes": _stages(given), "rerank": rerank}
    )
    if cache is not None:
        retriever = CachedRetriever(retriever, cache, identity)
    shown = {name: about[name] for name in ("documents", "corpus", "corpus_sha256")}
    # Clients that keep hits tell by it whether they still hold.
    shown["search_sha256"] = hashlib.sha256(identity.encode()).hexdigest()
    run(
        make_app(retriever, default_k=k, max_k=max(_MAX_K, k), about=shown, token=token),
        host=host,
        port=port,
        log_requests=log_requests,
        on_ready=lambda url: console.print(f"serving {shown['documents']:,} passages at {url}", highlight=False),
    )
