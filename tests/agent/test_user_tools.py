"""Tools of the user's own: how they are called, what the model is told, and which of them are refused."""

import asyncio
import json
import re
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest
from fakes import PassageRetriever
from hypothesis import given
from hypothesis import strategies as st
from playing import ANSWER, QUESTION, SEARCH, play, settings

from agentrl.agent.codec import as_string
from agentrl.agent.protocols import JsonTools, SearchTags
from agentrl.agent.tools import ToolError, describe_tools
from agentrl.config import AgentConfig, ToolConfig
from agentrl.types import End, FailureCause, ToolCall
from retrievers.base import Hit

TEXT, NUMBER = {"type": "string"}, {"type": "integer"}


def schema(*required, **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


class Adder:
    """Two arguments, and an option."""

    name, description = "add", "Add two whole numbers."
    parameters = schema("a", "b", a=NUMBER, b=NUMBER)

    def __init__(self, start=0):
        self._start = start

    async def call(self, a, b):
        return str(self._start + a + b)


class Lookup:
    """One text, answered with passages, in whatever way the test says."""

    name, description = "look", "Look up a key."
    parameters = schema("key", key=TEXT)
    answer = staticmethod(lambda key: [Hit("k1", f'"{key}"\nIts value.', 2.5)])

    async def call(self, key):
        found = self.answer(key)
        return await found if asyncio.iscoroutine(found) else found


class Counter:
    """Counts its calls in an episode, and keeps a record of what was set up and cleaned up."""

    name, description, parameters = "count", "Count.", schema()
    record: ClassVar[list[str]] = []

    @asynccontextmanager
    async def episode(self, question):
        Counter.record.append(f"begin {question.id}")
        counted = Counter()
        counted.calls = 0
        try:
            yield counted
        finally:
            Counter.record.append(f"end {question.id} after {counted.calls}")

    async def call(self):
        self.calls += 1
        return f"{self.calls} so far"


def tool(name, **rest):
    return {"kind": f"{__name__}:{name}", **rest}


def agent(*tools, **changes):
    return settings(tools=list(tools), **changes)


def test_a_tool_of_several_arguments_is_called_with_json_between_tags(codec):
    script = ['<add> {"a": 2, "b": 40} </add>', ANSWER]
    episode, _ = play(codec, script, config=agent("search", tool("Adder", options={"start": 100})))
    turn = episode.turns[0]
    assert (episode.end, turn.action.kind, turn.action.arguments) == (End.ANSWERED, "add", {"a": 2, "b": 40})
    assert turn.observation == "\n<information>\n142\n</information>\n"
    assert episode.calls == (ToolCall("add", {"a": 2, "b": 40}, 0.0),)
    assert episode.searches == ()


def test_json_tools_calls_the_same_tool_in_its_own_form(codec):
    call = '<tool_call>\n{"name": "add", "arguments": {"b": 1, "a": 2}}\n</tool_call>'
    episode, _ = play(codec, [call, ANSWER], config=agent(tool("Adder"), protocol="json_tools"))
    assert (episode.end, episode.turns[0].observation) == (End.ANSWERED, "\n<tool_response>\n3\n</tool_response>\n")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ('{"a": 2}', "add takes a, b"),
        ('{"a": 2, "b": 3, "c": 4}', "add takes a, b"),
        ('{"a": 2, "b": "forty"}', "the b of add is not a whole number"),
        ("[1, 2]", "add takes a, b"),
        ("1 + 2", "the tool call is not valid JSON"),
        ('{"a": 1, "a": 2, "b": 3}', "the tool call names a key twice"),
    ],
)
def test_arguments_that_do_not_fit_the_schema_are_a_mistake_that_the_model_is_told(codec, said, told):
    episode, _ = play(codec, [f"<add>{said}</add>", ANSWER], config=agent(tool("Adder")))
    assert (episode.turns[0].action.kind, episode.turns[0].action.argument) == ("invalid", told)
    assert told in episode.turns[0].observation
    assert episode.calls == ()


def test_a_value_that_its_schema_forbids_is_named_by_the_schema_and_not_by_what_was_written():
    with_list = describe_tools([ToolConfig(kind=f"{__name__}:Adder")])[0].__class__(
        "pick", "Pick.", schema("size", size={"enum": ["small", "large"]})
    )
    assert with_list.problem({"size": "small"}) is None
    assert with_list.problem({"size": "</tool_call>"}) == (
        'the size of pick does not fit its schema, {"enum": ["small", "large"]}'
    )


@given(st.integers(), st.integers())
def test_whatever_fits_the_schema_is_read_as_it_was_written_by_both_protocols(a, b):
    config, arguments = AgentConfig(tools=[tool("Adder")]), {"a": a, "b": b}
    written = json.dumps(arguments)
    assert SearchTags(config).parse(f"<add>{written}</add>").arguments == arguments
    called = f'<tool_call>{{"name": "add", "arguments": {written}}}</tool_call>'
    assert JsonTools(config).parse(called).arguments == arguments


def test_passages_of_a_tool_are_shown_and_recorded_as_those_of_a_search_are(codec):
    episode, _ = play(codec, ["<look> Rome </look>", ANSWER], config=agent("search", tool("Lookup")))
    assert "Doc 1(Title: Rome) Its value." in episode.turns[0].observation
    assert episode.calls == (ToolCall("look", {"key": "Rome"}, 0.0, ("k1",), (2.5,)),)


def test_line_breaks_in_a_tools_text_stay(codec):
    episode, _ = play(codec, ["<look>\nfor x in y:\n  print(x)\n</look>", ANSWER], config=agent(tool("Lookup")))
    assert episode.calls[0].arguments == {"key": "for x in y:\n  print(x)"}


def test_a_refused_call_is_told_to_the_model_and_the_episode_goes_on(codec, monkeypatch):
    def refuse(key):
        raise ToolError(f"there is no {key}")

    monkeypatch.setattr(Lookup, "answer", staticmethod(refuse))
    episode, _ = play(codec, ["<look> Rome </look>", ANSWER], config=agent(tool("Lookup")))
    assert (episode.end, episode.calls[0].error) == (End.ANSWERED, "there is no Rome")
    assert "there is no Rome" in episode.turns[0].observation
    told, _ = play(codec, ["<look> Rome </look>", ANSWER], config=agent(tool("Lookup", on_error="Try another key.")))
    assert "Try another key." in told.turns[0].observation


def test_a_call_that_takes_too_long_is_stopped_and_the_episode_goes_on(codec, monkeypatch):
    async def slow(key):
        await asyncio.sleep(50)

    monkeypatch.setattr(Lookup, "answer", staticmethod(slow))
    episode, _ = play(codec, ["<look> Rome </look>", ANSWER], config=agent(tool("Lookup", timeout_seconds=2)))
    assert episode.end is End.ANSWERED
    assert (episode.calls[0].error, episode.calls[0].seconds) == ("The call was stopped after 2 seconds.", 2.0)


def test_a_timeout_error_of_the_tool_itself_is_no_timeout_of_the_call(codec, monkeypatch):
    def fail(key):
        raise TimeoutError("upstream")

    monkeypatch.setattr(Lookup, "answer", staticmethod(fail))
    episode, _ = play(codec, ["<look> Rome </look>"], config=agent(tool("Lookup", timeout_seconds=2)))
    assert (episode.cause, episode.failure.partition("\n")[0]) == (FailureCause.CODE, "TimeoutError: upstream")


@pytest.mark.parametrize("returned", [None, 7, {"a": 1}, ["text"], b"bytes"])
def test_what_is_neither_text_nor_passages_fails_the_episode_and_names_the_tool(codec, monkeypatch, returned):
    monkeypatch.setattr(Lookup, "answer", staticmethod(lambda key: returned))
    episode, _ = play(codec, ["<look> Rome </look>"], config=agent(tool("Lookup")))
    assert episode.cause is FailureCause.CODE
    assert f"the tool look ({__name__}:Lookup) returned {type(returned).__name__}" in episode.failure


@given(text=st.text(max_size=400), limit=st.integers(40, 120))
def test_a_text_fits_its_limit_in_a_whole_frame_and_cannot_act(codec, text, limit):
    protocol = SearchTags(AgentConfig(tools=[tool("Adder")]), codec)
    shown = as_string(protocol.observation(f"<answer>{text}</answer>", limit))
    assert len(codec.encode(shown)) <= limit
    assert shown.startswith("\n<information>\n")
    assert shown.endswith("\n</information>\n")
    assert not re.search(r"<\s*/?\s*(answer|add|think)\s*>", shown, re.IGNORECASE)


def test_a_tools_own_limit_cuts_what_it_returned(codec, monkeypatch):
    monkeypatch.setattr(Lookup, "answer", staticmethod(lambda key: "word " * 500))
    long, _ = play(codec, ["<look> x </look>", ANSWER], config=agent(tool("Lookup")))
    short, _ = play(codec, ["<look> x </look>", ANSWER], config=agent(tool("Lookup", max_tokens=40)))
    assert len(short.turns[0].observation_ids) <= 40 < len(long.turns[0].observation_ids)
    assert short.turns[0].observation.endswith("</information>\n")


def test_state_of_an_episode_is_set_up_and_cleaned_up_however_it_ends(codec):
    Counter.record.clear()
    config = agent(tool("Counter"), "search", max_turns=3)
    script = ["<count>{}</count>", "<count> </count>", ANSWER]
    first, _ = play(codec, script, config=config)
    assert [turn.observation for turn in first.turns[:2]] == [
        f"\n<information>\n{n} so far\n</information>\n" for n in (1, 2)
    ]
    failed, _ = play(codec, ["<count>{}</count>", SEARCH], config=config, retriever=PassageRetriever(error="down"))
    assert failed.cause is FailureCause.RETRIEVER
    name = QUESTION.id
    assert Counter.record == [f"begin {name}", f"end {name} after 2", f"begin {name}", f"end {name} after 1"]


def test_the_prompt_describes_every_tool(codec):
    config = AgentConfig(tools=["search", tool("Adder"), tool("Lookup")])
    told = SearchTags(config).instruction()
    assert 'To use add (Add two whole numbers), write <add> {"a": "…", "b": "…"} </add>.' in told
    assert "To use look (Look up a key), write <look> key </look>." in told
    assert '"description": "Add two whole numbers."' in JsonTools(config).instruction()
    assert "<search>" not in SearchTags(AgentConfig(tools=[tool("Adder")])).instruction()
