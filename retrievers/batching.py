"""Gathers the questions of many callers, so that one worker thread answers those that wait together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from retrievers.base import RetrieverError

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Call(Generic[Answer]):
    """What one caller waits for: all its answers, by place. One future for all spares the event loop a wake-up each."""

    answers: list[Answer | None]
    missing: int
    done: Future[list[Any]] = field(default_factory=Future)

    def give(self, place: int, answer: Answer) -> None:
        self.answers[place] = answer
        self.missing -= 1
        if not self.missing and self.done.set_running_or_notify_cancel():
            self.done.set_result(self.answers)

    def fail(self, error: RetrieverError) -> None:
        if not self.done.done() and self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)


@dataclass(slots=True)
class _Ask(Generic[Question, Answer]):
    """A question, and where its answer belongs."""

    question: Question
    call: _Call[Answer]
    place: int


class MicroBatches(Generic[Question, Answer]):
    """A queue of questions, of which the worker takes all at once, up to `largest`.

    An idle worker takes a question at once, also a single one. Questions that arrive while the worker is busy share its next
    call. The worker drops the questions of callers that gave up.
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
        if not questions:
            return []
        call: _Call[Answer] = _Call([None] * len(questions), len(questions))
        self._waiting.extend(_Ask(question, call, place) for place, question in enumerate(questions))
        # One job for every `largest` questions that came in can never leave one waiting without a job to take it.
        for _ in range(0, len(questions), self._largest):
            self._submit(self._answer_waiting)
        return await asyncio.wrap_future(call.done)

    def _answer_waiting(self) -> None:
        batch: list[_Ask[Question, Answer]] = []
        while self._waiting and len(batch) < self._largest:
            ask = self._waiting.popleft()
            # Done already means here and below that the caller gave up, or that another question of it failed.
            if not ask.call.done.done():
                batch.append(ask)
        if not batch:
            return
        try:
            self._resolve(batch)
        except BaseException as error:
            # Every caller must get an answer or an error, or it would wait for ever.
            for ask in batch:
                ask.call.fail(RetrieverError(f"the search broke: {error!r}"))
            raise

    def _resolve(self, batch: list[_Ask[Question, Answer]]) -> None:
        try:
            answers = self._answer([ask.question for ask in batch])
        except RetrieverError as error:
            if len(batch) == 1:
                batch[0].call.fail(error)
                return
            for ask in batch:
                if not ask.call.done.done():
                    self._resolve([ask])
            return
        for ask, answer in zip(batch, answers, strict=True):
            ask.call.give(ask.place, answer)
