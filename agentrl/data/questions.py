"""Question files: JSON lines and parquet, read row by row."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from agentrl.data.errors import DataError, RowError
from agentrl.data.rows import Row, kind, to_question
from agentrl.types import Question

# What is called a file of JSON lines and is none, by its first bytes.
_REFUSED = {
    b"[": "is one JSON array; write one object a line, for instance with `jq -c '.[]'`",
    b"\x1f\x8b": "is packed with gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "is packed with zstd; unpack it",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is a Parquet file; rename it to .parquet",
    codecs.BOM_UTF16_LE: "is UTF-16; save the file as UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16; save the file as UTF-8",
}


def read_questions(path: Path, name: str | None = None, limit: int | None = None) -> list[Question]:
    """Read the questions of a file, or its first `limit`.

    `agentrl.data.rows` lists the columns of a row. Ids become `name:id`; the name is the folder and the stem of the file,
    such as `nq-train`, unless given. `Question.dataset` is the row's `data_source`, or the name.

    Raises:
        DataError: if the file cannot be read or a row cannot be used; the message names file:line (in parquet the
            row, from 1) and what to do.
    """
    path = Path(path)
    name = name or f"{path.resolve().parent.name}-{path.stem}"
    questions = []
    for line, result in islice(_parsed(path, name), limit):
        if isinstance(result, RowError):
            raise DataError(f"{path}:{line}: {result}; `agentrl data validate {path}` lists every problem of the file")
        questions.append(result)
    if not questions:
        raise DataError(_no_question(path))
    return questions


def validate_questions(path: Path) -> list[str]:
    """Return every problem of a question file, one message a row, each as `file:line: what is wrong`.

    Raises:
        DataError: if the file cannot be read at all.
    """
    path = Path(path)
    results = list(_parsed(path, path.stem))
    if not results:
        return [_no_question(path)]
    return [f"{path}:{line}: {result}" for line, result in results if isinstance(result, RowError)]


def validate_files(paths: Iterable[Path]) -> list[str]:
    """Return every problem of question files, those that cannot be read among them; a file given twice counts once."""
    problems = []
    for path in dict.fromkeys(paths):
        try:
            problems += validate_questions(path)
        except DataError as error:
            problems.append(str(error))
    return problems


def _no_question(path: Path) -> str:
    return f"{path}: holds no question; give a file with at least one row"


def _parsed(path: Path, name: str) -> Iterator[tuple[int, Question | RowError]]:
    first: dict[str, int] = {}
    for line, row in _rows(path):
        try:
            question = to_question(_mapping(row) if isinstance(row, bytes) else row, name)
            earlier = first.setdefault(question.id, line)
            if earlier != line:
                own = question.id.removeprefix(f"{name}:")
                raise RowError(f"id {own!r} is already in line {earlier}; give each question its own id")
        except RowError as error:
            yield line, error
        else:
            yield line, question


def _rows(path: Path) -> Iterator[tuple[int, Row | bytes]]:
    """Yield the rows of a file with their numbers from 1; those of JSON lines as they stand in the file."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give the files in it")
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix in (".jsonl", ".json"):
        return _json_rows(path)
    raise DataError(f"{path}: questions are read from .jsonl and .parquet files; convert it or rename it")


def _json_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            head = file.peek().removeprefix(codecs.BOM_UTF8).lstrip()
            for magic, what in _REFUSED.items():
                if head.startswith(magic):
                    raise DataError(f"{path}: {what}")
            for number, line in enumerate(file, start=1):
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}; check its permissions and the disk") from error


def _mapping(line: bytes) -> Row:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8") from error
    if not text.strip():
        raise RowError("an empty line; remove it")
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.endswith("\n"):
            raise RowError("the last line is cut off in the middle; copy or download the file again") from error
        raise RowError(f"not JSON ({error.msg} at column {error.colno}); write one JSON object a line") from error
    if not isinstance(row, dict):
        raise RowError(f"holds {kind(row)} where an object is needed; write one JSON object a line")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    # Most question files are JSON lines, and pyarrow takes longer to load than they take to read.
    import pyarrow
    from pyarrow import parquet

    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as parquet after row {line}: {error}; get the file again") from error
