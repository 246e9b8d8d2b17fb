"""How many of the passages that a question needs are found, by BM25, by vectors, and by both fused.

    python benchmarks/recall.py [--index DIR] [--dense DIR] [--data DIR] [--limit N] [--json FILE]

The question itself is searched for, among the 3 and the 10 best hits. How a set is counted depends on its gold passages:

- "gold id": where people marked them (hotpotqa, 2wikimultihopqa, musique, popqa), by their ids in the corpus. Recall is the
  share of a question's gold passages that is found, averaged over questions, with a percentile bootstrap's 95 % interval
  over questions; "all" and "any" are the shares of questions of which all or any are found, with Wilson's interval. A
  question with more than 3 gold passages cannot reach a recall of 1 at 3.
- "answer in text": where there are none, or where the gold was picked from BM25's own hits because an answer stands in
  them (nq, triviaqa, bamboogle), which would count in favour of BM25. It is the share of questions with an accepted
  answer in the text of a hit, both normalised as SQuAD does, as whole words; with Wilson's interval. Such a text need not
  support the answer. Where a file holds only questions of that kind (nq, triviaqa), BM25 has an answer among its 20 best
  for nearly all of them, so that these rows favour it still; the caption names the sets.

"hybrid" fuses the 100 best of both by reciprocal rank. Questions are the held-out ones: dev.jsonl, or test.jsonl where a
set has no other. Rows of a file that cannot be used, and questions with gold outside the index, are left out and counted.
Each index is searched in a process of its own. By default all is looked up under $AGENTRL_DATA.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from retrieval_work import sound_questions
from rich.console import Console
from rich.table import Table

from agentrl.scores import normalize_answer, wilson
from agentrl.types import Question
from retrievers.base import Hit, Retriever, RetrieverError
from retrievers.index.manifest import open_manifest
from retrievers.service.process import ProcessRetriever
from retrievers.stages.hybrid import HybridRetriever

SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
DEPTHS = (3, 10)
SEED, RESAMPLES, BATCH = 0, 2000, 64
GOLD, ANSWER = "gold id", "answer in text"
PICKED_BY_BM25 = "answer-string-in-bm25"

console = Console()


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of a set that are asked.

    Attributes:
        measure: GOLD or ANSWER.
        unusable: rows of the file that cannot be read.
        uncovered: questions with gold passages that the index does not have.
    """

    name: str
    questions: list[Question]
    measure: str
    unusable: int
    uncovered: int


def gold_ids(question: Question) -> list[str]:
    """The distinct ids of the passages that the question's row names."""
    return list(dict.fromkeys(question.metadata.get("gold_passage_ids") or ()))


def is_marked(question: Question) -> bool:
    """Whether the question has gold passages that were not picked by BM25."""
    return bool(gold_ids(question)) and not str(question.metadata.get("gold_kind")).startswith(PICKED_BY_BM25)


def measure_of(questions: Sequence[Question]) -> str:
    return GOLD if all(map(is_marked, questions)) else ANSWER


def recall(found: Collection[str], gold: Collection[str]) -> float:
    """The share of the gold passages that was found. Raises ValueError if there are none."""
    if not gold:
        raise ValueError("there is no gold passage to find")
    return len(set(gold) & set(found)) / len(set(gold))


def answer_stands_in(text: str, answers: Sequence[str]) -> bool:
    """Whether the text has one of the answers as whole words; an answer of which the normaliser leaves nothing is never there."""
    padded = f" {normalize_answer(text)} "
    return any(f" {answer} " in padded for answer in map(normalize_answer, answers) if answer)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of the mean (Efron and Tibshirani 1993, chapter 13), of a fixed seed."""
    rng = np.random.default_rng(SEED)
    drawn = np.asarray(values)[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)


def proportion(hits: Sequence[bool]) -> dict[str, float]:
    low, high = wilson(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "low": low, "high": high}


def scores(questions: Sequence[Question], rows: Sequence[Sequence[Hit]], measure: str, k: int) -> dict[str, Any]:
    """Return the shares at k, each with the ends of its interval: recall, all and any of gold, or answer."""
    best = [row[:k] for row in rows]
    if measure == ANSWER:
        pairs = zip(questions, best, strict=True)
        return {
            "answer": proportion([any(answer_stands_in(h.text, q.golden_answers) for h in hits) for q, hits in pairs])
        }
    shares = [recall([hit.id for hit in hits], gold_ids(q)) for q, hits in zip(questions, best, strict=True)]
    low, high = bootstrap(shares)
    return {
        "recall": {"value": sum(shares) / len(shares), "low": low, "high": high},
        "all": proportion([share == 1.0 for share in shares]),
        "any": proportion([share > 0.0 for share in shares]),
    }


async def covered(questions: Sequence[Question], retriever: ProcessRetriever) -> list[Question]:
    """Return the questions all of whose gold passages the index has."""
    names = sorted({name for question in questions for name in gold_ids(question)})
    there = {name for name in names if await retriever.read(name) is not None}
    return [question for question in questions if there.issuperset(gold_ids(question))]


async def read_set(name: str, folder: Path, limit: int | None, retriever: ProcessRetriever) -> QuestionSet | None:
    """Return what is asked of a set, or None, with a reason printed, if there is nothing."""
    file = next((file for file in (folder / "dev.jsonl", folder / "test.jsonl") if file.is_file()), None)
    if file is None:
        say(f"{name} is left out: no dev.jsonl or test.jsonl in {folder}")
        return None
    questions, unusable = sound_questions(file)
    measure = measure_of(questions)
    kept = await covered(questions, retriever) if measure == GOLD else questions
    if not kept:
        say(f"{name} is left out: the index has no question's gold passages")
        return None
    return QuestionSet(name, kept[:limit], measure, unusable, len(questions) - len(kept))


async def search_all(retriever: Retriever, questions: Sequence[Question]) -> list[list[Hit]]:
    rows: list[list[Hit]] = []
    for start in range(0, len(questions), BATCH):
        rows += await retriever.search([question.text for question in questions[start : start + BATCH]], max(DEPTHS))
    return rows


def dense_problem(index: Path, dense: Path) -> str | None:
    """Why the dense index cannot be compared with the other one, or None."""
    if not dense.is_dir():
        return f"{dense} is not there; build it with `agentrl index build --kind flat`"
    try:
        ours, theirs = open_manifest(index, "lucene"), open_manifest(dense, "dense")
    except RetrieverError as error:
        return str(error)
    if ours.corpus_sha256 != theirs.corpus_sha256:
        return f"{dense} is of {theirs.corpus} and {index} of {ours.corpus}; ids can be compared in one corpus only"
    return None


async def measure(index: Path, dense: Path | None, data: Path, limit: int | None) -> dict[str, Any]:
    sets: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        say(f"opening {index}")
        bm25 = await stack.enter_async_context(
            ProcessRetriever("retrievers.lucene.retriever:LuceneRetriever", {"index": str(index)})
        )
        retrievers: dict[str, Retriever] = {"bm25": bm25}
        if dense is not None:
            say(f"opening {dense}")
            # A batch of vectors can take long on a machine with other work.
            options = {"start_seconds": 300.0, "hang_seconds": 600.0}
            vectors = await stack.enter_async_context(
                ProcessRetriever("retrievers.dense.retriever:DenseRetriever", {"index": str(dense)}, **options)
            )
            retrievers |= {"dense": vectors, "hybrid": HybridRetriever([bm25, vectors])}
        for name in SETS:
            asked = await read_set(name, data / name, limit, bm25)
            if asked is not None:
                sets[name] = await measure_set(asked, retrievers)
    return sets


async def measure_set(asked: QuestionSet, retrievers: Mapping[str, Retriever]) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    for method, retriever in retrievers.items():
        began = time.monotonic()
        rows = await search_all(retriever, asked.questions)
        methods[method] = {str(k): scores(asked.questions, rows, asked.measure, k) for k in DEPTHS}
        say(f"{asked.name}: {len(asked.questions)} questions by {method} in {time.monotonic() - began:.1f} s")
    return {
        "questions": len(asked.questions),
        "measure": asked.measure,
        "gold_kinds": dict(Counter(str(question.metadata.get("gold_kind")) for question in asked.questions)),
        "picked_by_bm25": asked.measure == ANSWER and all(map(gold_ids, asked.questions)),
        "gold_passages": sum(len(gold_ids(q)) for q in asked.questions) if asked.measure == GOLD else 0,
        "left_out": {"unusable rows": asked.unusable, "gold not in the index": asked.uncovered},
        "methods": methods,
    }


def written(share: Mapping[str, float] | None) -> str:
    return "" if share is None else f"{share['value']:.3f} ({share['low']:.3f}–{share['high']:.3f})"


def table(sets: Mapping[str, Mapping[str, Any]], measure: str) -> Table | None:
    """The sets that are counted in one way, or None if there are none."""
    shown = {GOLD: ("recall", "all", "any"), ANSWER: ("answer",)}[measure]
    chosen = {name: found for name, found in sets.items() if found["measure"] == measure}
    if not chosen:
        return None
    result = Table("set", "questions", "method", title=f"Counted by {measure}", title_justify="left")
    for k in DEPTHS:
        for column in shown:
            result.add_column(f"{column} at {k}", no_wrap=True)
    for name, found in chosen.items():
        for number, (method, at) in enumerate(found["methods"].items()):
            head = (name, f"{found['questions']:,}") if number == 0 else ("", "")
            result.add_row(*head, method, *(written(at[str(k)][column]) for k in DEPTHS for column in shown))
    picked = [name for name, found in chosen.items() if found["picked_by_bm25"]]
    if picked:
        result.caption = (
            f"in favour of bm25: {', '.join(picked)} hold only questions with an answer in its 20 best hits"
        )
        result.caption_justify = "left"
    return result


def main() -> None:
    root = Path(os.environ.get("AGENTRL_DATA", "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=root / "indexes/wiki-mini", help="a Lucene index")
    parser.add_argument("--dense", type=Path, default=root / "indexes/wiki-mini-dense", help="of the same corpus")
    parser.add_argument("--data", type=Path, default=root / "qa", help="the folder with a folder for each set")
    parser.add_argument("--limit", type=int, help="questions of each set")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    problem = dense_problem(options.index, options.dense)
    if problem is not None:
        say(f"dense and hybrid are left out: {problem}")
    try:
        sets = asyncio.run(measure(options.index, None if problem else options.dense, options.data, options.limit))
    except RetrieverError as error:
        sys.exit(str(error))
    # Intervals do not survive being wrapped.
    wide = Console(width=max(console.width, 200))
    for measure_name in (GOLD, ANSWER):
        rows = table(sets, measure_name)
        if rows is not None:
            wide.print(rows)
    for name, found in sets.items():
        left = ", ".join(f"{count} with {why}" for why, count in found["left_out"].items() if count)
        if left:
            say(f"{name}: left out {left}")
    report = {"index": str(options.index), "dense": None if problem else str(options.dense), "seed": SEED, "sets": sets}
    if problem:
        report["dense_left_out"] = problem
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
