"""The demo: a small world of real facts, as a corpus to search and questions that need one search, two or three.

    agentrl data demo data/demo

`facts` holds the places, `sources` reads them from three packages, `passages` writes the corpus, `questions` the questions,
and `splits` deals these to train, dev and test.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.data.errors import DataError
from agentrl.demo.passages import Passage, write_passages
from agentrl.demo.questions import Draft, draft_questions
from agentrl.demo.sources import attribution, load_world
from agentrl.demo.splits import split_questions


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """How much `write_demo` wrote: passages, places, questions by split, and questions by split and kind."""

    folder: Path
    passages: int
    countries: int
    provinces: int
    cities: int
    questions: dict[str, int]
    kinds: dict[str, dict[str, int]]


def write_demo(out: Path, seed: int = 0) -> DemoSummary:
    """Write corpus.jsonl, train.jsonl, dev.jsonl, test.jsonl and SOURCES.md to the folder `out`.

    The same seed and packages give the same bytes. The folder appears whole or not at all.

    Raises:
        DataError: as `write_folder`.
    """
    world = load_world()
    library = write_passages(world, seed)
    splits = split_questions(world, draft_questions(world, library, seed), seed)
    questions = {split: question_rows(f"demo_{split}", drafts) for split, drafts in splits.items()}
    write_folder(out, library.passages, questions, attribution())
    return DemoSummary(
        folder=out.absolute(),
        passages=len(library.passages),
        countries=len(world.countries),
        provinces=len(world.provinces),
        cities=len(world.cities),
        questions={split: len(drafts) for split, drafts in splits.items()},
        kinds={split: dict(sorted(Counter(d.kind for d in drafts).items())) for split, drafts in splits.items()},
    )


def write_folder(
    out: Path, passages: Iterable[Passage], questions: Mapping[str, Iterable[Mapping[str, Any]]], sources: str
) -> None:
    """Write corpus.jsonl, a question file for each split, and SOURCES.md to the folder `out`, which appears whole or not at all.

    `questions` are rows by split, see `question_rows`.

    Raises:
        DataError: if `out` is a file or a folder that is not empty, or cannot be written.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: already there and not an empty folder; give another folder or remove it first")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_lines(partial / "corpus.jsonl", map(passage_row, passages))
        for split, rows in questions.items():
            _write_lines(partial / f"{split}.jsonl", rows)
        (partial / "SOURCES.md").write_text(sources, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}; choose a folder that you may write to") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def passage_row(passage: Passage) -> dict[str, Any]:
    """Return a passage as a row of a corpus file."""
    return {"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'}


def question_rows(prefix: str, drafts: Sequence[Draft]) -> Iterable[dict[str, Any]]:
    """Yield drafts as rows of a question file; an id is `prefix` and the draft's position."""
    for number, draft in enumerate(drafts):
        yield {
            "id": f"{prefix}_{number:04d}",
            "question": draft.text,
            "golden_answers": list(draft.answers),
            "metadata": {
                "hops": len(draft.passages),
                "kind": draft.kind,
                "gold_passage_ids": [passage.id for passage in draft.passages],
                "supporting_titles": [passage.title for passage in draft.passages],
                "chain": list(draft.chain),
            },
        }


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = sorted(rows, key=lambda row: row["id"])
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
