"""A JSON call is read exactly or refused with what is wrong, and each tool answers through the same episode."""

import asyncio
import json
import re

import pytest
from fakes import PassageRetriever, ScriptedEngine, passage
from hypothesis import given
from hypothesis import strategies as st

from agentrl.agent.episode import Agent
from agentrl.agent.protocols import JsonTools, get_protocol
from agentrl.config import AgentConfig, ConfigError
from agentrl.types import End, Question
from retrievers.base import Hit

QUESTION = Question("nq:7", "where does the Elbe end", ("Cuxhaven",))
BOTH = AgentConfig(
    protocol="json_tools", tools=["search", "open"], instruction="", max_turn_tokens=200, max_episode_tokens=2048
)
PROTOCOL = JsonTools(BOTH)
ANSWER = "<answer> Cuxhaven </answer>"


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Library(PassageRetriever):
    """Finds passages, and reads the whole documents that they are from."""

    def __init__(self, documents):
        super().__init__(*documents.values())
        self.documents = documents
        self.opened = []

    async def read(self, document_id):
        self.opened.append(document_id)
        text = self.documents.get(document_id)
        return None if text is None else Hit(document_id, text, 0.0)


def play(codec, script, config=BOTH, retriever=None):
    retriever = retriever or Library({"p0": passage("Elbe", "It ends at Cuxhaven.")})
    agent = Agent(config, codec, ScriptedEngine(codec, script), retriever, 3)
    return asyncio.run(agent.run(QUESTION, "1/0/0", temperature=1.0, seed=0, timeout=60.0))


@pytest.mark.parametrize(
    ("text", "kind", "argument"),
    [
        (call("search", query="capital of France"), "search", "capital of France"),
        (call("open", id="wiki/17"), "open", "wiki/17"),
        ('<think> x </think>\n<tool_call>{"arguments":{"query":"a"},"name":"search"}</tool_call>\n', "search", "a"),
        (call("search", query='a "quoted" \\ name\n é'), "search", 'a "quoted" \\ name é'),
        ("It is\n<answer> Paris </answer>", "answer", "Paris"),
        ("<think>I may write <tool_call> next.</think>\n" + call("search", query="a"), "search", "a"),
        ("<think>The <tool_response> says <answer></answer>.</think>" + ANSWER, "answer", "Cuxhaven"),
        (call("search", query="<think> </think> a"), "search", "<think> </think> a"),
    ],
)
def test_one_closed_action_is_read(text, kind, argument):
    action = PROTOCOL.parse(text)
    assert (action.kind, action.argument) == (kind, argument)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no <tool_call> or <answer> was closed"),
        (call("search", query="a") * 2, "more than one action"),
        (call("search", query="a") + ANSWER, "more than one action"),
        ("<tool_call>{}", "<tool_call> was not closed"),
        ("<tool_response>x</tool_response>" + ANSWER, "only the tools write"),
        ("<answer> </answer>", "the answer is empty"),
        ("<tool_call>search Elbe</tool_call>", "not valid JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
        ("<tool_call>" + "1" * 10_000 + "</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "search", "name": "open", "arguments": {}}</tool_call>', "names a key twice"),
        ('<tool_call>{"name": "search", "arguments": {"query": "a", "query": "b"}}</tool_call>', "names a key twice"),
        ("<tool_call>[]</tool_call>", "not of the form"),
        ('<tool_call>{"name": "search"}</tool_call>', "not of the form"),
        ('<tool_call>{"name": "search", "arguments": {"query": "a"}, "id": 1}</tool_call>', "not of the form"),
        (call("browse", url="x"), "no such tool; there is search, open"),
        (call(["search"], query="x"), "no such tool"),
        (call("search", q="x"), "search takes one argument, query"),
        (call("search", query="x", k=5), "search takes one argument, query"),
        ('<tool_call>{"name": "open", "arguments": "p0"}</tool_call>', "open takes one argument, id"),
        (call("open", id=17), "the id of open is not a text"),
        (call("search", query=" \n"), "the query of search is empty"),
    ],
)
def test_anything_else_is_refused_with_what_is_wrong(text, problem):
    action = PROTOCOL.parse(text)
    assert action.kind == "invalid"
    assert problem in action.argument


def test_a_tool_that_the_run_does_not_have_cannot_be_called():
    assert JsonTools().parse(call("open", id="p0")).kind == "invalid"
    assert "open" not in JsonTools().instruction()


def test_the_instruction_holds_the_schema_of_each_tool():
    shown = re.findall(r"^\{.*\}$", PROTOCOL.instruction().partition("</tools>")[0], re.MULTILINE)
    assert [json.loads(line)["function"]["name"] for line in shown] == ["search", "open"]


def test_every_turn_of_the_worked_examples_is_one_that_the_protocol_reads():
    for example in PROTOCOL.worked_examples(2).strip().split("\n\n"):
        _, _, episode = example.partition("\n")
        said = re.split(r"<tool_response>.*?</tool_response>\n", episode, flags=re.DOTALL)
        kinds = [PROTOCOL.parse(turn).kind for turn in said]
        assert kinds == ["search"] * (len(said) - 1) + ["answer"]


@given(st.text())
def test_a_correction_and_a_result_stand_in_their_frame(text):
    observation = PROTOCOL._frame(PROTOCOL.neutralise(text), False)
    assert len(PROTOCOL._tag.findall(observation)) == 2
    assert PROTOCOL.correction("x").startswith("\n<tool_response>\nInvalid action: x.")


@pytest.mark.parametrize("protocol", ["json_tools", "search_tags", "chat_tools"])
def test_a_document_that_a_search_has_shown_is_read_whole(chat_codec, protocol):
    config = BOTH.model_copy(update={"protocol": protocol, "max_observation_tokens": 600})
    look, read = call("search", query="Elbe"), call("open", id="p0")
    if protocol == "search_tags":
        look, read = "<search> Elbe </search>", "<open> p0 </open>"
    library = Library({"p0": passage("Elbe", "It ends at Cuxhaven.")})
    episode = play(chat_codec, [look, read, ANSWER], config, library)
    assert (episode.end, library.queries, library.opened) == (End.ANSWERED, ["Elbe"], ["p0"])
    assert [turn.action.kind for turn in episode.turns] == ["search", "open", "answer"]
    assert "Doc 1(Id: p0, Title: Elbe) It ends at Cuxhaven." in episode.turns[0].observation
    assert "It ends at Cuxhaven." in episode.turns[1].observation
    # Strata and statistics count searches, and reading is none.
    assert len(episode.searches) == 1


def test_a_document_that_is_not_there_is_said_not_to_be(codec):
    episode = play(codec, [call("open", id="p9"), ANSWER])
    assert "Nothing was found." in episode.turns[0].observation


def test_opening_counts_towards_the_limit_of_calls(codec):
    library = Library({})
    config = BOTH.model_copy(update={"max_turns": 1})
    episode = play(codec, [call("open", id="p9")] * 2, config, library)
    assert (episode.end, library.opened) == (End.TURN_LIMIT, ["p9"])


def test_opening_needs_a_retriever_that_can_read(codec):
    with pytest.raises(ConfigError, match=r"agent\.tools: `open` needs a retriever .* PassageRetriever has no"):
        play(codec, [ANSWER], retriever=PassageRetriever("x"))


@pytest.mark.parametrize("tools", [[], ["browse"], ["search", "search"]])
def test_tools_that_there_are_not_are_refused(tools):
    with pytest.raises(ValueError, match="tools"):
        AgentConfig(tools=tools)


class Shout(JsonTools):
    """A user's own protocol."""

    def instruction(self):
        return "SEARCH AND ANSWER! "


def test_a_protocol_of_ones_own_is_found_by_its_import_path(codec):
    config = AgentConfig(protocol="test_json_tools:Shout")
    assert get_protocol(config, codec).prompt("why?") == "SEARCH AND ANSWER!\nQuestion: why?\n"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("json_tool", "did you mean json_tools"),
        ("nowhere.to.be:Found", "cannot be imported"),
        ("test_json_tools:BOTH", "is a AgentConfig"),
    ],
)
def test_a_protocol_that_is_not_there_is_refused(codec, name, problem):
    with pytest.raises(ConfigError, match=rf"agent\.protocol: .*{problem}"):
        get_protocol(AgentConfig(protocol=name), codec)


def test_an_instruction_file_replaces_our_wording(codec, tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("Seek, and é shall find. ")
    config = AgentConfig(instruction_file=str(file))
    file.unlink()
    assert get_protocol(config, codec).prompt("why?") == "Seek, and é shall find.\nQuestion: why?\n"
    assert AgentConfig(**config.model_dump()) == config


def test_an_instruction_file_that_is_missing_or_one_too_many_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"instruction_file .*none\.txt cannot be read"):
        AgentConfig(instruction_file=str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="not both"):
        AgentConfig(instruction="x", instruction_file=str(tmp_path / "none.txt"))
