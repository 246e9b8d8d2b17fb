"""How sequences are laid out: who sees whom, each beginning once, and packs and trunks that cost the least."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_sequences import ancestors, different_tokens, in_trunk, sequences

from agentrl.training.scoring import TokenSequence, pack
from agentrl.training.scoring.blocks import tree_blocks
from agentrl.training.scoring.tree import pack_behind_trunks


@given(sequences(), st.integers(1, 30), st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_scored_token_is_predicted_by_what_stands_before_it(made, tokens, share):
    seen = []
    for found in pack(made, tokens, share=share):
        assert len(found) <= tokens or len(found.members) == 1
        seen += found.members
        place = 0
        for member in found.members:
            sequence = made[member]
            for position in sequence.scored:
                prediction = found.places[place]
                place += 1
                source = int(found.sources[prediction])
                path = ancestors(found.ends.tolist(), source)
                assert found.ids[0, path].tolist() == sequence.ids[:position].tolist()
                assert found.position_ids[0, path].tolist() == list(range(position))
                assert found.targets[prediction] == sequence.ids[position]
        assert place == len(found.places)
    assert sorted(seen) == [i for i, sequence in enumerate(made) if len(sequence.scored)]


@given(sequences())
@settings(max_examples=200, deadline=None)
def test_in_one_pack_each_beginning_is_computed_once(made):
    packs = list(pack(made, 1000))
    assert sum(len(found) for found in packs) == different_tokens(made)
    predictions = {tuple(s.ids[: p + 1]) for s in made for p in s.scored}
    assert sum(len(found.sources) for found in packs) == len(predictions)


@given(sequences(), st.integers(1, 200), st.integers(0, 90))
@settings(max_examples=300, deadline=None)
def test_a_trunk_is_what_its_packs_begin_with_and_saves_more_than_it_costs(made, tokens, size):
    made = in_trunk(made, size)
    behind, trunks = list(pack_behind_trunks(made, tokens)), {}
    packs = list(pack(made, tokens))
    assert sorted(i for found in behind for i in found.members) == sorted(i for found in packs for i in found.members)
    for found in behind:
        assert len(found) <= tokens or len(found.members) == 1
        if found.trunk is not None:
            trunks.setdefault(id(found.trunk), (found.trunk, []))[1].append(found)
            assert found.ids[0, : found.shared].tolist() == found.trunk.ids[0].tolist()
            assert (found.ends[: found.shared] == len(found)).all()
            assert found.shared < len(found)
    for trunk, users in trunks.values():
        assert trunk.asked.tolist() == sorted({s for u in users for s in u.sources.tolist() if s < len(trunk)})
    computed = sum(len(found) - found.shared for found in behind) + sum(len(trunk) for trunk, _ in trunks.values())
    cost = computed + 64 * (len(behind) + len(trunks))
    assert different_tokens(made) <= computed
    assert cost <= sum(len(found) + 64 for found in packs)
    if size > 64 and len(behind) > 1:
        assert sum(len(users) for _, users in trunks.values()) == len(behind)


def test_packs_are_cut_for_what_they_cost_behind_their_trunks():
    # Two groups of four, of 100 tokens each behind 150 that they share. In packs of 500 the fewest tokens without trunks are
    # those of three packs, of which one holds both groups; behind trunks each group has two packs.
    made = [
        TokenSequence(np.concatenate([np.full(150, group), np.full(101, 10 + member)]), np.array([250]))
        for group in range(2)
        for member in range(4)
    ]
    assert [len(found) for found in pack(made, 500)] == [450, 500, 450]
    behind = list(pack_behind_trunks(made, 500))
    assert [found.shared for found in behind] == [150] * 4
    assert sum(len(found) - found.shared for found in behind) == 800


@given(sequences(), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_no_other_cuts_make_packs_that_cost_less(made, tokens):
    cost = sum(len(found) + 64 for found in pack(made, tokens))
    inputs = sorted((s for s in made if len(s.scored)), key=lambda s: s.inputs.tolist())

    def least(start):
        costs = []
        for stop in range(start + 1, len(inputs) + 1):
            size = different_tokens(inputs[start:stop])
            if size <= tokens or stop == start + 1:
                costs.append(size + 64 + least(stop))
        return min(costs, default=0)

    assert cost == least(0)


@given(sequences(), st.sampled_from([None, 1, 3]), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_blocks_hold_each_pair_of_tokens_that_see_one_another_once(made, window, shared):
    for found in pack(made, 1000):
        depths, ends = found.position_ids[0], found.ends
        # Only what all later tokens see can be in a trunk.
        chain = int((ends == len(found)).long().cumprod(0).sum())
        shared = min(shared, chain, len(found) - 1)
        wanted = {
            (query, key)
            for query in range(shared, len(found))
            for key in ancestors(ends.tolist(), query)
            if window is None or depths[query] - depths[key] < window
        }
        pairs = []
        for block in tree_blocks(depths, ends, window, shared):
            before = block.ancestors
            before = list(range(before, block.start)) if isinstance(before, int) else before.tolist()
            keys = [*before, *range(block.start, block.stop)]
            visible = torch.ones(len(keys), len(keys)).tril() if block.mask is None else (block.mask[0, 0] == 0).float()
            pairs += [(block.start + query, keys[key]) for query, key in visible.nonzero().tolist()]
        assert len(pairs) == len(set(pairs))
        assert set(pairs) == wanted


@pytest.mark.parametrize("instruction", [0, 64, 100])
def test_packs_are_cut_between_questions_behind_an_instruction_too(instruction):
    made = [
        TokenSequence(
            np.concatenate([np.full(instruction, 5), np.full(150, 6 + group), np.full(101, 10 + member)]),
            np.array([instruction + 250]),
        )
        for group in range(2)
        for member in range(4)
    ]
    behind = list(pack_behind_trunks(made, 500 + instruction))
    # Each question has two packs behind a trunk of its own, in which the instruction is.
    assert [found.shared for found in behind] == [150 + instruction] * 4
