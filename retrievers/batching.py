"""Gathers the questions of many callers, so that one worker thread answers those that wait together."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from retrievers.base import RetrieverError

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Ask(Generic[Question, Answer]):
    """A question that waits for its answer."""

    question: Question
    answer: Future[Answer] = field(default_factory=Future)


class MicroBatches(Generic[Question, Answer]):
    """Every call hands its questions to a queue; the worker takes all that wait there, up to `largest`, at once.

    A lone question is never kept waiting for company, and what comes in while the worker is busy shares its next call.
    Questions of callers that gave up are not answered.
    """

    def __init__(
        self,
        submit: Callable[[Callable[[], None]], object],
        answer: Callable[[list[Question]], list[Answer]],
        largest: int,
    ) -> None:
        """Remember the worker; nothing runs yet.

        Args:
            submit: hands a job to the worker, which runs one at a time, in order.
            answer: run by the worker, gives an answer to each question, or raises RetrieverError. Then each question
                is tried alone, so that a bad one fails nobody else.
            largest: questions in one call of `answer`.
        """
        self._submit, self._answer, self._largest = submit, answer, largest
        self._waiting: deque[_Ask[Question, Answer]] = deque()

    @property
    def waiting(self) -> int:
        """Questions that no worker has taken yet."""
        return len(self._waiting)

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answer of each question, in their order. Raises RetrieverError if one of them failed."""
        asks: list[_Ask[Question, Answer]] = [_Ask(question) for question in questions]
        self._waiting.extend(asks)
        # One job for every `largest` questions that came in can never leave one waiting without a job to take it.
        for _ in range(0, len(asks), self._largest):
            self._submit(self._answer_waiting)
        return list(await asyncio.gather(*(asyncio.wrap_future(ask.answer) for ask in asks)))

    def _answer_waiting(self) -> None:
        batch: list[_Ask[Question, Answer]] = []
        while self._waiting and len(batch) < self._largest:
            ask = self._waiting.popleft()
            if ask.answer.set_running_or_notify_cancel():
                batch.append(ask)
        if not batch:
            return
        try:
            self._resolve(batch)
        finally:
            # Whatever went wrong, nobody may wait for ever.
            for ask in batch:
                if not ask.answer.done():
                    ask.answer.set_exception(RetrieverError(f"the search broke: {sys.exception()!r}"))

    def _resolve(self, batch: list[_Ask[Question, Answer]]) -> None:
        try:
            answers = self._answer([ask.question for ask in batch])
        except RetrieverError as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            for ask in batch:
                self._resolve([ask])
            return
        for ask, answer in zip(batch, answers, strict=True):
            ask.answer.set_result(answer)
