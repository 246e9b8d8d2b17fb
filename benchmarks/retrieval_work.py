"""What the runs of `retrieval.py` share: the questions of each round, and how answers are compared."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from agentrl.data.questions import read_questions, validate_questions
from agentrl.types import Question
from retrievers.base import Hit

K = 3
SEED = 0
TOLERANCE = 1e-5

Rows = list[list[Hit]]
Seconds = dict[str, list[float]]


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


def check_equal(name: str, queries: Sequence[str], rows: Rows, expected: Rows) -> None:
    """Raise RuntimeError unless ids and contents are the same, in order, and scores within 1e-5."""
    if not len(queries) == len(rows) == len(expected):
        raise RuntimeError(f"{name}: {len(rows)} answers to {len(queries)} queries")
    for query, row, wanted in zip(queries, rows, expected, strict=True):
        same = [(hit.id, hit.contents) for hit in row] == [(hit.id, hit.contents) for hit in wanted]
        if not same or any(abs(a.score - b.score) > TOLERANCE for a, b in zip(row, wanted, strict=True)):
            found = [(hit.id, hit.score) for hit in row]
            raise RuntimeError(f"{name} found {found} for {query!r} and not {[(hit.id, hit.score) for hit in wanted]}")


def without_warm_up(seconds: Seconds) -> Seconds:
    """Without the round that warms up."""
    return {name: values[1:] for name, values in seconds.items()}
