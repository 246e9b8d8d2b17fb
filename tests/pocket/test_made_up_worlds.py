"""A made-up world has the demo's names and nothing of its facts, and no name in it stands for two things."""

import random
from collections import Counter

from agentrl.demo.sources import load_world
from agentrl.pocket.demonstrations import make_up
from agentrl.pocket.worlds import make_up_world


def test_a_seed_makes_one_world(names):
    assert make_up_world(names, 20, random.Random(3)) == make_up_world(names, 20, random.Random(3))
    assert make_up_world(names, 20, random.Random(3)) != make_up_world(names, 20, random.Random(4))


def test_every_name_is_one_of_the_demo_world(names, made_up):
    world = made_up.world
    assert {country.name for country in world.countries.values()} <= set(names.countries)
    assert {city.name for city in world.cities} <= set(names.cities)
    assert {province.name for province in world.provinces.values()} <= set(names.provinces)


def test_no_name_stands_for_two_places(made_up):
    world = made_up.world
    places = [
        *(country.name for country in world.countries.values()),
        *(country.capital[0] for country in world.countries.values() if country.capital),
        *(city.name for city in world.cities),
        *(province.name for province in world.provinces.values()),
    ]
    assert [name for name, count in Counter(map(str.lower, places)).items() if count > 1] == []


def test_facts_of_the_demo_world_hold_in_it_no_more_often_than_by_chance(made_up):
    real = {country.name: country for country in load_world().countries.values()}
    for fact in ("capital", "currency", "calling_code", "tld"):
        shared = [
            getattr(country, fact)[0] == getattr(real[country.name], fact)[0]
            for country in made_up.world.countries.values()
            if getattr(country, fact) and getattr(real[country.name], fact)
        ]
        assert len(shared) > 50
        assert sum(shared) <= 3


def test_neighbours_have_each_other(made_up):
    countries = made_up.world.countries
    for country in countries.values():
        assert all(country.code in countries[neighbour].neighbours for neighbour in country.neighbours)
        assert country.code not in country.neighbours


def test_its_questions_have_one_hop_two_and_three(made_up):
    hops = Counter(question.metadata["hops"] for question in made_up.questions)
    assert set(hops) == {1, 2, 3}
    assert hops[2] > hops[1] > hops[3] > 50


def test_questions_are_about_what_their_passages_say(names):
    made_up = make_up(names, 2)
    passages = {passage.id: passage for passage in made_up.library.passages}
    for question in made_up.questions:
        *_, last = question.metadata["gold_passage_ids"]
        assert passages[last].states(question.golden_answers)
