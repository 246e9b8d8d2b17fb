"""The passages of the demo's world, each a few sentences on one place, in a wording chosen for the place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from agentrl.demo.facts import City, Country, Province, World, mentions

Choose = Callable[[Sequence[str]], str]
"""Picks one of several wordings."""

CURRENCY_WORDINGS = (
    "The currency of {c} is the {currency}, written {code} in international currency lists.",
    "People in {c} pay with the {currency}, whose international currency code is {code}.",
    "Prices in {c} are given in the {currency}, a currency that banks abroad know as {code}.",
)
"""What a passage says of a country's currency."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage of the corpus."""

    id: str
    title: str
    text: str

    def states(self, forms: Iterable[str]) -> bool:
        """Return whether one of the forms of a fact stands in the passage."""
        return any(mentions(f"{self.title} {self.text}", form) for form in forms)


@dataclass(frozen=True, slots=True)
class Library:
    """The passages, by what they are about: a country's code and a topic, a province's code, or a city's name."""

    countries: dict[tuple[str, str], Passage]
    provinces: dict[str, Passage]
    cities: dict[str, Passage]

    @property
    def passages(self) -> list[Passage]:
        return [*self.countries.values(), *self.provinces.values(), *self.cities.values()]


def chooser(seed: int, key: str) -> Choose:
    """Return a function that picks from a sequence; the same seed and key give the same picks."""
    return random.Random(f"{seed}:{key}").choice


def write_passages(world: World, seed: int) -> Library:
    """Write a passage on every city and province, and up to three on every country: place, money and telephone."""
    countries: dict[tuple[str, str], tuple[str, str]] = {}
    for code, country in world.countries.items():
        choose = chooser(seed, code)
        neighbours, only = _shown_neighbours(world, country, seed)
        countries[code, "place"] = _country_passage(country, neighbours, only, choose)
        money, telephone = _money_passage(country, choose), _telephone_passage(country, choose)
        countries |= {(code, "money"): money} if money else {}
        countries |= {(code, "telephone"): telephone} if telephone else {}
    provinces = {
        code: _province_passage(province, world.countries[province.country], chooser(seed, code))
        for code, province in world.provinces.items()
    }
    cities = {
        city.name: _city_passage(
            city,
            world.countries[city.country],
            world.provinces.get(city.province or ""),
            chooser(seed, city.name),
        )
        for city in world.cities
    }
    # Ids are dealt at random so that they say nothing about what a passage holds.
    count = len(countries) + len(provinces) + len(cities)
    numbers = iter(random.Random(f"{seed}:passages").sample(range(count), count))
    return Library(
        countries={key: Passage(f"demo{next(numbers):05d}", *written) for key, written in countries.items()},
        provinces={key: Passage(f"demo{next(numbers):05d}", *written) for key, written in provinces.items()},
        cities={key: Passage(f"demo{next(numbers):05d}", *written) for key, written in cities.items()},
    )


def _shown_neighbours(world: World, country: Country, seed: int) -> tuple[list[str], bool]:
    """Return the neighbours that the passage of a country names, and whether there is only one.

    A neighbour that borders this country alone is left out: a question may describe this country by that neighbour, and
    the passage that holds the answer must not name what the question named.
    """
    if only := world.only_neighbour(country):
        return [only.spoken], True
    known = [world.countries[code] for code in country.neighbours if code in world.countries]
    named = [neighbour.spoken for neighbour in known if len(neighbour.neighbours) > 1]
    random.Random(f"{seed}:{country.code}:neighbours").shuffle(named)
    return named[:3], False


def _country_passage(
    country: Country, neighbours: Sequence[str], only_neighbour: bool, choose: Choose
) -> tuple[str, str]:
    """Return title and text of the passage on where a country lies, its capital and its neighbours."""
    name = country.spoken
    area = f"{_rounded(country.area_km2)} square kilometres"
    sentences = [
        choose(
            (
                f"{_start(name)} is a country in {_region(country.region)} with an area of about {area}.",
                f"{_start(name)} lies in {_region(country.region)} and covers about {area}.",
                f"With about {area}, {name} is one of the countries of {_region(country.region)}.",
            )
        )
    ]
    if country.capital:
        capital = country.capital[0]
        sentences.append(
            choose(
                (
                    f"Its capital is {capital}.",
                    f"The capital city is {capital}.",
                    f"The city of {capital} is its capital.",
                )
            )
        )
    if only_neighbour:
        sentences.append(
            choose(
                (
                    f"Its only land neighbour is {neighbours[0]}.",
                    f"It has a land border with a single country, {neighbours[0]}.",
                )
            )
        )
    elif neighbours:
        sentences.append(choose(("Its neighbours include ", "Among its neighbours are ")) + _joined(neighbours) + ".")
    return country.name, _filled(sentences, f"Its codes in ISO 3166 are {country.code} and {country.alpha3}.")


def _money_passage(country: Country, choose: Choose) -> tuple[str, str] | None:
    """Return title and text of the passage on a country's currency and language, or None where neither is known."""
    name = country.spoken
    sentences = []
    if country.currency:
        currency, code = country.currency
        sentences.append(choose(CURRENCY_WORDINGS).format(c=name, currency=currency, code=code))
    if country.language:
        language = country.language[0]
        sentences.append(
            choose(
                (
                    f"The main language of the country is {language}.",
                    f"{language} is the main language there.",
                    f"As for speech, {language} is the main language.",
                )
            )
        )
    if not sentences:
        return None
    about = " and ".join(w for w, fact in (("money", country.currency), ("language", country.language)) if fact)
    title = choose((f"{about.capitalize()} in {name}", f"{about.capitalize()} of {name}"))
    return title, _filled(sentences, f"This is part of what a traveller to {name} may want to know before the journey.")


def _telephone_passage(country: Country, choose: Choose) -> tuple[str, str] | None:
    """Return title and text of the passage on a country's calling code and internet domain, or None without either."""
    name = country.spoken
    sentences = []
    if country.calling_code:
        code = country.calling_code[0]
        sentences.append(
            choose(
                (
                    f"Telephone calls from abroad to {name} start with the country code {code}.",
                    f"The international dialling code of {name} is {code}.",
                    f"To call a number in {name} from another country, dial {code} first.",
                )
            )
        )
    if country.tld:
        tld = country.tld[0]
        sentences.append(
            choose(
                (
                    f"On the internet the country has the top-level domain {tld}",
                    f"Web addresses that belong to the country end in the internet domain {tld}",
                    f"The country code domain on the internet is {tld}",
                )
            )
            + f", and ISO 3166 gives it the letters {country.code} and {country.alpha3}."
        )
    if not sentences:
        return None
    title = choose((f"Telephone and internet in {name}", f"Telecommunications in {name}"))
    return title, _filled(sentences, f"This is part of what a traveller to {name} may want to know before the journey.")


def _province_passage(province: Province, country: Country, choose: Choose) -> tuple[str, str]:
    """Return title and text of the passage on a province; the title tells it from another place of its name."""
    title = f"{province.name} ({province.kind})" if province.ambiguous else province.name
    name, kind, code = province.name, province.kind, province.code
    text = choose(
        (
            f"{name} is a {kind} of {country.spoken}. ISO 3166-2 lists it under the code {code} as one of the "
            f"{province.siblings} top-level divisions of the country.",
            f"The {kind} of {name} is in {country.spoken}. It is one of the country's {province.siblings} top-level "
            f"divisions in ISO 3166-2, where it has the code {code}.",
            f"{_start(country.spoken)} has {province.siblings} top-level divisions in ISO 3166-2. One of them is the "
            f"{kind} of {name}, which is listed under the code {code}.",
        )
    )
    return title, text


def _city_passage(city: City, country: Country, province: Province | None, choose: Choose) -> tuple[str, str]:
    """Return title and text of the passage on a city: where it is, how large, and which larger one is nearest."""
    home = f"the {province.kind} of {province.name}, {country.spoken}" if province else country.spoken
    people = _rounded(city.population)
    sentences = [
        choose(
            (
                f"{city.name} is a city in {home}.",
                f"{city.name} lies in {home}.",
                f"The city of {city.name} belongs to {home}.",
            )
        ),
        choose(
            (
                f"It has about {people} inhabitants.",
                f"About {people} people live there.",
                f"Its population is around {people}.",
            )
        ),
    ]
    if city.nearest_larger:
        near, way = city.nearest_larger, city.direction
        sentences.append(
            choose(
                (
                    f"The nearest larger city of the country is {near}, to the {way}.",
                    f"{near}, to the {way}, is the nearest city of the country with more people.",
                )
            )
        )
    north = f"{abs(city.latitude):.1f} degrees {'north' if city.latitude >= 0 else 'south'}"
    east = f"{abs(city.longitude):.1f} degrees {'east' if city.longitude >= 0 else 'west'}"
    return city.name, _filled(sentences, f"Its centre lies at about {north} and {east}.")


def _filled(sentences: list[str], filler: str) -> str:
    text = " ".join(sentences)
    return f"{text} {filler}" if len(text.split()) < 20 else text


def _start(name: str) -> str:
    return name[0].upper() + name[1:]


def _region(region: str) -> str:
    return {"Australia and New Zealand": "Oceania"}.get(region, region)


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _rounded(number: int) -> str:
    digits = max(0, len(str(number)) - 3)
    return f"{round(number, -digits):,}"
