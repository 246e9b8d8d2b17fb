"""Sequences of tokens that begin alike, for tests of the scoring pass."""

import numpy as np
from hypothesis import strategies as st

from agentrl.training.scoring import TokenSequence

VOCABULARY = 300


@st.composite
def sequences(draw):
    """Sequences of few different tokens, so that many begin alike, some are equal and some begin another."""
    made = []
    for _ in range(draw(st.integers(1, 7))):
        ids = draw(st.lists(st.integers(0, 2), min_size=2, max_size=9))
        scored = draw(st.sets(st.integers(1, len(ids) - 1)))
        made.append(TokenSequence(np.array(ids), np.array(sorted(scored), dtype=int)))
    return made


def different_tokens(made):
    """How many tokens there are if every common beginning counts once."""
    return len({tuple(s.inputs[: n + 1]) for s in made for n in range(len(s.inputs))})


def ancestors(ends, token):
    return [other for other in range(token + 1) if token < ends[other]]


def in_trunk(made, size=20):
    """The same sequences behind a beginning of `size` tokens that they share."""
    return [TokenSequence(np.concatenate([np.arange(90, 90 + size), s.ids]), s.scored + size) for s in made]


def branching(rng, groups=2, members=4, shared=30, own=200):
    """Sequences as search episodes make them: a prompt for each group, and members that part from one another later."""
    made = []
    for _ in range(groups):
        prompt = rng.integers(0, VOCABULARY, shared)
        first = rng.integers(0, VOCABULARY, own // 2)
        for member in range(members):
            tail = rng.integers(0, VOCABULARY, int(rng.integers(1, own)))
            ids = np.concatenate([prompt, first[: member % 3 * own // 4], tail])
            scored = np.flatnonzero(rng.random(len(ids)) < 0.3)
            made.append(TokenSequence(ids, scored[scored >= shared]))
    return [sequence for sequence in made if len(sequence.scored)]
