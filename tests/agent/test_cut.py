"""What does not fit is cut close to its limit, at a word where there are words, and encoded as rarely as possible."""

import json

import pytest
import virtual_clock
from conftest import WRITTEN
from fakes import PassageRetriever, ScriptedEngine, passage
from hypothesis import given
from hypothesis import strategies as st
from real_data import real_data

from agentrl.agent.codec import Codec, as_string
from agentrl.agent.episode import Agent
from agentrl.agent.protocols import get_protocol
from agentrl.config import AgentConfig
from agentrl.types import End, Question
from retrievers.base import Hit

# A word that is given up, and what a tokenizer makes of a cut.
SLACK = 16 + 8

scraps = st.builds(
    lambda text, start, size: text[start : start + size],
    st.sampled_from(WRITTEN),
    st.integers(0, 40),
    st.integers(1, 40),
)
written = st.lists(scraps, max_size=30).map("".join).map(lambda text: " ".join(text.split()))
hits = st.lists(st.builds(lambda title, text: Hit("p7", passage(title[:60], text), 1.0), written, written), max_size=5)


def shown(protocol, hits, limit):
    return as_string(protocol.observation(hits, limit))


@given(text=written, limit=st.integers(0, 80))
def test_a_cut_is_a_start_of_the_text_close_to_the_limit(any_codec, text, limit):
    cut = any_codec.cut(text, limit)
    size = len(any_codec.encode(cut))
    assert text.startswith(cut)
    assert size <= limit
    if cut != text:
        assert len(any_codec.encode(text)) > limit
        assert size >= limit - SLACK


@given(text=written, limit=st.integers(1, 80))
def test_a_cut_anywhere_uses_all_but_a_few_tokens(any_codec, text, limit):
    cut = any_codec.cut(text, limit, at_word=False)
    assert text.startswith(cut)
    assert min(limit, len(any_codec.encode(text))) - 8 <= len(any_codec.encode(cut)) <= limit


@given(words=st.lists(st.text("abcdefgh", min_size=1, max_size=7), min_size=2, max_size=30), limit=st.integers(8, 40))
def test_text_with_short_words_ends_at_one(any_codec, words, limit):
    assert f"{' '.join(words)} ".startswith(f"{any_codec.cut(' '.join(words), limit)} ")


@given(found=hits, limit=st.integers(100, 300), name=st.sampled_from(["search_tags", "json_tools"]), ids=st.booleans())
def test_an_observation_keeps_to_its_limit_and_uses_it(any_codec, found, limit, name, ids):
    config = AgentConfig(protocol=name, tools=["search", "open"] if ids else ["search"])
    protocol = get_protocol(config, any_codec)
    text = protocol.observation(found, limit)
    size = len(any_codec.encode(text))
    assert size <= limit
    everything = shown(protocol, found, 100_000)
    if text != everything:
        assert len(any_codec.encode(everything)) > limit
        lines = as_string(text).count("\nDoc ")
        # Where some have no room for their heads, the others may be too short to fill it.
        assert lines < len(found) or size >= limit - lines * (SLACK + 2)


@pytest.mark.parametrize("text", [WRITTEN[1] * 30, WRITTEN[2] * 30, WRITTEN[3] * 60, "See " + WRITTEN[3] * 60])
@pytest.mark.parametrize("count", [1, 3])
def test_text_without_spaces_fills_an_observation(any_codec, text, count):
    protocol = get_protocol(AgentConfig(), any_codec)
    text = protocol.observation([Hit("p", passage("Tay", text), 1.0)] * count, 240)
    assert 200 <= len(any_codec.encode(text)) <= 240


def test_a_corpus_without_titles_fills_an_observation(any_codec):
    protocol = get_protocol(AgentConfig(), any_codec)
    # The first paragraph is taken for the title.
    text = protocol.observation([Hit("p", f"{WRITTEN[0] * 9}\nSo.", 1.0)] * 3, 240)
    assert 200 <= len(any_codec.encode(text)) <= 240


def test_short_texts_leave_their_room_to_long_ones(codec):
    short, long = Hit("a", passage("Main", "Short."), 2.0), Hit("b", passage("Elbe", "river " * 300), 1.0)
    text = shown(get_protocol(AgentConfig(), codec), [short, long, short], 120)
    assert text.count("Short.") == 2
    assert 110 < len(codec.encode(text)) <= 120


class Counting:
    """A tokenizer that keeps what it was asked to encode."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.asked = []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, **options):
        self.asked.append(text)
        return self._tokenizer(text, **options)


@pytest.mark.parametrize("protocol", ["search_tags", "json_tools", "chat_tools"])
@pytest.mark.parametrize(("sentences", "encodings"), [(1, 1), (40, 2), (4000, 2)])
def test_an_observation_is_encoded_once_and_once_more_where_it_is_cut(chat_codec, protocol, sentences, encodings):
    counting = Counting(chat_codec.tokenizer)
    codec = Codec(counting)
    config = AgentConfig(protocol=protocol, max_observation_tokens=400, max_episode_tokens=4096, max_turn_tokens=200)
    search = "<search> Elbe </search>"
    if protocol != "search_tags":
        search = f"<tool_call>{json.dumps({'name': 'search', 'arguments': {'query': 'Elbe'}})}</tool_call>"
    engine = ScriptedEngine(chat_codec, [search, "<answer> Cuxhaven </answer>"])
    passages = [passage("Elbe", f"It ends at {place}. " * sentences) for place in ("Cuxhaven", "Hamburg", "sea")]
    agent = Agent(config, codec, engine, PassageRetriever(*passages), 3)
    question = Question("q", "where?", ("Cuxhaven",))
    episode = virtual_clock.run(agent.run(question, "1/0/0", temperature=1.0, seed=0, timeout=60.0))
    assert episode.end is End.ANSWERED
    texts = [text for text in counting.asked if "Doc 1(" in text]
    assert len(texts) == encodings
    # Of a long document only what could be shown is encoded.
    assert all(len(text) < 15_000 for text in texts)


def test_real_passages_are_cut_at_words_close_to_the_limit(codec):
    rows = real_data("corpus/wiki-tiny.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    protocol = get_protocol(AgentConfig(), codec)
    for row in map(json.loads, rows):
        hit = Hit(row["id"], row["contents"], 1.0)
        text = shown(protocol, [hit], 240)
        body = text.partition(f"Title: {protocol.neutralise(hit.title)}) ")[2].removesuffix("\n</information>\n")
        whole = " ".join(protocol.neutralise(hit.text).split())
        assert f"{whole} ".startswith(f"{body} ")
        assert body == whole or len(codec.encode(text)) > 240 - SLACK
