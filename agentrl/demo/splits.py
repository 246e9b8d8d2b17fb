"""Dealing the demo's questions to train, dev and test, so that no place is in two of them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set

from agentrl.demo.facts import World
from agentrl.demo.questions import Draft

SIZES = {"train": 2000, "dev": 150, "test": 200}
"""The questions of each split, unless the world has fewer."""

_THREE_HOPS = 0.1
"""The share of questions with three hops; of the others, half have one hop and half have two."""
_JOINED = 2
"""How many groups of countries with questions of three hops each small split gets before any other."""
_SHARES = {"dev": 0.09, "test": 0.13}
"""The shares of the countries that the small splits get; the rest is for training."""


def split_questions(world: World, drafts: Sequence[Draft], seed: int) -> dict[str, list[Draft]]:
    """Return the questions of each split, in random order, as many as `SIZES` says, or fewer where some hops have too few.

    A tenth of them has three hops where the split's countries have as many; the rest is divided evenly between one hop and
    two. In training the kinds of as many hops are equally frequent, as far as there are enough of each; dev and test ask each
    kind as often as training does.

    The three-hop questions of each split are on at least two countries that are the only neighbour of another, if the world has
    six of them that need not be in one split; where it has fewer, dev is served first and training last. The seed chooses the
    first country of dev and of test, and the second is one that adds most of the kinds that the first lacks.
    """
    three_hops: dict[str, set[str]] = defaultdict(set)
    for draft in drafts:
        if len(draft.passages) == 3:
            three_hops[draft.country].add(draft.kind)
    home = _split_countries(world, three_hops, seed)
    splits: dict[str, list[Draft]] = {}
    for split, size in SIZES.items():
        by_hops: dict[int, list[Draft]] = {1: [], 2: [], 3: []}
        for draft in drafts:
            if home[draft.country] == split:
                by_hops[len(draft.passages)].append(draft)
        rng = random.Random(f"{seed}:{split}")
        # Training may have none with so many hops; each kind is then as good as another.
        frequencies = {
            hops: Counter(draft.kind for draft in splits.get("train", ()) if len(draft.passages) == hops) or None
            for hops in by_hops
        }
        triple = balanced(by_hops[3], round(_THREE_HOPS * size), rng, frequencies[3])
        rest = size - len(triple)
        single = balanced(by_hops[1], rest - rest // 2, rng, frequencies[1])
        double = balanced(by_hops[2], rest // 2, rng, frequencies[2])
        chosen = [*single, *double, *triple]
        rng.shuffle(chosen)
        splits[split] = chosen
    return splits


def _split_countries(world: World, three_hops: Mapping[str, Set[str]], seed: int) -> dict[str, str]:
    """Return the split of each country code; `three_hops` tells the kinds of such questions by the country that they are on.

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
    room = {split: round(share * len(world.countries)) for split, share in _SHARES.items()}

    def deal(split: str, group_codes: list[str]) -> None:
        order.remove(group_codes)
        home.update(dict.fromkeys(group_codes, split))
        room[split] -= len(group_codes)

    for split in _SHARES:
        found: set[str] = set()
        for _ in range(_JOINED):
            kinds_of = [(codes, {kind for code in codes for kind in three_hops.get(code, ())}) for codes in order]
            joined = [(codes, kinds) for codes, kinds in kinds_of if kinds]
            if joined:
                # Of many a neighbour some facts are unknown.
                codes, kinds = max(joined, key=lambda pair: len(pair[1] - found)) if found else joined[-1]
                deal(split, codes)
                found |= kinds
    for split in _SHARES:
        while room[split] > 0 and order:
            deal(split, order[-1])
    return home | {code: "train" for group_codes in order for code in group_codes}


def balanced(
    drafts: Sequence[Draft], count: int, rng: random.Random, frequencies: Mapping[str, int] | None = None
) -> list[Draft]:
    """Return `count` drafts, or all of the kinds that are wanted where there are fewer.

    The kinds take turns, and within a kind the countries do, so that neither fills a split. With `frequencies` each kind is as
    frequent among those returned as in them (Sainte-Laguë's method), as far as there are enough.
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
    taken: Counter[str] = Counter()
    weights = {kind: 1 if frequencies is None else frequencies.get(kind, 0) for kind in sorted(kinds)}
    while len(chosen) < count:
        left = [kind for kind, weight in weights.items() if weight and kinds[kind]]
        if not left:
            break
        kind = min(left, key=lambda kind: (taken[kind] + 0.5) / weights[kind])
        chosen.append(kinds[kind].pop())
        taken[kind] += 1
    return chosen
