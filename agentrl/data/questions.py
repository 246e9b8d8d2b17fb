"""Question files: JSON lines and parquet, in FlashRAG's and Search-R1's columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from agentrl.data.errors import DataError
from agentrl.types import Question

_MARK = "Question:"

Row = Mapping[str, Any] | str
"""A row as it was read, or what is wrong with it."""


def read_questions(path: Path, name: str | None = None, limit: int | None = None) -> list[Question]:
    """Read the questions of a file, or its first `limit`.

    A row has `id`, `question`, `golden_answers` and optionally `metadata` (FlashRAG, arXiv 2405.13576), or Search-R1's
    columns (arXiv 2503.09516): `data_source`, `prompt`, `reward_model.ground_truth.target` and `extra_info`, where the
    question is taken from the prompt after its last "Question:" unless there is a `question`. Ids become `name:id`;
    the name is the folder and the stem of the file, such as `nq-train`, unless given. `Question.dataset` is the row's
    `data_source`, or the name.

    Raises:
        DataError: if the file cannot be read or a row cannot be used; the message names file:line (in parquet the
            row, from 1) and what to do.
    """
    path = Path(path)
    name = name or f"{path.resolve().parent.name}-{path.stem}"
    questions = []
    for line, result in islice(_parsed(path, name), limit):
        if isinstance(result, str):
            raise DataError(f"{path}:{line}: {result}; `agentrl data validate {path}` lists every problem of the file")
        questions.append(result)
    if not questions:
        raise DataError(f"{path}: holds no question; give a file with at least one row")
    return questions


def validate_questions(path: Path) -> list[str]:
    """Return every problem of a question file, one message a row, each as `file:line: what is wrong`.

    Raises:
        DataError: if the file cannot be read at all.
    """
    path = Path(path)
    results = list(_parsed(path, path.stem))
    if not results:
        return [f"{path}:1: holds no question; give a file with at least one row"]
    return [f"{path}:{line}: {result}" for line, result in results if isinstance(result, str)]


def _parsed(path: Path, name: str) -> Iterator[tuple[int, Question | str]]:
    first: dict[str, int] = {}
    for line, row in _rows(path):
        result = row if isinstance(row, str) else _question(row, name)
        if isinstance(result, Question):
            earlier = first.setdefault(result.id, line)
            if earlier != line:
                own = result.id.removeprefix(f"{name}:")
                result = f"id {own!r} is already in line {earlier}; give each question its own id"
        yield line, result


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path, and `data.root` that relative ones are looked up under")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix in (".jsonl", ".json"):
        return _json_rows(path)
    raise DataError(f"{path}: questions are read from .jsonl and .parquet files; convert it or rename it")


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                yield line, _json_row(raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}; check its permissions and the disk") from error


def _json_row(raw: bytes) -> Row:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start} of the line; save the file as UTF-8"
    if not text.strip():
        return "an empty line; remove it"
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.endswith("\n"):
            return "the last line is cut off in the middle; copy or download the file again"
        return f"not JSON ({error.msg} at column {error.colno}); write one JSON object a line"
    if not isinstance(row, dict):
        return f"holds {_kind(row)} where an object is needed; write one JSON object a line"
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


def _question(row: Mapping[str, Any], name: str) -> Question | str:
    """Return the question of a row, or what is wrong with it."""
    source = row.get("data_source")
    problem = (
        _id_problem(row)
        or _text_problem(row)
        or _answers_problem(row)
        or _metadata_problem(row)
        or _source_problem(source)
    )
    if problem:
        return problem
    extra = row.get("extra_info") or {}
    own = row["id"] if row.get("id") is not None else f"{extra['split']}_{extra['index']}"
    return Question(
        # Search-R1 counts each source from 0, and one file of it holds several sources.
        id=f"{name}:{source}:{own}" if source else f"{name}:{own}",
        text=_text(row).strip(),
        golden_answers=tuple(_answers(row)),
        dataset=source or name,
        metadata=row.get("metadata") or extra,
    )


def _id_problem(row: Mapping[str, Any]) -> str | None:
    own = row.get("id")
    if own is None:
        extra = row.get("extra_info")
        if isinstance(extra, Mapping) and {"split", "index"} <= extra.keys():
            return None
        return "`id` is missing; give each question an id (Search-R1: `extra_info` with `split` and `index`)"
    if isinstance(own, bool) or not isinstance(own, str | int):
        return f"`id` is {_kind(own)}; write text or a whole number"
    return None if str(own).strip() else "`id` is empty; give each question an id"


def _text(row: Mapping[str, Any]) -> Any:
    text = row.get("question")
    prompt = row.get("prompt")
    if text is None and isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping):
        prompt = prompt[-1].get("content")
    if text is None and isinstance(prompt, str):
        _, mark, after = prompt.rpartition(_MARK)
        return after if mark else None
    return text


def _text_problem(row: Mapping[str, Any]) -> str | None:
    text = _text(row)
    if text is None:
        return f'`question` is missing; add it, or a `prompt` that holds the question after "{_MARK}"'
    if not isinstance(text, str):
        return f"`question` is {_kind(text)}; write text"
    return None if text.strip() else "`question` is empty; write the question or remove the row"


def _answers(row: Mapping[str, Any]) -> Any:
    answers = row.get("golden_answers")
    if answers is not None:
        return answers
    for key in ("reward_model", "ground_truth", "target"):
        row = row.get(key)
        if not isinstance(row, Mapping):
            return row
    return None


def _answers_problem(row: Mapping[str, Any]) -> str | None:
    answers = _answers(row)
    if answers is None:
        return "`golden_answers` is missing; list the accepted answers (Search-R1: `reward_model.ground_truth.target`)"
    if not isinstance(answers, list):
        return f"`golden_answers` is {_kind(answers)}; write a list of texts"
    if not answers:
        return "`golden_answers` is empty; list at least one accepted answer or remove the row"
    if _taken_apart(answers):
        return "`golden_answers` is a text taken apart into letters; write the answers as a list or remove the row"
    for answer in answers:
        if not isinstance(answer, str):
            return f"`golden_answers` holds {_kind(answer)}; write every answer as text"
        if not answer.strip():
            return "`golden_answers` holds an empty text; remove it"
    return None


def _taken_apart(answers: list[Any]) -> bool:
    """Return whether the list holds the letters of a list that was written as text, such as '["a", "b"]'."""
    letters = all(isinstance(answer, str) and len(answer) == 1 for answer in answers)
    return letters and len(answers) > 4 and not all(answer.isalnum() for answer in answers)


def _metadata_problem(row: Mapping[str, Any]) -> str | None:
    for key in ("metadata", "extra_info"):
        value = row.get(key)
        if value is not None and not isinstance(value, Mapping):
            return f"`{key}` is {_kind(value)}; write an object or leave it out"
    return None


def _source_problem(source: Any) -> str | None:
    return None if source is None or isinstance(source, str) else f"`data_source` is {_kind(source)}; write text"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
