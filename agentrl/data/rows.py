"""One row of a question file as a `Question`, in the columns of FlashRAG, Search-R1, verl and the multi-hop data sets.

| what | columns, in this order |
|---|---|
| id | `id`, `_id`, or `extra_info.split` with `extra_info.index` |
| question | `question`, `extra_info.question`, or what `prompt` holds after "Question:" |
| answers | `golden_answers`, `reward_model.ground_truth.target`, `reward_model.ground_truth`, or `answer` with `answer_aliases` |
| data set | `data_source` |
| metadata | `metadata`, or `extra_info` |

Sources: FlashRAG (arXiv 2405.13576), Search-R1 (arXiv 2503.09516), verl (arXiv 2409.19256), HotpotQA (arXiv 1809.09600),
MuSiQue (arXiv 2108.00573).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from agentrl.data.errors import RowError
from agentrl.data.prompts import question_of
from agentrl.types import Question

Row = Mapping[str, Any]

_WRITTEN_LIST = re.compile(r"\[\s*(?:[\"'].*[\"']\s*)?\]", re.DOTALL)


def to_question(row: Row, name: str) -> Question:
    """Return the question of a row of the question set `name`.

    The id is `name:id`, or `name:data_source:id`, since Search-R1 counts each source of a file from 0. A number among
    the answers becomes its digits.

    Raises:
        RowError: if a column is missing or holds what it should not.
    """
    source = row.get("data_source")
    if source is not None and not isinstance(source, str):
        raise RowError(f"`data_source` is {kind(source)}; write text")
    own = _id(row)
    return Question(
        id=f"{name}:{source}:{own}" if source else f"{name}:{own}",
        text=_text(row),
        golden_answers=_answers(row),
        dataset=source or name,
        metadata=_object(row, "metadata") or _object(row, "extra_info"),
    )


def kind(value: Any) -> str:
    """Name the kind of a value as people who write JSON call it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _object(row: Row, column: str) -> Row:
    value = row.get(column)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(f"`{column}` is {kind(value)}; write an object or leave it out")
    return value


def _id(row: Row) -> str:
    for column in ("id", "_id"):
        if row.get(column) is not None:
            return _name(row[column], column)
    extra = _object(row, "extra_info")
    if not extra:
        column = "_id" if "_id" in row and "id" not in row else "id"
        raise RowError(
            f"`{column}` is missing; give each question an id (Search-R1, verl: `extra_info` with `split` and `index`)"
        )
    for part in ("split", "index"):
        if part not in extra:
            raise RowError(f"`extra_info.{part}` is missing; add it, or give each question an `id`")
    return "_".join(_name(extra[part], f"extra_info.{part}") for part in ("split", "index"))


def _name(value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        found = value if isinstance(value, float) else kind(value)
        raise RowError(f"`{column}` is {found}; write text or a whole number, or give each question an `id`")
    if not str(value).strip():
        raise RowError(f"`{column}` is empty; give each question an id")
    return str(value)


def _text(row: Row) -> str:
    columns = {"question": row.get("question"), "extra_info.question": _object(row, "extra_info").get("question")}
    column = next((column for column, text in columns.items() if text is not None), "prompt")
    text = question_of(_prompt(row), column) if column == "prompt" else columns[column]
    if not isinstance(text, str):
        raise RowError(f"`{column}` is {kind(text)}; write text")
    if not text.strip():
        raise RowError(f"`{column}` is empty; write the question or remove the row")
    return text.strip()


def _prompt(row: Row) -> str:
    """Return the prompt of a row: a text, or what the user says last in a list of messages."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        said = [message for message in prompt if isinstance(message, Mapping) and message.get("role", "user") == "user"]
        prompt = said[-1].get("content") if said else None
    if prompt is None:
        return ""
    if not isinstance(prompt, str):
        raise RowError(
            f"`prompt` is {kind(prompt)}; write text or messages whose `content` is text, or add a `question`"
        )
    return prompt


def _answers(row: Row) -> tuple[str, ...]:
    column, value = _answer_column(row)
    if value is None:
        raise RowError(f"`{column}` is missing; list the accepted answers there (verl: in `reward_model.ground_truth`)")
    # FlashRAG defines a list. A text there is most often a list that a conversion wrote out, and would be one long answer.
    if not isinstance(value, list) and (column == "golden_answers" or not isinstance(value, str | int | float)):
        raise RowError(f"`{column}` is {kind(value)}; write a list of texts")
    answers = value if isinstance(value, list) else [value]
    if not answers:
        raise RowError(f"`{column}` is empty; list at least one accepted answer or remove the row")
    if _taken_apart(answers):
        raise RowError(f"`{column}` is a text taken apart into letters; write the answers as a list or remove the row")
    aliases = row.get("answer_aliases") if column == "answer" else None
    aliases = aliases if isinstance(aliases, list) else [] if aliases is None else [aliases]
    return (*(_answer(answer, column) for answer in answers), *(_answer(alias, "answer_aliases") for alias in aliases))


def _answer_column(row: Row) -> tuple[str, Any]:
    """Return the name and the value of the column that holds the answers; None where it is missing or null."""
    if row.get("golden_answers") is not None:
        return "golden_answers", row["golden_answers"]
    column, value = "reward_model", _object(row, "reward_model")
    if value:
        for part in ("ground_truth", "target"):
            if isinstance(value, Mapping):
                column, value = f"{column}.{part}", value.get(part)
        return column, value
    if row.get("answer") is not None:
        return "answer", row["answer"]
    return next(
        (column for column in ("golden_answers", "reward_model", "answer") if column in row), "golden_answers"
    ), None


def _answer(value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"`{column}` holds {kind(value)}; write every answer as text")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowError(f"`{column}` holds {value}, which is no number; write every answer as text")
        # A column of whole numbers with a gap comes out of a table as decimals.
        return f"{value:.0f}" if value.is_integer() else str(value)
    answer = str(value)
    if not answer.strip():
        raise RowError(f"`{column}` holds an empty text; remove it")
    if _WRITTEN_LIST.fullmatch(answer.strip()):
        raise RowError(f"`{column}` holds a list that was written as text, {answer!r}; write the list itself")
    return answer


def _taken_apart(answers: list[Any]) -> bool:
    """Return whether the list holds the letters of a list that was written as text, such as '["a", "b"]'."""
    letters = all(isinstance(answer, str) and len(answer) == 1 for answer in answers)
    return letters and len(answers) > 4 and not all(answer.isalnum() for answer in answers)
