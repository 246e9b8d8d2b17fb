"""How fast agentrl finds passages, beside Search-R1's server and beside Pyserini, FAISS and HTTP themselves.

    python benchmarks/retrieval.py [--quick] [--parts PART...] [--index DIR] [--dense DIR] [--corpus FILE]
                                   [--questions FILE...] [--rounds N] [--threads N] [--json FILE]

1. Queries a second at k 3, 250 in one call, against the loop of Search-R1's BM25 server on a searcher of the same JVM:
   without a cache, from the cache's memory, and from a filled cache that was just opened. Each round has questions of its
   own, so that only Java itself is warm. The limit is Pyserini's batch search of the same queries with as many threads; a
   second limit reads ids and scores and no contents. What a query took of all processors says what a method costs, also
   on a machine with other work, where threads gain little.
   Then the same with at most 1, 16, 64 and 256 queries in a call of Java, of 250 that wait: how large a micro-batch may be.
2. Requests over HTTP with one query each, from 1, 16 and 64 clients, to a service that was started from the command line
   without a cache. The clients run on the same machine and take a part of it.
3. Building a Lucene index from the command line: documents a second of the whole command, and its processes' memory.
4. Dense: queries 64 at once, against the encoder's model and the FAISS index called directly, which reads no contents.
   The index is --dense, or a flat one of 500 passages that is built for this.

Answers are compared: ids and contents must be equal and scores within 1e-5, or the run ends. Methods take turns at being
first. Ratios are of queries a second in the same round, as medians over rounds with their range. By default index,
corpus and questions are wiki-mini and the training questions under $AGENTRL_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from measuring import in_process, percentiles, spread, written
from retrieval_commands import measure_build, measure_http, service
from retrieval_dense import build_dense, measure_dense
from retrieval_lucene import measure_batches, measure_lucene
from retrieval_work import SEED, K, Seconds, portions, shuffled_texts
from rich.console import Console
from rich.table import Table

PARTS = ("lucene", "http", "build", "dense")
WARM_UP = 2000
CLIENTS = (1, 16, 64)
BATCHES = (1, 16, 64, 256)
DENSE_BATCH = 64
DENSE_PASSAGES = 500
RATIOS = {
    "search_r1_loop_cold": ("agentrl", "search_r1"),
    "search_r1_loop_cached": ("memory", "search_r1"),
    "search_r1_loop_disk": ("disk", "search_r1"),
    "pyserini_limit": ("agentrl", "pyserini"),
    "pyserini_limit_without_contents": ("agentrl", "pyserini_scores"),
}
METHODS = {
    "agentrl": "agentrl, no cache",
    "memory": "agentrl, cache in memory",
    "disk": "agentrl, cache on disk",
    "search_r1": "Search-R1's loop",
    "pyserini": "Pyserini's batch search",
    "pyserini_scores": "the same without contents",
    "faiss": "encoder and FAISS alone",
}

console = Console()


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def ratios_of(seconds: Seconds, pairs: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Return how many times as fast the first of each pair is, over the rounds."""
    return {
        name: spread([b / a for a, b in zip(seconds[first], seconds[second], strict=True)])
        for name, (first, second) in pairs.items()
    }


def rates_of(seconds: Seconds, queries: int) -> dict[str, dict[str, float]]:
    return {name: spread([queries / value for value in values]) for name, values in seconds.items()}


def searches(index: str, texts: Sequence[str], rounds: int, size: int, threads: int, folder: Path) -> dict[str, Any]:
    # Java compiles what it has run often; few questions would leave it in the middle of that.
    warm = min(WARM_UP, max(len(texts) - rounds * size, len(texts) // (rounds + 1)))
    parts = portions(texts[warm:], rounds, size)
    queries = len(parts[0])
    say(f"searching: {warm:,} queries to warm up, and {rounds} rounds of {queries:,}")
    asked = [texts[:warm], *parts]
    seconds, processors = in_process(measure_lucene, index, asked, threads, str(folder))
    say(f"searching with at most {', '.join(map(str, BATCHES))} queries at once")
    batches = in_process(measure_batches, index, asked, threads, BATCHES)
    return {
        "queries": queries,
        "k": K,
        "threads": threads,
        "seconds": seconds,
        "processor_seconds": processors,
        "processor_ms_per_query": {
            name: spread([1000 * value / queries for value in values]) for name, values in processors.items()
        },
        "queries_per_second": rates_of(seconds, queries),
        "ratios": ratios_of(seconds, RATIOS),
        "batches": {"seconds": batches, "queries_per_second": rates_of(batches, queries)},
    }


def over_http(index: str, texts: Sequence[str], rounds: int, requests: dict[int, int]) -> list[dict[str, Any]]:
    say("HTTP: starting the service")
    with service(index) as url:
        measured = measure_http(url, texts, CLIENTS, rounds, requests, say)
    return [
        {
            "clients": count,
            "requests": len(found["latencies"]),
            "requests_per_second": spread([requests[count] / seconds for seconds in found["seconds"]]),
            "ms": percentiles([1000 * seconds for seconds in found["latencies"]]),
        }
        for count, found in measured.items()
    ]


def builds(corpus: Path, folder: Path, times: int) -> dict[str, Any]:
    runs = []
    for number in range(times):
        runs.append(measure_build(corpus, folder / f"index-{number}"))
        run = runs[-1]
        say(f"build {number + 1} of {times}: {run['documents']:,} documents in {run['seconds']:.1f} s")
    return {
        "documents": runs[0]["documents"],
        "seconds": [run["seconds"] for run in runs],
        "documents_per_second": spread([run["documents"] / run["seconds"] for run in runs]),
        "mib": spread([run["mib"] for run in runs]),
    }


def dense(
    given: Path | None, corpus: Path, texts: Sequence[str], rounds: int, calls: int, threads: int, folder: Path
) -> dict[str, Any]:
    index = given or folder / "dense"
    if given is None:
        say(f"dense: encoding {DENSE_PASSAGES} passages")
        with corpus.open(encoding="utf-8") as file:
            (folder / "part.jsonl").write_text("".join(islice(file, DENSE_PASSAGES)), encoding="utf-8")
        in_process(build_dense, str(folder / "part.jsonl"), str(index), threads)
    say("dense: loading the encoder")
    # Whole batches only, so that both methods encode the same batches.
    size = min(calls, len(texts) // (rounds + 1) // DENSE_BATCH) * DENSE_BATCH
    seconds = in_process(measure_dense, str(index), portions(texts, rounds + 1, size), DENSE_BATCH, threads)
    return {
        "index": str(given) if given else f"flat, {DENSE_PASSAGES} passages",
        "queries": size,
        "batch": DENSE_BATCH,
        "seconds": seconds,
        "queries_per_second": rates_of(seconds, size),
        "ratios": ratios_of(seconds, {"faiss_limit": ("agentrl", "faiss")}),
    }


def rate_table(title: str, report: Mapping[str, Any]) -> Table:
    table = Table("method", "queries/s", title=title, title_justify="left")
    used = report.get("processor_ms_per_query", {})
    if used:
        table.add_column("ms of all processors a query")
    for name, rate in report["queries_per_second"].items():
        table.add_row(METHODS[name], written(rate, 0), *([written(used[name])] if name in used else []))
    return table


def batch_table(report: Mapping[str, Any]) -> Table:
    table = Table("queries at most", "queries/s", title="Calls of Java, 250 queries waiting", title_justify="left")
    for size, rate in report["queries_per_second"].items():
        table.add_row(size, written(rate, 0))
    return table


def ratio_table(ratios: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("ratio", "times as fast", title="Ratios", title_justify="left")
    for name, ratio in ratios.items():
        table.add_row(name, written(ratio))
    return table


def http_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("clients", "requests/s", "p50 ms", "p95 ms", "p99 ms", "requests", title_justify="left")
    table.title = "One query a request over HTTP"
    for row in rows:
        shown = (f"{value:.1f}" for value in row["ms"].values())
        table.add_row(f"{row['clients']}", written(row["requests_per_second"], 0), *shown, f"{row['requests']:,}")
    return table


def build_table(report: Mapping[str, Any]) -> Table:
    table = Table("documents", "documents/s", "MiB at most", title="Building a Lucene index", title_justify="left")
    table.add_row(f"{report['documents']:,}", written(report["documents_per_second"], 0), written(report["mib"], 0))
    return table


def tables(report: Mapping[str, Any], ratios: Mapping[str, Mapping[str, float]]) -> Iterator[Table]:
    if "lucene" in report:
        yield rate_table(f"Lucene, k {K}, {report['lucene']['queries']:,} queries a round", report["lucene"])
        yield batch_table(report["lucene"]["batches"])
    if "dense" in report:
        yield rate_table(f"Dense, {DENSE_BATCH} queries at once, {report['dense']['index']}", report["dense"])
    if ratios:
        yield ratio_table(ratios)
    if "http" in report:
        yield http_table(report["http"])
    if "build" in report:
        yield build_table(report["build"])


def arguments() -> argparse.Namespace:
    root = Path(os.environ.get("AGENTRL_DATA", "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small rounds; the numbers say little")
    parser.add_argument("--index", type=Path, default=root / "indexes/wiki-mini", help="a Lucene index")
    parser.add_argument("--dense", type=Path, help="a dense index; by default a small one is built")
    parser.add_argument("--corpus", type=Path, default=root / "corpus/wiki-mini.jsonl", help="to build indexes of")
    parser.add_argument("--questions", type=Path, nargs="+", help="by default every train.jsonl under $AGENTRL_DATA/qa")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="by default all")
    parser.add_argument("--rounds", type=int, help="by default 5")
    parser.add_argument("--threads", type=int, default=2, help="of Java, torch and FAISS, by default 2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.questions = options.questions or sorted((root / "qa").glob("*/train.jsonl"))
    missing = [str(path) for path in (options.index, options.corpus, *options.questions) if not path.exists()]
    if missing or not options.questions:
        what = ", ".join(missing) or f"no question file under {root / 'qa'}"
        parser.error(f"{what}: not there; set AGENTRL_DATA, or name index, corpus and questions")
    return options


def main() -> None:
    options = arguments()
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    rounds = options.rounds or (2 if options.quick else 5)
    size = 200 if options.quick else 1000
    requests = {1: 30, 16: 100, 64: 200} if options.quick else {1: 100, 16: 400, 64: 600}
    texts = shuffled_texts(options.questions)
    needed = 3 * max(CLIENTS) + rounds * sum(requests.values())
    if len(texts) < needed:
        sys.exit(f"{len(texts)} questions are too few for {needed} different requests; give more question files")
    report: dict[str, Any] = {
        "rounds": rounds,
        "seed": SEED,
        "index": str(options.index),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "versions": {name: version(name) for name in ("pyserini", "faiss-cpu", "torch", "uvicorn", "httpx")},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index, threads = str(options.index), options.threads
        measures: dict[str, Callable[[], Any]] = {
            "lucene": lambda: searches(index, texts, rounds, size, threads, folder / "cache"),
            "http": lambda: over_http(index, texts, rounds, requests),
            "build": lambda: builds(options.corpus, folder, 1 if options.quick else 3),
            "dense": lambda: dense(
                options.dense, options.corpus, texts, rounds, 1 if options.quick else 4, threads, folder
            ),
        }
        report |= {part: measures[part]() for part in PARTS if part in options.parts}
    ratios: dict[str, dict[str, float]] = {}
    for part in ("lucene", "dense"):
        ratios |= report.get(part, {}).get("ratios", {})
    report["ratios"] = {name: ratio["median"] for name, ratio in ratios.items()}
    report["seconds"] = time.monotonic() - began
    for table in tables(report, ratios):
        console.print(table)
    say(f"{report['seconds']:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
