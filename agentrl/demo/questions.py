"""The questions of the demo's world, of one hop, two and three.

A question of two hops describes a country by a city, a province or a neighbour and asks for a fact of that country. Its
first passage names the country and not the answer; its second holds the answer and not what the question named. A question
of three hops describes the only neighbour of a country that a city or a province describes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agentrl.demo.facts import City, Country, Fact, Province, World, mentions
from agentrl.demo.passages import Choose, Library, Passage, chooser

# A dozen countries have a single neighbour; without a limit their few answers would fill this kind of question.
_NEIGHBOUR_QUESTIONS = 3


@dataclass(frozen=True, slots=True)
class Draft:
    """A question before it has an id.

    Attributes:
        kind: what it names and what it asks for, such as `city_capital`.
        country: the code of the country by which it is split.
        passages: those that answer it, in hop order.
        chain: the places that lead from what it names to the answer.
    """

    kind: str
    country: str
    text: str
    answers: Fact
    passages: tuple[Passage, ...]
    chain: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Relation:
    """A fact of a country as questions ask for it; its passage is the country's on `topic`."""

    topic: str
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Description:
    """How a question names a country: by itself, or by another place, whose passage names the country.

    Attributes:
        kind: country, city, province, neighbour, city_neighbour or province_neighbour.
        text: the words that stand for the country.
        passages: those to read before the country is known.
        chain: the places from what is named to the country.
    """

    kind: str
    text: str
    passages: tuple[Passage, ...]
    chain: tuple[str, ...]


_RELATIONS: Mapping[str, _Relation] = {
    "capital": _Relation(
        "place",
        (
            "What is the capital of {c}?",
            "Which city is the capital of {c}?",
            "What is the name of the capital city of {c}?",
        ),
    ),
    "currency": _Relation(
        "money",
        (
            "What is the currency of {c}?",
            "Which currency is used in {c}?",
            "What money do people pay with in {c}?",
            "Which currency would a visitor to {c} need?",
        ),
    ),
    "language": _Relation(
        "money",
        (
            "What is the main language of {c}?",
            "Which language is the main one in {c}?",
            "What language is mainly spoken in {c}?",
        ),
    ),
    "calling_code": _Relation(
        "telephone",
        (
            "What is the telephone calling code of {c}?",
            "Which international dialling code does {c} have?",
            "With which country code do calls to {c} from abroad start?",
        ),
    ),
    "tld": _Relation(
        "telephone",
        (
            "What is the internet domain of {c}?",
            "Which top-level internet domain belongs to {c}?",
            "What is the country code domain of {c} on the internet?",
        ),
    ),
}
"""By the name of the fact in `Country`; `{c}` is the name of the country or a description of it."""

_VIA_CITY = (
    "the country in which {city} lies",
    "the country where the city of {city} is",
    "the country that {city} belongs to",
    "the country that has {city} among its cities",
)
_VIA_PROVINCE = (
    "the country that has the {kind} of {province}",
    "the country to which the {kind} of {province} belongs",
    "the country where {province} is a {kind}",
)
_VIA_NEIGHBOUR = (
    "the only country that borders {c}",
    "the only land neighbour of {c}",
    "the single country with which {c} shares a land border",
)
_CITY_COUNTRY = (
    "In which country is {city}?",
    "Which country does the city of {city} belong to?",
    "{city} is a city in which country?",
    "In what country does {city} lie?",
)
_CITY_PROVINCE = (
    "In which {kind} of its country does {city} lie?",
    "Which {kind} does the city of {city} belong to?",
    "{city} is a city in which {kind}?",
)
_PROVINCE_COUNTRY = (
    "Which country has the {kind} of {province}?",
    "{province} is a {kind} of which country?",
    "To which country does the {kind} of {province} belong?",
)
_PROVINCE_CODE = (
    "What is the ISO 3166-2 code of the {kind} of {province}?",
    "Which ISO 3166-2 code does {province}, a {kind}, have?",
)
_CITY_PROVINCE_CODE = (
    "What is the ISO 3166-2 code of the {kind} in which {city} lies?",
    "Which ISO 3166-2 code does the {kind} that {city} belongs to have?",
)
_ONLY_NEIGHBOUR = (
    "Which is the only country that borders {c}?",
    "Which country is the only land neighbour of {c}?",
    "With which single country does {c} share a land border?",
)


def draft_questions(world: World, library: Library, seed: int) -> list[Draft]:
    """Write every question that the world has an unambiguous answer to, none of them twice."""
    drafts = [
        *_on_countries(world, library, seed),
        *_on_provinces(world, library, seed),
        *_on_cities(world, library, seed),
    ]
    return list({draft.text: draft for draft in drafts if _is_sound(draft)}.values())


def _is_sound(draft: Draft) -> bool:
    """Return whether only the last passage states the answer, only the first what the question names, and the text no more."""
    *before, last = draft.passages
    return (
        last.states(draft.answers)
        and not any(passage.states(draft.answers) for passage in before)
        and not any(mentions(draft.text, hidden) for hidden in (*draft.answers, *draft.chain[1:]))
        and not any(passage.states(draft.chain[:1]) for passage in draft.passages[1:])
    )


def _on_facts(country: Country, library: Library, described: _Description, choose: Choose) -> Iterable[Draft]:
    """Yield a question for each known fact of a country."""
    for name, relation in _RELATIONS.items():
        fact: Fact | None = getattr(country, name)
        if fact is None:
            continue
        text = choose(relation.questions).format(c=described.text)
        passages = (*described.passages, library.countries[country.code, relation.topic])
        # Of the facts, only a capital is a place.
        chain = (*described.chain, fact[0]) if name == "capital" else described.chain
        yield Draft(f"{described.kind}_{name}", country.code, text, fact, passages, chain)


def _on_neighbour_of(
    country: Country, world: World, library: Library, described: _Description, choose: Choose
) -> Iterable[Draft]:
    """Yield the questions of three hops on the only neighbour of a country that is described by a place in it."""
    only = world.only_neighbour(country)
    if only is None:
        return
    neighbour = _Description(
        kind=f"{described.kind}_neighbour",
        text=choose(_VIA_NEIGHBOUR).format(c=described.text),
        passages=(*described.passages, library.countries[country.code, "place"]),
        chain=(*described.chain, only.name),
    )
    yield from _on_facts(only, library, neighbour, choose)


def _on_countries(world: World, library: Library, seed: int) -> Iterable[Draft]:
    for code, country in world.countries.items():
        choose = chooser(seed, f"{code}:questions")
        yield from _on_facts(country, library, _Description("country", country.spoken, (), (country.name,)), choose)
        if only := world.only_neighbour(country):
            passage = library.countries[code, "place"]
            text = choose(_ONLY_NEIGHBOUR).format(c=country.spoken)
            chain = (country.name, only.name)
            yield Draft("country_neighbour", code, text, only.names, (passage,), chain)
            via = choose(_VIA_NEIGHBOUR).format(c=country.spoken)
            yield from _on_facts(only, library, _Description("neighbour", via, (passage,), chain), choose)


def _on_provinces(world: World, library: Library, seed: int) -> Iterable[Draft]:
    for code, province in world.provinces.items():
        if province.ambiguous:
            continue
        choose = chooser(seed, f"{code}:questions")
        country, passage = world.countries[province.country], library.provinces[code]
        names = {"province": province.name, "kind": province.kind}
        text = choose(_PROVINCE_COUNTRY).format(**names)
        chain = (province.name, country.name)
        yield Draft("province_country", country.code, text, country.names, (passage,), chain)
        text = choose(_PROVINCE_CODE).format(**names)
        yield Draft("province_code", country.code, text, (code,), (passage,), (province.name,))
        via = choose(_VIA_PROVINCE).format(**names)
        described = _Description("province", via, (passage,), chain)
        yield from _on_facts(country, library, described, choose)
        yield from _on_neighbour_of(country, world, library, described, chooser(seed, f"{code}:three hops"))


def _on_cities(world: World, library: Library, seed: int) -> Iterable[Draft]:
    asked: Counter[str] = Counter()
    for city in world.cities:
        choose = chooser(seed, f"{city.name}:questions")
        country, passage = world.countries[city.country], library.cities[city.name]
        text = choose(_CITY_COUNTRY).format(city=city.name)
        chain = (city.name, country.name)
        yield Draft("city_country", country.code, text, country.names, (passage,), chain)
        if city.province is not None:
            yield from _on_province_of(city, world.provinces[city.province], library, choose)
        via = choose(_VIA_CITY).format(city=city.name)
        described = _Description("city", via, (passage,), chain)
        yield from _on_facts(country, library, described, choose)
        yield from _on_neighbour_of(country, world, library, described, chooser(seed, f"{city.name}:three hops"))
        asked[country.code] += 1
        only = world.only_neighbour(country)
        if only and asked[country.code] <= _NEIGHBOUR_QUESTIONS:
            text = choose(_ONLY_NEIGHBOUR).format(c=via)
            hops = (passage, library.countries[country.code, "place"])
            yield Draft("city_neighbour", country.code, text, only.names, hops, (*chain, only.name))


def _on_province_of(city: City, province: Province, library: Library, choose: Choose) -> Iterable[Draft]:
    passage = library.cities[city.name]
    names = {"city": city.name, "kind": province.kind}
    chain = (city.name, province.name)
    forms = (province.name, f"{province.name} {province.kind}", f"{province.kind} of {province.name}")
    text = choose(_CITY_PROVINCE).format(**names)
    yield Draft("city_province", city.country, text, forms, (passage,), chain)
    text = choose(_CITY_PROVINCE_CODE).format(**names)
    hops = (passage, library.provinces[province.code])
    yield Draft("city_province_code", city.country, text, (province.code,), hops, chain)
