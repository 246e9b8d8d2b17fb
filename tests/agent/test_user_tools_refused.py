"""Tools of the user's own that are refused, and how a call of them can go wrong."""

import asyncio
import contextlib
from contextlib import asynccontextmanager

import pytest
from fakes import PassageRetriever
from playing import ANSWER, SEARCH, play
from test_user_tools import TEXT, Adder, Lookup, agent, schema

from agentrl.agent.protocols import SearchTags
from agentrl.agent.tools import Toolbox, ToolError, check_tool, spec_of
from agentrl.config import AgentConfig, ConfigError, ToolConfig
from agentrl.types import Action, End, FailureCause
from retrievers.base import Hit


def tool(name, **rest):
    module = "test_user_tools" if name in ("Adder", "Lookup") else __name__
    return {"kind": f"{module}:{name}", **rest}


class NoName:
    description, parameters = "x", schema()

    async def call(self):
        return ""


class BadName(NoName):
    name = "answer"


class BadSchema(NoName):
    name, parameters = "bad", {"type": "object", "properties": {"a": {"type": "text"}}}


class NoSchema(NoName):
    name, parameters = "bad", {"a": "string"}


class NotAsync(NoName):
    name = "bad"

    def call(self):
        return ""


class OtherArguments(NoName):
    name, parameters = "bad", schema("a", a=TEXT)


class NeedsMore(NoName):
    name, parameters = "bad", schema(a=TEXT)

    async def call(self, a):
        return a


class Raises(NoName):
    name = "bad"

    def __init__(self):
        raise OSError("no such database")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("NoName", "has no `name`"),
        ("BadName", "none of answer, invalid"),
        ("BadSchema", "are no JSON schema: 'text' is not valid"),
        ("NoSchema", 'must be a JSON schema of "type": "object"'),
        ("NotAsync", "must be `async def`"),
        ("OtherArguments", "does not take what its `parameters` say"),
        ("NeedsMore", "missing a required argument: 'a'"),
        ("Raises", "cannot be made: OSError: no such database .*test_user_tools_refused.py:"),
        ("Missing", "cannot be imported: .*Missing"),
    ],
)
def test_a_tool_that_cannot_work_is_refused_by_its_name_and_what_it_lacks(name, problem):
    kind = f"{__name__}:{name}"
    with pytest.raises(ConfigError, match=rf"agent\.tools: .*{name}.*{problem}"):
        Toolbox([ToolConfig(kind=kind)], PassageRetriever(), 3)


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        (schema("b", a=TEXT), "require b, which is none of their properties"),
        (schema(a=True), "must describe each property by an object"),
        (schema(a={"$ref": "#/$defs/size"}), "refer to #/\\$defs/size, which is not there"),
        (schema() | {"patternProperties": {"^x": TEXT}}, "have patternProperties beside their properties"),
        (schema(a=TEXT | {"default": {1, 2}}), "cannot be written as JSON"),
    ],
)
def test_a_schema_that_would_fail_in_every_call_is_refused_at_once(monkeypatch, parameters, problem):
    monkeypatch.setattr(OtherArguments, "parameters", parameters)
    with pytest.raises(ConfigError, match=problem):
        spec_of(OtherArguments, "mine")


def test_a_schema_may_refer_to_its_own_parts(codec, monkeypatch):
    parameters = schema("key", key={"$ref": "#/$defs/key"}) | {"$defs": {"key": {"type": "string", "minLength": 2}}}
    monkeypatch.setattr(Lookup, "parameters", parameters)
    monkeypatch.setattr(Lookup, "answer", staticmethod(lambda key: f"<{key}>"))
    called, _ = play(codec, ['<look>{"key": "ab"}</look>', ANSWER], config=agent(tool("Lookup")))
    assert called.calls[0].arguments == {"key": "ab"}
    refused, _ = play(codec, ['<look>{"key": "a"}</look>', ANSWER], config=agent(tool("Lookup")))
    assert refused.turns[0].action.argument == 'the key of look does not fit its schema, {"minLength": 2}'


class OfProperties:
    """Says what it is only once it is made."""

    parameters = schema("key", key=TEXT)

    @property
    def name(self):
        return "made"

    @property
    def description(self):
        return "Made up."

    @classmethod
    async def call(cls, key):
        return key


def test_a_class_method_and_a_property_are_as_good_as_what_an_instance_has():
    setting = ToolConfig(**tool("OfProperties"))
    check_tool(setting)
    assert [spec.name for spec in Toolbox([setting], PassageRetriever(), 3).specs] == ["made"]


def test_an_argument_that_is_not_needed_may_be_left_out(codec, monkeypatch):
    monkeypatch.setattr(Lookup, "parameters", schema(key=TEXT))
    monkeypatch.setattr(Lookup, "call", _default_key)
    episode, _ = play(codec, ["<look></look>", ANSWER], config=agent(tool("Lookup")))
    assert (episode.end, episode.turns[0].observation) == (End.ANSWERED, "\n<information>\nnone\n</information>\n")


async def _default_key(self, key="none"):
    return key


def test_white_space_around_a_text_is_none_of_it_where_its_schema_names_the_texts(codec, monkeypatch):
    monkeypatch.setattr(Lookup, "parameters", schema("key", key={"type": "string", "enum": ["red", "green"]}))
    monkeypatch.setattr(Lookup, "answer", staticmethod(lambda key: key))
    episode, _ = play(codec, ["<look> red </look>", ANSWER], config=agent(tool("Lookup")))
    assert episode.calls[0].arguments == {"key": "red"}


def test_a_mistake_quotes_no_schema_at_length(monkeypatch):
    monkeypatch.setattr(Lookup, "parameters", schema("key", key={"type": "string", "enum": ["word"] * 500}))
    assert len(spec_of(Lookup, "mine").problem({"key": "other"})) < 300


def test_arguments_that_are_nested_without_end_are_a_mistake(codec, monkeypatch):
    parameters = schema("list", list={"$ref": "#/$defs/list"})
    parameters |= {"$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}}}}
    monkeypatch.setattr(Lookup, "parameters", parameters)
    monkeypatch.setattr(Lookup, "call", _takes_a_list)
    episode, _ = play(
        codec,
        ["<look>{" + f'"list": {"[" * 300}{"]" * 300}' + "}</look>", ANSWER],
        config=agent(tool("Lookup"), max_turn_tokens=900, max_episode_tokens=2000),
    )
    assert (episode.end, episode.turns[0].action.argument) == (
        End.ANSWERED,
        "what look is called with is nested too deep",
    )


async def _takes_a_list(self, list):
    return "taken"


def test_a_call_that_does_not_stop_at_its_limit_is_told_as_late(codec, monkeypatch):
    monkeypatch.setattr(Lookup, "answer", staticmethod(lambda key: _stubborn(5)))
    episode, _ = play(codec, ["<look> x </look>", ANSWER], config=agent(tool("Lookup", timeout_seconds=2)))
    assert episode.calls[0].error == "The call was stopped after 2 seconds."


def test_a_call_that_does_not_stop_at_the_episodes_limit_ends_the_episode(codec, monkeypatch):
    monkeypatch.setattr(Lookup, "answer", staticmethod(lambda key: _stubborn(100)))
    episode, _ = play(codec, ["<look> x </look>", ANSWER], config=agent(tool("Lookup")), timeout=60.0)
    assert (episode.cause, len(episode.turns)) == (FailureCause.TIMEOUT, 1)


async def _stubborn(seconds):
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        return "late"
    return "in time"


class Swallowing(Lookup):
    """Its clean-up takes every exception for its own."""

    name = "swallow"

    @asynccontextmanager
    async def episode(self, question):
        with contextlib.suppress(Exception):
            yield


def test_a_clean_up_that_swallows_exceptions_hides_none(codec):
    config, down = agent(tool("Swallowing"), "search"), PassageRetriever(error="down")
    episode, _ = play(codec, [SEARCH], config=config, retriever=down)
    assert (episode.cause, episode.failure) == (FailureCause.RETRIEVER, "down")
    used, _ = play(codec, ["<swallow> Rome </swallow>", ANSWER], config=config)
    assert used.calls[0].passage_ids == ("k1",)


class Undecorated(NoName):
    name = "bad"

    async def episode(self, question):
        yield self


class Synchronous(NoName):
    name = "bad"

    @contextlib.contextmanager
    def episode(self, question):
        yield self


def test_an_episode_that_is_no_context_manager_is_named():
    with pytest.raises(ConfigError, match="`episode` of mine must be an @asynccontextmanager"):
        spec_of(Undecorated, "mine")


def test_an_episode_that_is_a_synchronous_context_manager_is_named(codec):
    episode, _ = play(codec, [ANSWER], config=agent(tool("Synchronous")))
    assert "`episode` of test_user_tools_refused:Synchronous must be an @asynccontextmanager" in episode.failure


@pytest.mark.parametrize("hit", [Hit(7, "text", 1.0), Hit("a", None, 1.0), Hit("a", "text", "high")])
def test_passages_of_other_types_fail_the_episode_and_name_the_tool(codec, monkeypatch, hit):
    monkeypatch.setattr(Lookup, "answer", staticmethod(lambda key: [hit]))
    episode, _ = play(codec, ["<look> Rome </look>"], config=agent(tool("Lookup")))
    assert episode.cause is FailureCause.CODE
    assert "the tool look (test_user_tools:Lookup) returned" in episode.failure


def test_a_refusal_is_recorded_in_part_however_long_it_is(codec, monkeypatch):
    def refuse(key):
        raise ToolError("no " * 1_000_000)

    monkeypatch.setattr(Lookup, "answer", staticmethod(refuse))
    episode, _ = play(codec, ["<look> Rome </look>", ANSWER], config=agent(tool("Lookup")))
    assert 100 < len(episode.calls[0].error) <= 1000


class Misspelt(SearchTags):
    def parse(self, text):
        return Action("loook", text)


def test_a_protocol_that_asks_for_a_tool_that_there_is_not_is_told_which_there_are(codec):
    episode, _ = play(codec, ["x"], config=agent(tool("Lookup"), protocol=f"{__name__}:Misspelt"))
    assert "the protocol asked for the tool 'loook'; there is look" in episode.failure


class OwnSearch(Adder):
    name = "search"


def test_an_own_tool_takes_no_name_of_a_packaged_one():
    for check in (check_tool, lambda setting: Toolbox([setting], PassageRetriever(), 3)):
        with pytest.raises(ConfigError, match=r"has the name of a packaged tool, search.*retriever\.target"):
            check(ToolConfig(**tool("OwnSearch")))


def test_a_place_for_the_question_is_looked_for_in_the_users_instruction_alone(codec, monkeypatch):
    monkeypatch.setattr(Lookup, "description", "Look up {question} or a key.")
    asked = SearchTags(AgentConfig(tools=[tool("Lookup")]), codec).ask("why?")
    assert "Look up {question} or a key" in asked
    assert asked.endswith("Question: why?\n")


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two tools have the name add"):
        Toolbox([ToolConfig(**tool("Adder")), ToolConfig(**tool("Adder"))], PassageRetriever(), 3)
