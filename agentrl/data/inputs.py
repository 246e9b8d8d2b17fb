"""What a config names on disk: its question sets and its indexes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentrl.config import Config, DataConfig, QuestionSet, RewardConfig
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


def evaluation_questions(
    data: DataConfig,
    files: Sequence[str] = (),
    limit: int | None = None,
    *,
    with_gold: bool = False,
    rewards: Sequence[RewardConfig] = (),
) -> list[Question]:
    """Read `files`, or without any the sets of `data.eval`: of each all questions, or the first `limit`.

    Raises:
        DataError: as `read_questions`, or if two questions have one id, since each is to count once; `with_gold` also if
            the gold passages of a question are not named, and for `rewards` as `check_rewarded`.
    """
    if files:
        sets = [(Path(file), read_questions(Path(file), limit=limit)) for file in files]
    else:
        sets = [(data.resolve(questions.path), read_set(data, questions, limit)) for questions in data.eval]
    for file, questions in sets:
        check_rewarded(rewards, file, questions)
        if with_gold:
            _check_gold(file, questions)
    found = [question for _, questions in sets for question in questions]
    for name, times in Counter(question.id for question in found).items():
        if times > 1:
            raise DataError(
                f"{times} questions to evaluate have the id {name!r}; give each file once, and files of one folder and name "
                "names of their own in data.eval"
            )
    return found


def check_rewarded(rewards: Sequence[RewardConfig], file: Path, questions: Sequence[Question]) -> None:
    """Raise DataError unless each question has what the rewards read in its metadata."""
    for number, reward in enumerate(rewards):
        key = reward.options["key"] if reward.kind == "retrieval_recall" else None
        for question in questions if key is not None else ():
            ids = question.metadata.get(key)
            if not (isinstance(ids, list) and ids and all(isinstance(name, str) for name in ids)):
                raise DataError(
                    f"{file}: question {question.id} has no list metadata.{key}, and reward.{number} (retrieval_recall) counts "
                    "the gold passages that it names; add it, or leave the reward out"
                )


def first_of_each_set(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return the first `limit` questions of each set, in their order; all if it is None."""
    taken: Counter[str] = Counter()
    found = []
    for question in questions:
        taken[question.dataset] += 1
        if limit is None or taken[question.dataset] <= limit:
            found.append(question)
    return found


def _check_gold(file: Path, questions: Sequence[Question]) -> None:
    """Raise DataError unless each question names titles and ids of its gold passages, as many of one as of the other."""
    for question in questions:
        titles, ids = (question.metadata.get(key) for key in ("supporting_titles", "gold_passage_ids"))
        for key, value in (("supporting_titles", titles), ("gold_passage_ids", ids)):
            if not (isinstance(value, list) and value and all(isinstance(name, str) for name in value)):
                raise DataError(
                    f"{file}: question {question.id} has no list metadata.{key}, and evaluation.ceiling searches for the gold "
                    "passages; add it, or set evaluation.ceiling to false"
                )
        if len(titles) != len(ids):
            raise DataError(
                f"{file}: question {question.id} has {len(titles)} metadata.supporting_titles and {len(ids)} "
                "metadata.gold_passage_ids, and evaluation.ceiling needs both for each hop; mend them, or set "
                "evaluation.ceiling to false"
            )


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
