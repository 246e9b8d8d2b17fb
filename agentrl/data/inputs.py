"""What a config names on disk: its question sets and its indexes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentrl.config import Config, DataConfig, QuestionSet
from agentrl.data.errors import DataError
from agentrl.data.questions import read_questions
from agentrl.types import Question
from retrievers.backends import check_one_corpus, check_options, identify_index, index_folder


def read_set(data: DataConfig, questions: QuestionSet, limit: int | None = None) -> list[Question]:
    """Read a question set, or its first questions up to its own limit and `limit`.

    Raises:
        DataError: as `read_questions`; where there is no such file, the message names the folder it was looked up under.
    """
    file = data.resolve(questions.path)
    if not file.is_file():
        raise DataError(f"{file}: no such file; check the path, and data.root ({data.root}) that it is looked up under")
    least = min((n for n in (questions.limit, limit) if n is not None), default=None)
    return read_questions(file, name=questions.name, limit=least)


def evaluation_questions(data: DataConfig, files: Sequence[str] = (), limit: int | None = None) -> list[Question]:
    """Read `files`, or without any the sets of `data.eval`: of each all questions, or the first `limit`.

    Raises:
        DataError: as `read_questions`, or if two questions have one id, since each is to count once.
    """
    if files:
        found = [question for file in files for question in read_questions(Path(file), limit=limit)]
    else:
        found = [question for questions in data.eval for question in read_set(data, questions, limit)]
    for name, times in Counter(question.id for question in found).items():
        if times > 1:
            raise DataError(
                f"{times} questions to evaluate have the id {name!r}; give each file once, and files of one folder and name "
                "names of their own in data.eval"
            )
    return found


def check_index(config: Config) -> None:
    """Raise RetrieverError unless the local indexes are there and sound, of one corpus, and take their options."""
    if config.retriever is None:
        return
    sources = [config.data.resolve_index(index.index) for index in config.retriever.indexes]
    for source, index in zip(sources, config.retriever.indexes, strict=True):
        check_options(index_folder(source), index.options)
    check_one_corpus(sources)


def describe_inputs(config: Config) -> dict[str, dict[str, Any]]:
    """Describe the files that a run reads so that a change of their contents shows, by the config's key of each.

    Question files and recordings are described by their SHA-256, local indexes by their corpus and what they were built
    with; each has its `path`.

    Raises:
        RetrieverError: if an index is missing or damaged.
        OSError: if a file cannot be read.
    """
    data, retriever = config.data, config.retriever
    files = {f"data.train.{number}": questions.path for number, questions in enumerate(data.train)}
    files |= {f"data.eval.{number}": questions.path for number, questions in enumerate(data.eval)}
    if retriever is not None and retriever.replay is not None:
        files["retriever.replay"] = retriever.replay
    described: dict[str, dict[str, Any]] = {
        key: {"path": str(data.resolve(path)), "sha256": file_sha256(data.resolve(path))} for key, path in files.items()
    }
    for number, index in enumerate(retriever.indexes if retriever is not None else ()):
        source = data.resolve_index(index.index)
        identity = identify_index(source, {})
        key = f"retriever.fuse.{number - 1}" if number else "retriever.index"
        described[key] = {"path": source, "corpus": identity["corpus_sha256"], "parameters": identity["parameters"]}
    return described


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
