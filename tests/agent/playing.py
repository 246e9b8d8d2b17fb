"""Plays one scripted episode by a clock that takes no time."""

import virtual_clock
from fakes import PassageRetriever, ScriptedEngine, passage

from agentrl.agent.episode import Agent
from agentrl.agent.protocols import get_protocol
from agentrl.config import AgentConfig
from agentrl.types import Question

QUESTION = Question("nq:7", "where does the Elbe end", ("Cuxhaven",))
SEARCH = "<think> Look. </think>\n<search> Elbe </search>"
ANSWER = "<answer> Cuxhaven </answer>"
NONSENSE = "I would rather not say."
ELBE = passage("Elbe", "The Elbe ends at Cuxhaven.")


def settings(**changes):
    return AgentConfig(**({"instruction": "", "max_turns": 2, "max_invalid": 1} | changes))


def play(
    codec, script, *, config=None, retriever=None, question=QUESTION, name="1/0/0", seed=5, timeout=60.0, version=0
):
    engine = ScriptedEngine(codec, script, version)
    agent = Agent(config or settings(), codec, engine, retriever or PassageRetriever(ELBE), 3)
    return virtual_clock.run(agent.run(question, name, temperature=0.7, seed=seed, timeout=timeout)), engine


def prompt_of(config, codec):
    return codec.encode(get_protocol(config, codec).prompt(QUESTION.text))
