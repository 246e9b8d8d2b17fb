"""Demonstrations: episodes that follow a script instead of a model, through the real protocol and the real retriever.

A script is written from a question's gold passages. Its episode is kept only if the passages that came back hold the answer,
so a demonstration never claims what it did not read. Several structures are written (one search, two, a wasted one, a
direct answer), so that a policy trained on them occupies several strata.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from agentrl.agent.codec import Codec
from agentrl.agent.scripted import ScriptPlayer
from agentrl.config import AgentConfig, Config, ConfigError, RetrieverConfig
from agentrl.data.questions import read_questions
from agentrl.models import load_tokenizer, resolve_model
from agentrl.progress import OnProgress, Progress
from agentrl.scores import normalize_answer
from agentrl.types import INVALID, AgentRLError, End, Question, Trajectory
from retrievers.base import Retriever, RetrieverError

# How often each structure is tried; a structure that the passages do not support is not written.
_SINGLE_HOP = {"by question": 0.36, "by title": 0.27, "wasted first": 0.22, "direct": 0.15}
_SEVERAL_HOPS = {"by titles": 0.55, "question, then title": 0.18, "question, then titles": 0.12, "direct": 0.15}


def collect_apart(config: Config, on_progress: OnProgress) -> list[Trajectory]:
    """Collect demonstrations in a process of their own, which keeps Java out of the one that trains.

    Raises:
        ConfigError, RetrieverError: as `collect_demonstrations`.
        AgentRLError: if the process ends before it is done.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_demonstrations, args=(config, sender), daemon=True)
    process.start()
    # The process holds the only other sender, so its end is the end of what can be received.
    sender.close()
    while True:
        try:
            event = receiver.recv()
        except EOFError:
            process.join()
            raise AgentRLError(f"the process that writes demonstrations ended with status {process.exitcode}") from None
        if isinstance(event, Exception):
            raise event
        if not isinstance(event, Progress):
            return event
        on_progress(event)


def _send_demonstrations(config: Config, sender: Connection) -> None:
    try:
        sender.send(collect_demonstrations(config, sender.send))
    except (AgentRLError, RetrieverError, OSError) as error:
        sender.send(error)


def collect_demonstrations(config: Config, on_progress: OnProgress) -> list[Trajectory]:
    """Write the demonstrations of every source of `config.warmstart`, each searching its own index.

    Lucene runs in this process.

    Raises:
        ConfigError: if a source yields fewer than half of the demonstrations it asks for.
        RetrieverError: if an index is missing or unsound.
    """
    config.require("warmstart")
    sources = config.warmstart.sources
    # Read at once: what is wrong with the last file is said before the first demonstration is written.
    questions_of = [read_questions(config.data.resolve(source.questions), name=source.name) for source in sources]
    # The process that trains has no use for Java's libraries.
    from retrievers.backends import open_index

    base = config.retriever or RetrieverConfig(index="-")
    codec = Codec(load_tokenizer(resolve_model(config.model.path)))
    written: list[Trajectory] = []
    for position, (source, questions) in enumerate(zip(sources, questions_of, strict=True)):
        phase = f"demonstrations {source.name or source.questions}"
        on_progress(Progress(0, phase, 0, source.count))
        new = asyncio.run(
            write_demonstrations(
                questions,
                source.count,
                config=config.agent,
                codec=codec,
                retriever=open_index(config.data.resolve_index(source.index), **base.options),
                k=base.k,
                seed=config.seed + position,
                on_done=lambda done, phase=phase, source=source: on_progress(Progress(0, phase, done, source.count)),
            )
        )
        if 2 * len(new) < source.count:
            raise ConfigError(
                f"warmstart.sources.{position}: {len(questions)} questions gave {len(new)} demonstrations, not "
                f"{source.count}; ask for fewer, or check that the index holds their gold passages"
            )
        written += new
    return written


async def write_demonstrations(
    questions: Sequence[Question],
    count: int,
    *,
    config: AgentConfig,
    codec: Codec,
    retriever: Retriever,
    k: int,
    seed: int,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Trajectory]:
    """Write up to `count` demonstrations, at most one for each question, in an order drawn from `seed`.

    Questions need `metadata["supporting_titles"]` in hop order for more than a search by the question itself.

    Raises:
        EnvironmentFailure: if retriever or protocol raise what they do not document.
    """
    rng = random.Random(seed)
    order = list(questions)
    rng.shuffle(order)
    player = ScriptPlayer(config, codec, retriever, k)
    demonstrations: list[Trajectory] = []
    for question in order:
        if len(demonstrations) == count:
            break
        queries = _queries(question, rng)
        if queries is None:
            continue
        trajectory = await _perform(question, queries, rng, player)
        if trajectory is not None:
            demonstrations.append(trajectory)
            on_done(len(demonstrations))
    return demonstrations


def _queries(question: Question, rng: random.Random) -> tuple[str, ...] | None:
    """Draw the structure of a demonstration and return its searches, or None where it needs titles that are not given."""
    titles = tuple(question.metadata.get("supporting_titles") or ())
    as_query = question.text.rstrip("?").strip()
    hops = int(question.metadata.get("hops", 1))
    several = hops > 1
    table = _SEVERAL_HOPS if several else _SINGLE_HOP
    structure = rng.choices(list(table), weights=list(table.values()))[0]
    if structure not in ("direct", "by question") and len(titles) < hops:
        if several:
            return None
        structure = "by question"
    match structure:
        case "direct":
            return ()
        case "by question":
            return (as_query,)
        case "by title":
            return titles[:1]
        case "wasted first":
            return as_query, titles[0]
        case "by titles":
            return titles[:hops]
        case "question, then title":
            return as_query, *titles[1:hops]
        case _:
            return as_query, *titles[:hops]


async def _perform(
    question: Question, queries: Sequence[str], rng: random.Random, player: ScriptPlayer
) -> Trajectory | None:
    """Search for `queries` and answer; return None if the passages that come back do not support an accepted answer."""
    answer = question.golden_answers[0]
    turns = [
        f"<think> {_thought(n, query, question, rng)} </think>\n<search> {query} </search>"
        for n, query in enumerate(queries)
    ]
    last = rng.choice(("Now I can answer.", "The passages say it.", "This answers the question."))
    thought = last if queries else rng.choice(("I know this.", "I can answer this without searching."))
    # A rehearsal shows which of the accepted answers stands in the passages, so that the demonstration copies that one.
    if queries:
        rehearsal = await player.play(question, [*turns, f"<answer> {answer} </answer>"])
        if not _sound(rehearsal):
            return None
        read = normalize_answer(" ".join(turn.observation for turn in rehearsal.turns))
        found = [
            gold
            for gold in question.golden_answers
            if normalize_answer(gold) and f" {normalize_answer(gold)} " in f" {read} "
        ]
        if found:
            answer = found[0]
        elif normalize_answer(answer) not in ("yes", "no"):
            return None
    turns.append(f"<think> {thought} </think>\n<answer> {answer} </answer>")
    trajectory = await player.play(question, turns)
    return trajectory if _sound(trajectory) else None


def _sound(trajectory: Trajectory) -> bool:
    """Return whether an episode ended with an answer, and the protocol understood each of its turns."""
    return trajectory.end is End.ANSWERED and all(t.action.kind != INVALID for t in trajectory.turns)


def _thought(position: int, query: str, question: Question, rng: random.Random) -> str:
    by_title = query in (question.metadata.get("supporting_titles") or ())
    if position == 0 and not by_title:
        return rng.choice(("I should look this up.", "I search for the question itself."))
    if position == 0:
        return f"I need to know about {query}."
    return rng.choice((f"Next I need {query}.", f"Now I look up {query}."))
