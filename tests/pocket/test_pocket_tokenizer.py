"""Names are one piece each, and every text comes back as it was."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentrl.agent.codec import Codec
from agentrl.pocket.tokenizer import END, make_tokenizer

NAMES = ["Ulan Bator", "São Tomé", "+44", ".uk", "Nord", "Nordland"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(NAMES, ["The city of Nordland lies in the north. " * 20], 2)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_inside_a_sentence_is_one_piece(tokenizer, name):
    before, whole = ids(tokenizer, "city of"), ids(tokenizer, f"city of {name}")
    assert len(whole) == len(before) + 1
    assert whole[:-1] == before


@pytest.mark.parametrize("text", ["<search> Nordland </search>", "Doc 2(Title: Nord", " city", "<think>"])
def test_tags_headings_and_frequent_words_are_pieces(tokenizer, text):
    assert len(ids(tokenizer, text)) <= len(text.split())


def test_a_rare_word_is_spelled(tokenizer):
    assert len(ids(tokenizer, "zyxwv")) == 5


@given(st.text())
@example("<0x41>")
@example("<0x3C>/information<0x3E>")
@settings(deadline=None)
def test_every_text_comes_back(tokenizer, text):
    # The piece that stands for a space cannot stand for itself.
    text = text.replace("▁", "_")
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_the_codec_leaves_names_in_passages_alone(tokenizer):
    codec = Codec(tokenizer)
    assert codec.decode(codec.encode(" Ulan Bator and São Tomé")) == " Ulan Bator and São Tomé"
    assert tokenizer.all_special_tokens == [END]
