"""Made-up worlds: the demo world's own names, dealt anew with facts that are drawn at random.

A model that is trained on many of them meets every name, and never the same fact twice: it can only learn to copy what it reads.
"""

from __future__ import annotations

import random
import string
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from agentrl.demo.facts import City, Country, Province, World

_DIRECTIONS = ("north", "north-east", "east", "south-east", "south", "south-west", "west", "north-west")


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a world by what they name, each list sorted and without repetition."""

    countries: tuple[str, ...]
    cities: tuple[str, ...]
    provinces: tuple[str, ...]
    province_codes: tuple[str, ...]
    currencies: tuple[str, ...]
    languages: tuple[str, ...]
    kinds: tuple[str, ...]
    regions: tuple[str, ...]
    calling_codes: tuple[str, ...]
    domains: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        return sorted({name for field in fields(self) for name in getattr(self, field.name)})


def names_of(world: World) -> Names:
    """Return every name of a world. A capital is among the cities."""
    countries = list(world.countries.values())

    def first(fact: str) -> tuple[str, ...]:
        return _sorted(forms[0] for country in countries if (forms := getattr(country, fact)))

    return Names(
        countries=_sorted(country.name for country in countries),
        cities=_sorted([*(city.name for city in world.cities), *first("capital")]),
        provinces=_sorted(province.name for province in world.provinces.values()),
        province_codes=_sorted(world.provinces),
        currencies=first("currency"),
        languages=first("language"),
        kinds=_sorted(province.kind for province in world.provinces.values()),
        regions=_sorted(country.region for country in countries),
        calling_codes=first("calling_code"),
        domains=first("tld"),
    )


def _sorted(names: object) -> tuple[str, ...]:
    return tuple(sorted(set(names)))


def make_up_world(names: Names, countries: int, rng: random.Random) -> World:
    """Return a world of so many countries, each with some provinces and cities. No name stands for two places."""
    return _Dealer(names, rng).world(countries)


class _Dealer:
    """Deals the names of one world."""

    def __init__(self, names: Names, rng: random.Random) -> None:
        self._names, self._rng = names, rng
        self._piles = {
            field.name: rng.sample(getattr(names, field.name), len(getattr(names, field.name)))
            for field in fields(names)
        }
        self._used: set[str] = set()

    def world(self, count: int) -> World:
        codes = [self._letters(2) for _ in range(count)]
        neighbours = self._neighbours(codes)
        countries: dict[str, Country] = {}
        provinces: dict[str, Province] = {}
        cities: list[City] = []
        for code in codes:
            countries[code] = self._country(code, tuple(sorted(neighbours[code])))
            own = self._provinces(code)
            provinces |= {province.code: province for province in own}
            cities += self._cities(code, [province.code for province in own])
        return World(countries, provinces, tuple(cities))

    def _fresh(self, pile: str) -> str:
        """Return a name that this world does not have yet, whatever it stands for."""
        while True:
            name = self._piles[pile].pop()
            if name.lower() not in self._used:
                self._used.add(name.lower())
                return name

    def _letters(self, length: int) -> str:
        while True:
            code = "".join(self._rng.choices(string.ascii_uppercase, k=length))
            if code not in self._used:
                self._used.add(code)
                return code

    def _neighbours(self, codes: Sequence[str]) -> dict[str, set[str]]:
        rng = self._rng
        neighbours: dict[str, set[str]] = defaultdict(set)
        for code in codes:
            if rng.random() < 0.5:
                for other in rng.sample(codes, rng.choice((1, 1, 1, 2, 3))):
                    if other != code:
                        neighbours[code].add(other)
                        neighbours[other].add(code)
        return neighbours

    def _country(self, code: str, neighbours: tuple[str, ...]) -> Country:
        rng, names = self._rng, self._names

        def perhaps(share: float, make: Callable[[], tuple[str, ...]]) -> tuple[str, ...] | None:
            return make() if rng.random() < share else None

        name = self._fresh("countries")
        return Country(
            code=code,
            alpha3=self._letters(3),
            name=name,
            names=(name,),
            region=rng.choice(names.regions),
            area_km2=int(10 ** rng.uniform(2.5, 6.9)),
            capital=perhaps(0.9, lambda: (self._fresh("cities"),)),
            currency=perhaps(0.9, lambda: (rng.choice(names.currencies), self._letters(3))),
            language=perhaps(0.8, lambda: (rng.choice(names.languages),)),
            calling_code=(self._fresh("calling_codes"),),
            tld=(self._fresh("domains"),),
            neighbours=neighbours,
        )

    def _provinces(self, country: str) -> list[Province]:
        rng = self._rng
        return [
            Province(
                code=self._fresh("province_codes"),
                country=country,
                name=self._fresh("provinces"),
                kind=rng.choice(self._names.kinds),
                siblings=rng.randint(3, 60),
                ambiguous=False,
            )
            for _ in range(rng.randint(1, 6))
        ]

    def _cities(self, country: str, provinces: Sequence[str]) -> list[City]:
        rng = self._rng
        cities: list[City] = []
        larger: str | None = None
        for _ in range(rng.randint(6, 14)):
            name = self._fresh("cities")
            cities.append(
                City(
                    country=country,
                    name=name,
                    population=int(10 ** rng.uniform(4.2, 7)),
                    latitude=rng.uniform(-60, 70),
                    longitude=rng.uniform(-180, 180),
                    province=rng.choice(provinces) if rng.random() < 0.35 else None,
                    nearest_larger=larger if rng.random() < 0.9 else None,
                    direction=rng.choice(_DIRECTIONS),
                )
            )
            if larger is None or rng.random() < 0.3:
                larger = name
        return cities
