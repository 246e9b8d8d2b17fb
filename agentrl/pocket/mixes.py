"""Mixes of questions for the pocket policy, each of which rewards another way of searching. Each is a made-up world.

In both worlds every country got another currency, and all questions are of the kind "What is the currency of the country in which
A lies?". Pages on money and language still name the former one.

- `practise`: the page on A names the currency, and of every ten such pages seven are up to date. A register has the currency of
  every country. So one search is right for .7 of the questions, and two can be right for all: for A, then for "currency of B".
  The policy knows other queries for B better, and they bring the former currency.
- `distract`: half of the questions state the currency, and of the others the page on A does. Everything else is out of date, and
  there is no register. So no search is best for one half and a single one for the other, and each further search misleads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from agentrl.demo.facts import Country, World
from agentrl.demo.passages import CURRENCY_WORDINGS, Passage, chooser, write_passages
from agentrl.demo.questions import Draft, draft_questions
from agentrl.demo.sources import attribution, load_world
from agentrl.demo.splits import balanced
from agentrl.demo.world import question_rows, write_folder
from agentrl.pocket.worlds import make_up_world, names_of

Mix = Literal["practise", "distract"]

COUNTRIES = 110
DEV_COUNTRIES = 32
DEV_QUESTIONS = 240
UP_TO_DATE = 0.7
"""Practise: the share of questions whose first page names today's currency."""
STATED = 0.5
"""Distract: the share of questions that state today's currency."""

_KIND = "city_currency"
# So that each title that such pages have elsewhere brings the one there is.
_FORMER = "This was written on money and language in {c} some years ago."
_REGISTER = "It is the currency of {c}, and no other currency is the currency of {c}."


@dataclass(frozen=True, slots=True)
class MixSummary:
    """How much `write_mix` wrote: passages, and questions by split."""

    passages: int
    questions: dict[str, int]


def write_mix(mix: Mix, out: Path, seed: int = 0) -> MixSummary:
    """Write corpus.jsonl, train.jsonl, dev.jsonl and SOURCES.md of a mix to the folder `out`.

    The same seed and packages give the same bytes. No country is in both question files.

    Raises:
        DataError: if `out` is a file or a folder that is not empty, or cannot be written.
    """
    passages, splits = make_mix(mix, seed)
    questions = {split: question_rows(f"{mix}_{split}", drafts) for split, drafts in splits.items()}
    write_folder(out, passages, questions, attribution())
    return MixSummary(len(passages), {split: len(drafts) for split, drafts in splits.items()})


def make_mix(mix: Mix, seed: int) -> tuple[list[Passage], dict[str, list[Draft]]]:
    """Return the passages of a mix, and its questions by split, in random order."""
    rng = random.Random(f"{mix}:{seed}")
    world = make_up_world(names_of(load_world()), COUNTRIES, rng)
    asked = [draft for draft in draft_questions(world, write_passages(world, seed), seed) if draft.kind == _KIND]
    splits = _split(asked, rng)
    share = UP_TO_DATE if mix == "practise" else 1 - STATED
    # The questions of a split are in random order, so its first ones are as good as any.
    up_to_date = {draft.chain[0] for drafts in splits.values() for draft in drafts[: round(share * len(drafts))]}
    former = _former(world)
    pages = write_passages(former, seed)
    for city in world.cities:
        if world.countries[city.country].currency is None:
            continue
        told = (world if city.name in up_to_date else former).countries[city.country]
        page = pages.cities[city.name]
        pages.cities[city.name] = replace(page, text=f"{page.text} {_sentence(told, city.name, seed)}")
    for (code, topic), page in pages.countries.items():
        if topic == "money":
            note = _FORMER.format(c=world.countries[code].spoken)
            pages.countries[code, topic] = replace(page, text=f"{page.text} {note}")
    register = _register(world, len(pages.passages), rng, seed) if mix == "practise" else {}
    passages = [*pages.passages, *register.values()]

    def posed(draft: Draft) -> Draft:
        city = draft.chain[0]
        page = pages.cities[city]
        if mix == "practise":
            return replace(draft, passages=(page, register[draft.country]))
        if city in up_to_date:
            return replace(draft, passages=(page,))
        told = _sentence(world.countries[draft.country], f"{city}:question", seed)
        return replace(draft, kind="stated_currency", text=f"{told} {draft.text}", passages=())

    posed_by_split = {split: [posed(draft) for draft in drafts] for split, drafts in splits.items()}
    return passages, {split: rng.sample(drafts, len(drafts)) for split, drafts in posed_by_split.items()}


def _split(drafts: Sequence[Draft], rng: random.Random) -> dict[str, list[Draft]]:
    """Return the questions of train and dev in random order, on different countries."""
    countries = sorted({draft.country for draft in drafts})
    dev = set(rng.sample(countries, DEV_COUNTRIES))
    asked = {
        "train": [draft for draft in drafts if draft.country not in dev],
        "dev": balanced([draft for draft in drafts if draft.country in dev], DEV_QUESTIONS, rng),
    }
    return {split: rng.sample(found, len(found)) for split, found in asked.items()}


def _former(world: World) -> World:
    """Return the world as it was: each country with a currency had that of the next country with another one."""
    today = [country for country in world.countries.values() if country.currency]
    before = {}
    for place, country in enumerate(today):
        others = (other.currency for other in (*today[place + 1 :], *today) if other.currency[0] != country.currency[0])
        before[country.code] = replace(country, currency=next(others))
    return replace(world, countries={**world.countries, **before})


def _sentence(country: Country, key: str, seed: int) -> str:
    """Return a sentence on a country's currency, in the wording that `key` chooses."""
    currency, code = country.currency
    return chooser(seed, f"{key}:currency")(CURRENCY_WORDINGS).format(c=country.spoken, currency=currency, code=code)


def _register(world: World, first: int, rng: random.Random, seed: int) -> dict[str, Passage]:
    """Return a page on today's currency of each country, by its code; their ids go on after `first`."""
    numbers = iter(rng.sample(range(first, first + len(world.countries)), len(world.countries)))
    return {
        code: Passage(
            f"demo{next(numbers):05d}",
            f"Currency of {country.spoken}",
            f"{_sentence(country, f'{code}:register', seed)} {_REGISTER.format(c=country.spoken)}",
        )
        for code, country in world.countries.items()
        if country.currency
    }
