"""Demonstrations in made-up worlds: how often a policy that knows nothing yet should search, and for what.

The mix is poor on purpose. Most demonstrations of questions with several hops stop too early and guess, and queries that
name what is wanted ("capital of Vietnam") are rare: what earns more is in the mix, and finding it is left to
reinforcement learning.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentrl.agent.codec import Codec
from agentrl.agent.scripted import ScriptPlayer
from agentrl.config import AgentConfig
from agentrl.demo.facts import World
from agentrl.demo.passages import Library, write_passages
from agentrl.demo.questions import draft_questions
from agentrl.demo.splits import balanced
from agentrl.demo.world import passage_row, question_rows
from agentrl.pocket.worlds import Names, make_up_world
from agentrl.scores import normalize_answer
from agentrl.types import INVALID, End, Question, Trajectory
from retrievers.backends import build_index, open_index

COUNTRIES = 96
"""The countries of a made-up world, with about 1,000 cities."""
QUESTIONS = {1: 630, 2: 780, 3: 210}
"""How many questions of a world are played, by hops."""

# By hops: how often each structure is tried. One whose passages do not come back is not written.
STRUCTURES: Mapping[int, Mapping[str, float]] = {
    1: {"direct": 0.32, "question": 0.25, "title": 0.25, "question, title": 0.15, "wanted": 0.03},
    2: {
        "direct": 0.24,
        "title, guess": 0.36,
        "question, guess": 0.1,
        "title, title": 0.16,
        "question, title": 0.06,
        "title, wanted": 0.03,
        "wanted, title": 0.03,
        "wanted, wanted": 0.02,
    },
    3: {
        "direct": 0.24,
        "title, guess": 0.28,
        "question, guess": 0.11,
        "title, title, guess": 0.14,
        "title, wanted, guess": 0.16,
        "title, wanted, title": 0.04,
        "title, wanted, wanted": 0.03,
    },
}

_WANTED = {
    "capital": "capital of {}",
    "currency": "currency of {}",
    "language": "main language of {}",
    "calling_code": "calling code of {}",
    "tld": "internet domain of {}",
    "neighbour": "land neighbour of {}",
}
"""By the end of a question's kind: a query that names the fact that is wanted of a place."""

# What a turn thinks before it searches or answers.
_ASKING = ("I should look this up.", "I search for the question itself.")
_FIRST = ("I need to know about {}.",)
_NEXT = ("Next I need {}.", "Now I look up {}.")
_READ = ("Now I can answer.", "The passages say it.", "This answers the question.")
_GUESSING = ("I know this.", "I can answer this without searching.")
WORDINGS = tuple(wording.format("") for wording in (*_ASKING, *_FIRST, *_NEXT, *_READ, *_GUESSING, *_WANTED.values()))
"""All words of demonstrations that stand in no question and no passage."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """An episode to train on.

    Attributes:
        token_ids: prompt, turns and observations.
        own: the length of `token_ids`; whether the model wrote the token.
        hops: of the question.
        structure: one of STRUCTURES[hops].
    """

    token_ids: list[int]
    own: list[bool]
    hops: int
    structure: str

    @property
    def guessed(self) -> bool:
        """Whether the answer was not read."""
        return is_guess(self.structure)


def is_guess(structure: str) -> bool:
    """Return whether demonstrations of a structure answer without having read the answer."""
    return structure == "direct" or structure.endswith("guess")


@dataclass(frozen=True, slots=True)
class MadeUp:
    """A made-up world, its passages, and its questions in random order."""

    world: World
    library: Library
    questions: list[Question]


def make_up(names: Names, seed: int) -> MadeUp:
    """Make up the world of this seed, with its passages and questions."""
    rng = random.Random(f"world:{seed}")
    world = make_up_world(names, COUNTRIES, rng)
    library = write_passages(world, seed)
    drafts = draft_questions(world, library, seed)
    chosen = [
        draft
        for hops, count in QUESTIONS.items()
        for draft in balanced([draft for draft in drafts if len(draft.passages) == hops], count, rng)
    ]
    rng.shuffle(chosen)
    questions = [
        Question(row["id"], row["question"], tuple(row["golden_answers"]), "made-up", row["metadata"])
        for row in question_rows(f"world{seed}", chosen)
    ]
    return MadeUp(world, library, questions)


def demonstrate(made_up: MadeUp, seed: int, *, config: AgentConfig, codec: Codec, k: int) -> list[Demonstration]:
    """Play the questions of a made-up world, which is searched through a Lucene index made for it.

    Lucene runs in this process. `k` passages come back for a search.

    Raises:
        RetrieverError: if the index cannot be built.
        EnvironmentFailure: if retriever or protocol raise what they do not document.
    """
    with tempfile.TemporaryDirectory(prefix="agentrl-world-") as scratch:
        corpus, index = Path(scratch, "corpus.jsonl"), Path(scratch, "index")
        rows = (json.dumps(passage_row(passage), ensure_ascii=False) + "\n" for passage in made_up.library.passages)
        corpus.write_text("".join(rows), encoding="utf-8")
        build_index(corpus, index)
        retriever = open_index(str(index))
        try:
            player = ScriptPlayer(config, codec, retriever, k)
            return asyncio.run(_play_all(made_up.questions, random.Random(f"demonstrations:{seed}"), player))
        finally:
            retriever.close()


async def _play_all(questions: Iterable[Question], rng: random.Random, player: ScriptPlayer) -> list[Demonstration]:
    played = [await play(question, draw_structure(question, rng), rng, player) for question in questions]
    return [demonstration for demonstration in played if demonstration is not None]


def draw_structure(question: Question, rng: random.Random) -> str:
    """Draw how to play a question, as often as STRUCTURES says."""
    table = STRUCTURES[question.metadata["hops"]]
    return rng.choices(list(table), weights=list(table.values()))[0]


@dataclass(frozen=True, slots=True)
class Search:
    """A search of a demonstration: the query, and the hop whose gold passage it wants, None where it asks the question itself."""

    query: str
    hop: int | None


def searches_of(question: Question, structure: str) -> list[Search] | None:
    """Return the searches of a structure, or None where the question has no query of that kind.

    "title" is the title of a hop's gold passage, "wanted" names what that passage should say, and "question" is the question.
    In "title, title" and the like the n-th search is of the n-th hop; what follows "question" is of the last hop.
    """
    steps = [step for step in structure.split(", ") if step not in ("direct", "guess")]
    hops, titles = question.metadata["hops"], question.metadata["supporting_titles"]
    searches = []
    for position, step in enumerate(steps):
        hop = hops - 1 if "question" in steps else position
        match step:
            case "question":
                search = Search(question.text.rstrip("?").strip(), None)
            case "title":
                search = Search(titles[hop], hop)
            case _:
                wanted = _wanted(question, hop)
                if wanted is None:
                    return None
                search = Search(wanted, hop)
        searches.append(search)
    return searches


def _wanted(question: Question, hop: int) -> str | None:
    """Return a query that names what the passage of a hop should say of its place, or None for a fact that has no such query."""
    hops, kind, place = question.metadata["hops"], question.metadata["kind"], question.metadata["chain"][hop]
    if hop == hops - 1:
        fact = next((fact for fact in _WANTED if kind.endswith(f"_{fact}")), None)
    else:
        # Only a country leads on to another country.
        fact = "neighbour" if hop == hops - 2 and "neighbour_" in kind else None
    return None if fact is None else _WANTED[fact].format(place)


async def play(question: Question, structure: str, rng: random.Random, player: ScriptPlayer) -> Demonstration | None:
    """Play a question in a structure; None if it has no such searches, or the passages that came back do not support it."""
    searches = searches_of(question, structure)
    if searches is None:
        return None
    turns = [
        f"<think> {_thought(position, search, rng)} </think>\n<search> {search.query} </search>"
        for position, search in enumerate(searches)
    ]
    thought = rng.choice(_READ if searches else _GUESSING)
    turns.append(f"<think> {thought} </think>\n<answer> {question.golden_answers[0]} </answer>")
    episode = await player.play(question, turns)
    if not _is_sound(episode) or not _is_supported(episode, searches, is_guess(structure)):
        return None
    return Demonstration(
        [*episode.prompt_ids, *episode.completion_ids],
        [False] * len(episode.prompt_ids) + episode.action_mask,
        question.metadata["hops"],
        structure,
    )


def _is_sound(episode: Trajectory) -> bool:
    return episode.end is End.ANSWERED and all(turn.action.kind != INVALID for turn in episode.turns)


def _is_supported(episode: Trajectory, searches: Sequence[Search], guessed: bool) -> bool:
    """Return whether an episode had read what it searches for and, unless it guesses, what it answers."""
    gold = episode.question.metadata["gold_passage_ids"]
    read: set[str] = set()
    for search, call in zip(searches, episode.searches, strict=True):
        # The place that a later hop is about is named by the passage of the hop before.
        if search.hop and gold[search.hop - 1] not in read:
            return False
        read.update(call.passage_ids)
    if guessed:
        return True
    shown = normalize_answer(" ".join(turn.observation for turn in episode.turns))
    return f" {normalize_answer(episode.question.golden_answers[0])} " in f" {shown} "


def _thought(position: int, search: Search, rng: random.Random) -> str:
    if search.hop is None:
        return rng.choice(_ASKING)
    return rng.choice(_FIRST if position == 0 else _NEXT).format(search.query)
