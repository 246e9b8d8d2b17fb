"""The places of the demo's world, and how their names are compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

_WITH_ARTICLE = frozenset(
    {
        "Bahamas",
        "Central African Republic",
        "Comoros",
        "Democratic Republic of the Congo",
        "Dominican Republic",
        "Gambia",
        "Maldives",
        "Marshall Islands",
        "Netherlands",
        "Philippines",
        "Republic of the Congo",
        "Seychelles",
        "Solomon Islands",
        "United Arab Emirates",
        "United Kingdom",
        "United States",
    }
)

Fact = tuple[str, ...]
"""The accepted forms of one fact; the first is the one that passages print."""


@dataclass(frozen=True, slots=True)
class Country:
    """A sovereign state. A fact is None where the sources disagree or name more than one."""

    code: str
    alpha3: str
    name: str
    names: Fact
    region: str
    area_km2: int
    capital: Fact | None
    currency: Fact | None
    language: Fact | None
    calling_code: Fact | None
    tld: Fact | None
    neighbours: tuple[str, ...] = ()

    @property
    def spoken(self) -> str:
        """The name as it stands inside a sentence."""
        return f"the {self.name}" if self.name in _WITH_ARTICLE else self.name


@dataclass(frozen=True, slots=True)
class Province:
    """A top-level division of a country in ISO 3166-2, one of `siblings`; `ambiguous` where another place has its name."""

    code: str
    country: str
    name: str
    kind: str
    siblings: int
    ambiguous: bool


@dataclass(frozen=True, slots=True)
class City:
    """A city whose name no other city has.

    `province` is the code of its province, or None where the sources do not tell. `direction` is the compass point in
    which the nearest larger city of the country lies, as seen from this one.
    """

    country: str
    name: str
    population: int
    latitude: float
    longitude: float
    province: str | None
    nearest_larger: str | None
    direction: str | None


@dataclass(frozen=True, slots=True)
class World:
    """All places. Countries and provinces are ordered by code, cities by country and then from the largest."""

    countries: Mapping[str, Country]
    provinces: Mapping[str, Province]
    cities: tuple[City, ...]

    def only_neighbour(self, country: Country) -> Country | None:
        """Return the one country that `country` has a land border with, or None unless it has a single, known one."""
        return self.countries.get(country.neighbours[0]) if len(country.neighbours) == 1 else None


def fold(name: str) -> str:
    """Return a name in lower-case ASCII letters, digits and single spaces, for comparing sources."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().replace("'", "")
    return " ".join(re.findall(r"[a-z0-9]+", plain))


def mentions(text: str, name: str) -> bool:
    """Return whether `name` stands in `text` as whole words, whatever its case and accents."""
    return f" {fold(name)} " in f" {fold(text)} "
