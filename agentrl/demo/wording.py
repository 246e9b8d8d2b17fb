"""The sentences of the demo's world: passages and questions written from facts, in a wording chosen per entity."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from agentrl.demo.facts import City, Country, Fact, Province

Choose = Callable[[Sequence[str]], str]

RELATIONS: Mapping[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {c}?",
        "Which city is the capital of {c}?",
        "What is the name of the capital city of {c}?",
    ),
    "currency": (
        "What is the currency of {c}?",
        "Which currency is used in {c}?",
        "What money do people pay with in {c}?",
        "Which currency would a visitor to {c} need?",
    ),
    "language": (
        "What is the main language of {c}?",
        "Which language is the main one in {c}?",
        "What language is mainly spoken in {c}?",
    ),
    "calling_code": (
        "What is the telephone calling code of {c}?",
        "Which international dialling code does {c} have?",
        "With which country code do calls to {c} from abroad start?",
    ),
    "tld": (
        "What is the internet domain of {c}?",
        "Which top-level internet domain belongs to {c}?",
        "What is the country code domain of {c} on the internet?",
    ),
}
"""Questions about a country, by the fact that they ask for; `{c}` is its name or a description of it."""

VIA_CITY = (
    "the country in which {city} lies",
    "the country where the city of {city} is",
    "the country that {city} belongs to",
    "the country that has {city} among its cities",
)
VIA_PROVINCE = (
    "the country that has the {kind} of {province}",
    "the country to which the {kind} of {province} belongs",
    "the country where {province} is a {kind}",
)
VIA_NEIGHBOUR = (
    "the only country that borders {c}",
    "the only land neighbour of {c}",
    "the single country with which {c} shares a land border",
)
CITY_COUNTRY = (
    "In which country is {city}?",
    "Which country does the city of {city} belong to?",
    "{city} is a city in which country?",
    "In what country does {city} lie?",
)
CITY_PROVINCE = (
    "In which {kind} of its country does {city} lie?",
    "Which {kind} does the city of {city} belong to?",
    "{city} is a city in which {kind}?",
)
PROVINCE_COUNTRY = (
    "Which country has the {kind} of {province}?",
    "{province} is a {kind} of which country?",
    "To which country does the {kind} of {province} belong?",
)
PROVINCE_CODE = (
    "What is the ISO 3166-2 code of the {kind} of {province}?",
    "Which ISO 3166-2 code does {province}, a {kind}, have?",
)
CITY_PROVINCE_CODE = (
    "What is the ISO 3166-2 code of the {kind} in which {city} lies?",
    "Which ISO 3166-2 code does the {kind} that {city} belongs to have?",
)
ONLY_NEIGHBOUR = (
    "Which is the only country that borders {c}?",
    "Which country is the only land neighbour of {c}?",
    "With which single country does {c} share a land border?",
)


def chooser(seed: int, key: str) -> Choose:
    """Return a function that picks from a sequence, always alike for one seed and key."""
    return random.Random(f"{seed}:{key}").choice


def country_passage(
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


def money_passage(country: Country, choose: Choose) -> tuple[str, str] | None:
    """Return title and text of the passage on a country's currency and language, or None where neither is known."""
    name = country.spoken
    sentences = []
    if country.currency:
        currency, code = country.currency
        sentences.append(
            choose(
                (
                    f"The currency of {name} is the {currency}, written {code} in international currency lists.",
                    f"People in {name} pay with the {currency}, whose international currency code is {code}.",
                    f"Prices in {name} are given in the {currency}, a currency that banks abroad know as {code}.",
                )
            )
        )
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


def telephone_passage(country: Country, choose: Choose) -> tuple[str, str] | None:
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


def province_passage(province: Province, country: Country, choose: Choose) -> tuple[str, str]:
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


def city_passage(city: City, country: Country, province: Province | None, choose: Choose) -> tuple[str, str]:
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


def province_forms(province: Province) -> Fact:
    """Return the accepted ways of naming a province."""
    return province.name, f"{province.name} {province.kind}", f"{province.kind} of {province.name}"


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
