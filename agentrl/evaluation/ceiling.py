"""The ceiling: what a perfect searcher would score on questions whose gold passages are known.

It is played, not estimated: every query of a small family goes through the real protocol and the real retriever, and a
sequence of them that leads to the answer is an episode that a policy could have written. What stays below 1 is what the
retriever does not find for these queries, and what the limits of `agent` cut off.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.agent.codec import Codec
from agentrl.agent.protocols import get_protocol
from agentrl.agent.scripted import ScriptPlayer
from agentrl.config import Config, ConfigError
from agentrl.evaluation.run import Evaluation, evaluation_of
from agentrl.models import load_tokenizer, resolve_model
from agentrl.rollout.retriever import make_retriever
from agentrl.scores import normalize_answer
from agentrl.types import SEARCH, Action, End, Question, Trajectory, check_failures

_WANTED = {
    "capital": "capital of {}",
    "currency": "currency of {}",
    "language": "main language of {}",
    "calling_code": "calling code of {}",
    "tld": "internet domain of {}",
    "neighbour": "land neighbour of {}",
    "province_code": "ISO code of {}",
}
"""A query that names what is wanted of a place, by how a question's `metadata.kind` ends."""

_NOTHING_FOUND = "unknown"
"""The answer where no sequence of searches leads to one."""

_CONCURRENT = 64


@dataclass(frozen=True, slots=True)
class Query:
    """A query for the gold passage of hop `hop`, counted from 0; it takes the passages of all hops before to think of it."""

    text: str
    hop: int


@dataclass(frozen=True, slots=True)
class _Reading:
    """What the search for a query brings: the hops whose gold passages came back, and the answer if the last one shows it.

    A yes or no is not legible: it follows from the passages of all hops.
    """

    query: Query
    hops: frozenset[int]
    answer: str | None
    is_legible: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """Searches that lead to the answer, or to `_NOTHING_FOUND` as far as any do."""

    queries: tuple[Query, ...]
    answer: str


def measure_ceiling(
    config: Config,
    indexes: Sequence[Any],
    questions: Sequence[Question],
    on_done: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Score the perfect searcher of `perfect_episodes` through the retriever of `config`, whose Ray actors are `indexes`.

    It takes the tokenizer of the model and not its weights. Caches and recordings of the run are left alone. `on_done` is
    told how many questions are done.

    Raises:
        ConfigError: if the protocol does not read a search between <search> and </search>.
        EnvironmentFailure: if more than `rollout.max_failed_share` of the episodes failed.
        ModelError, RetrieverError: if the tokenizer or the retriever cannot be had.
    """
    config.require("retriever")
    codec = searcher_codec(config)
    trajectories = asyncio.run(_measure(config, codec, indexes, questions, on_done))
    check_failures(trajectories, config.rollout.max_failed_share)
    return evaluation_of(questions, trajectories)


def searcher_codec(config: Config) -> Codec:
    """Return the codec of the perfect searcher.

    Raises:
        ConfigError: if the protocol does not read a search between <search> and </search>.
        ModelError: if the tokenizer cannot be had.
    """
    codec = Codec(load_tokenizer(resolve_model(config.model.path, weights=False)))
    if get_protocol(config.agent, codec).parse(_search("x")) != Action(SEARCH, "x"):
        raise ConfigError(
            f"evaluation.ceiling: the perfect searcher writes `{_search('query')}`, which agent.protocol "
            f"{config.agent.protocol} does not read as a search; set evaluation.ceiling to false, or take another protocol"
        )
    return codec


async def _measure(
    config: Config,
    codec: Codec,
    indexes: Sequence[Any],
    questions: Sequence[Question],
    on_done: Callable[[int], None],
) -> list[Trajectory]:
    bare = config.retriever.model_copy(update={"cache": None, "record": None})
    retriever = make_retriever(bare, config.data, "", indexes)
    try:
        return await perfect_episodes(questions, ScriptPlayer(config.agent, codec, retriever, bare.k), on_done)
    finally:
        # Of packaged retrievers only the client of a server holds something open.
        if hasattr(retriever, "close"):
            await retriever.close()


async def perfect_episodes(
    questions: Sequence[Question], player: ScriptPlayer, on_done: Callable[[int], None] = lambda done: None
) -> list[Trajectory]:
    """Play one episode for each question, in the order of the questions.

    It is the one with the fewest searches that reads an accepted answer in the last hop's gold passage and ends within the
    limits of `agent`. Its searches are for queries of `queries_of` that what was read before allows,
    and a yes or no counts as read with the gold passages of all hops. Where there is no such episode, it ends with the answer
    "unknown". Questions need `metadata.supporting_titles` and `metadata.gold_passage_ids`, both in hop order.

    Raises:
        EnvironmentFailure: if retriever or protocol raise what they do not document.
    """
    places = asyncio.Semaphore(_CONCURRENT)
    done = 0

    async def play(question: Question) -> Trajectory:
        nonlocal done
        async with places:
            trajectory = await _perfect_episode(question, player)
        done += 1
        on_done(done)
        return trajectory

    return list(await asyncio.gather(*map(play, questions)))


def queries_of(question: Question) -> list[Query]:
    """Return the queries that a perfect searcher tries: for each hop up to two, and last the question without its mark.

    They are the title of the hop's gold passage and, where `metadata.kind` and `metadata.chain` tell what the passage should
    say of which place, that, such as "capital of Vietnam".
    """
    titles = question.metadata["supporting_titles"]
    queries = []
    for hop, title in enumerate(titles):
        queries.append(Query(title, hop))
        wanted = _wanted(question, hop, last=hop == len(titles) - 1)
        if wanted is not None:
            queries.append(Query(wanted, hop))
    return [*queries, Query(question.text.rstrip("?").strip(), 0)]


def _wanted(question: Question, hop: int, last: bool) -> str | None:
    kind, chain = str(question.metadata.get("kind", "")), question.metadata.get("chain", ())
    if not last:
        # Of the hops before the last one, only a neighbour has a name in this table, and it comes just before the last.
        is_neighbour = "neighbour_" in kind and hop == len(question.metadata["supporting_titles"]) - 2
        kind = "neighbour" if is_neighbour else ""
    wording = next((wording for ending, wording in _WANTED.items() if kind.endswith(ending)), None)
    if wording is None or not isinstance(chain, list | tuple) or hop >= len(chain):
        return None
    return wording.format(chain[hop])


async def _perfect_episode(question: Question, player: ScriptPlayer) -> Trajectory:
    readings: list[_Reading] = []
    for query in queries_of(question):
        tried = await player.play(question, [_search(query.text), _answer(_NOTHING_FOUND)])
        if not tried.valid:
            return tried
        readings.append(_read(question, query, tried))
    hops = len(question.metadata["supporting_titles"])
    played = None
    for plan in _plans(readings, hops, player.config.max_turns):
        played = await player.play(question, [*(_search(query.text) for query in plan.queries), _answer(plan.answer)])
        # One with other searches may fit where this one was cut off.
        if not played.valid or played.end is End.ANSWERED:
            return played
    return played or await player.play(question, [_answer(_NOTHING_FOUND)])


def _read(question: Question, query: Query, tried: Trajectory) -> _Reading:
    found = {passage for search in tried.searches for passage in search.passage_ids}
    gold = question.metadata["gold_passage_ids"]
    hops = frozenset(hop for hop, passage in enumerate(gold) if passage in found)
    shown = f" {normalize_answer(' '.join(turn.observation for turn in tried.turns))} "
    words_of = {answer: normalize_answer(answer) for answer in question.golden_answers}
    # An answer in another passage, such as a language that many countries share, would be read by luck.
    if len(gold) - 1 not in hops:
        return _Reading(query, hops, None, False)
    legible = next((answer for answer, words in words_of.items() if words and f" {words} " in shown), None)
    inferred = next((answer for answer, words in words_of.items() if words in ("yes", "no")), None)
    return _Reading(query, hops, legible if inferred is None else inferred, inferred is None)


def _plans(readings: Sequence[_Reading], hops: int, most: int) -> Iterator[_Plan]:
    """Yield sequences of at most `most` searches to the answer, those with fewer searches first, and last the one without.

    The last one has found as many hops as any. No two others end with the same search after finding the same hops.
    """
    earlier = frozenset(range(hops - 1))
    best: tuple[frozenset[int], tuple[Query, ...]] = frozenset(), ()
    ahead = deque([best])
    seen = {frozenset[int]()}
    while ahead:
        found, queries = ahead.popleft()
        if len(queries) == most:
            continue
        for reading in readings:
            if not found.issuperset(range(reading.query.hop)):
                continue
            now, then = found | reading.hops, (*queries, reading.query)
            if reading.answer is not None and (reading.is_legible or now >= earlier):
                yield _Plan(then, reading.answer)
            if now not in seen:
                seen.add(now)
                ahead.append((now, then))
                best = max(best, (now, then), key=lambda state: len(state[0]))
    yield _Plan(best[1], _NOTHING_FOUND)


def _search(query: str) -> str:
    return f"<search> {query} </search>"


def _answer(answer: str) -> str:
    return f"<answer> {answer} </answer>"
