"""Demonstrations search for what they may know of, read what they answer unless they guess, and have the stated structures."""

import asyncio
import random

import pytest
from fakes import PassageRetriever

from agentrl.agent.scripted import ScriptPlayer
from agentrl.config import AgentConfig
from agentrl.pocket.demonstrations import STRUCTURES, is_guess, play, searches_of
from agentrl.types import Question
from retrievers.base import Hit

CONFIG = AgentConfig(instruction="", max_turns=3, max_turn_tokens=200, max_episode_tokens=2000)
PLACES = ("Aa", "Bb", "Cc")
THREE = Question(
    "q",
    "What is the capital of the only neighbour of the country of Aa?",
    ("Dd",),
    metadata={
        "hops": 3,
        "kind": "city_neighbour_capital",
        "gold_passage_ids": ["a", "b", "c"],
        "supporting_titles": list(PLACES),
        "chain": [*PLACES, "Dd"],
    },
)
PASSAGES = {"Aa": ("a", "Aa lies in Bb."), "Bb": ("b", "Bb borders Cc."), "Cc": ("c", "The capital of Cc is Dd.")}


class ByLastWord:
    """Finds the passage on the place that a query ends with; `lost` is a query that finds something else."""

    def __init__(self, lost=None):
        self._lost = lost

    async def search(self, queries, k):
        return [[self._hit(query)] for query in queries]

    def _hit(self, query):
        place = query.split()[-1]
        if query == self._lost or place not in PASSAGES:
            return Hit("x", '"Other"\nNothing.', 1.0)
        key, text = PASSAGES[place]
        return Hit(key, f'"{place}"\n{text}', 1.0)


def played(codec, structure, retriever=None, question=THREE):
    player = ScriptPlayer(CONFIG, codec, retriever or ByLastWord(), 1)
    return asyncio.run(play(question, structure, random.Random(0), player))


@pytest.mark.parametrize("hops", STRUCTURES)
def test_the_shares_of_structures_add_up_to_one(hops):
    assert sum(STRUCTURES[hops].values()) == pytest.approx(1)


@pytest.mark.parametrize("structure", STRUCTURES[3])
def test_each_structure_of_three_hops_can_be_played(codec, structure):
    demonstration = played(codec, structure)
    text = codec.decode(demonstration.token_ids)
    assert text.count("<search>") == len(searches_of(THREE, structure))
    assert demonstration.guessed == is_guess(structure)
    assert "<answer> Dd </answer>" in text


def test_only_what_the_model_would_say_is_its_own(codec):
    demonstration = played(codec, "title, wanted, title")
    own = codec.decode([token for token, own in zip(demonstration.token_ids, demonstration.own, strict=True) if own])
    assert own.count("<search>") == 3
    assert "<information>" not in own
    assert "neighbour of the country of Aa" not in own


def test_wanted_names_the_fact_and_the_place_of_its_hop():
    assert [search.query for search in searches_of(THREE, "title, wanted, wanted")] == [
        "Aa",
        "land neighbour of Bb",
        "capital of Cc",
    ]


def test_a_place_that_was_not_read_is_not_searched_for(codec):
    lost = ByLastWord("land neighbour of Bb")
    assert played(codec, "title, wanted, title", lost) is None
    assert played(codec, "title, wanted, guess", lost) is not None


def test_an_answer_that_was_not_read_is_only_guessed(codec):
    assert played(codec, "title, wanted, wanted", ByLastWord("capital of Cc")) is None
    assert played(codec, "direct", PassageRetriever()) is not None


def test_a_fact_without_a_query_of_its_own_is_not_asked_for(codec):
    question = Question(
        "q",
        "In which country is Aa?",
        ("Bb",),
        metadata={
            "hops": 1,
            "kind": "city_country",
            "gold_passage_ids": ["a"],
            "supporting_titles": ["Aa"],
            "chain": ["Aa", "Bb"],
        },
    )
    assert played(codec, "wanted", question=question) is None
    assert played(codec, "title", question=question).structure == "title"
