"""The order in which training goes through its questions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from agentrl.data.errors import DataError
from agentrl.types import Question


class QuestionStream:
    """An endless sequence of questions from weighted sets, which the sets and the seed alone determine.

    Each epoch of a set is a fresh permutation of its questions. The next question comes from the set that is furthest
    behind its share, so the first n questions of the sequence have the weights' proportions as nearly as n allows.

    Raises:
        DataError: if there is no set, a set is empty, a weight is not positive, or two questions share an id.
    """

    def __init__(self, sets: Sequence[tuple[Sequence[Question], float]], seed: int) -> None:
        if not sets:
            raise DataError("no question set to train on; name at least one under `data.train`")
        seen: set[str] = set()
        for index, (questions, weight) in enumerate(sets):
            if not questions:
                raise DataError(f"question set {index} is empty; remove it or raise its limit")
            if not 0 < weight < float("inf"):
                raise DataError(f"question set {index} has weight {weight}; give a positive number")
            for question in questions:
                if question.id in seen:
                    raise DataError(f"question {question.id!r} is in the sets twice; give each set its own name")
                seen.add(question.id)
        self._sets = [tuple(questions) for questions, _ in sets]
        total = sum(weight for _, weight in sets)
        self._shares = [weight / total for _, weight in sets]
        self._seed = seed
        self._drawn = [0] * len(sets)
        self._piles: list[list[Question]] = [[] for _ in sets]
        self._order: list[Question] = []

    def __len__(self) -> int:
        """The number of questions in all sets together."""
        return sum(map(len, self._sets))

    def take(self, start: int, count: int) -> list[Question]:
        """Return the questions at positions `start` to `start + count - 1` of the sequence."""
        while len(self._order) < start + count:
            self._order.append(self._next())
        return self._order[start : start + count]

    def _next(self) -> Question:
        position = len(self._order) + 1
        behind = [share * position - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
        index = behind.index(max(behind))
        if not self._piles[index]:
            epoch = self._drawn[index] // len(self._sets[index])
            pile = list(self._sets[index])
            random.Random(f"{self._seed}:{index}:{epoch}").shuffle(pile)
            self._piles[index] = pile
        self._drawn[index] += 1
        return self._piles[index].pop()
