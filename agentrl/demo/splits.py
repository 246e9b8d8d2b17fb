"""Dealing the demo's questions to train, dev and test, so that no place is in two of them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence

from agentrl.demo.facts import World
from agentrl.demo.questions import Draft

SIZES = {"train": 2000, "dev": 150, "test": 200}
"""The questions of each split, half of them with one hop and half with two, unless the world has fewer."""

_SHARES = {"dev": 0.09, "test": 0.13}
"""The shares of the countries that the small splits get; the rest is for training."""


def split_questions(world: World, drafts: Sequence[Draft], seed: int) -> dict[str, list[Draft]]:
    """Return the questions of each split, in random order, as many as `SIZES` says or as there are."""
    home = _split_countries(world, seed)
    splits = {}
    for split, size in SIZES.items():
        mine = [draft for draft in drafts if home[draft.country] == split]
        rng = random.Random(f"{seed}:{split}")
        single = _balanced([d for d in mine if len(d.passages) == 1], size // 2, rng)
        double = _balanced([d for d in mine if len(d.passages) == 2], size // 2, rng)
        chosen = [*single, *double]
        rng.shuffle(chosen)
        splits[split] = chosen
    return splits


def _split_countries(world: World, seed: int) -> dict[str, str]:
    """Return the split of each country code.

    A country with a single neighbour is in the split of that neighbour, since questions join the two.
    """
    together = {code: code for code in world.countries}
    for code, country in world.countries.items():
        if only := world.only_neighbour(country):
            kept, gone = sorted((together[code], together[only.code]))
            together = {member: kept if group == gone else group for member, group in together.items()}
    groups: dict[str, list[str]] = defaultdict(list)
    for code, group in together.items():
        groups[group].append(code)
    order = list(groups.values())
    random.Random(f"{seed}:split").shuffle(order)
    # The small splits are filled first, so that what is left over goes to the large one, where it matters least.
    home: dict[str, str] = {}
    for split, share in _SHARES.items():
        room = round(share * len(world.countries))
        while room > 0:
            group_codes = order.pop()
            home |= dict.fromkeys(group_codes, split)
            room -= len(group_codes)
    return home | {code: "train" for group_codes in order for code in group_codes}


def _balanced(drafts: Sequence[Draft], count: int, rng: random.Random) -> list[Draft]:
    """Return `count` drafts, or all where there are fewer.

    The kinds take turns, and within a kind the countries do, so that neither fills a split.
    """
    kinds: dict[str, list[Draft]] = defaultdict(list)
    for draft in rng.sample(drafts, len(drafts)):
        kinds[draft.kind].append(draft)
    for kind, pile in kinds.items():
        seen: Counter[str] = Counter()
        turns: list[tuple[int, Draft]] = []
        for draft in pile:
            turns.append((seen[draft.country], draft))
            seen[draft.country] += 1
        kinds[kind] = [draft for _, draft in sorted(turns, key=lambda turn: -turn[0])]
    chosen: list[Draft] = []
    while len(chosen) < min(count, len(drafts)):
        for kind in sorted(kinds):
            if kinds[kind] and len(chosen) < count:
                chosen.append(kinds[kind].pop())
    return chosen
