"""What kind of array goes in comes out, and groups of the wrong size are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentrl.advantages import AdvantageError, compute

REWARDS, GROUPS, STRATA = [1.0, 0.0, 1.0, 0.0, float("nan")], [3, 3, 3, 3, 9], [0, 0, 1, 0, 2]


def test_lists_give_lists():
    result = compute(REWARDS, GROUPS, STRATA)
    assert isinstance(result.values, list)
    assert result.valid == [True] * 4 + [False]
    assert all(isinstance(value, float) for value in result.values)


def test_arrays_give_float64_arrays_whatever_their_dtype():
    expected = compute(REWARDS, GROUPS, STRATA).values
    for dtype in (np.float64, np.float32, np.float16):
        result = compute(np.array(REWARDS, dtype=dtype), np.array(GROUPS), np.array(STRATA))
        assert result.values.dtype == np.float64
        assert result.valid.dtype == np.bool_
        np.testing.assert_array_equal(result.values, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_give_tensors_of_their_dtype(dtype):
    expected = torch.tensor(compute(REWARDS, GROUPS, STRATA).values, dtype=dtype)
    result = compute(torch.tensor(REWARDS, dtype=dtype, requires_grad=True), torch.tensor(GROUPS), torch.tensor(STRATA))
    assert result.values.dtype == dtype
    assert not result.values.requires_grad
    torch.testing.assert_close(result.values, expected)
    assert result.valid.dtype == torch.bool


def test_lists_of_tensors_are_keys_by_their_value():
    result = compute(REWARDS, list(torch.tensor(GROUPS)), list(torch.tensor(STRATA)))
    assert result.values == compute(REWARDS, GROUPS, STRATA).values


def test_keys_of_narrow_integers_may_lie_far_apart():
    ids = np.array([-128, 127, -128, 127], dtype=np.int8)
    assert compute([0.0, 1.0, 1.0, 0.0], ids, ids).values == compute([0.0, 1.0, 1.0, 0.0], ids.tolist(), [0] * 4).values


def test_a_tensor_of_whole_numbers_gives_floats():
    result = compute(torch.tensor([1, 0, 1, 0]), ["q"] * 4, [0] * 4, "dr_grpo", valid=torch.tensor([True] * 4))
    torch.testing.assert_close(result.values, torch.tensor([0.5, -0.5, 0.5, -0.5]))


def test_values_per_turn_keep_the_kind():
    anchors = [[0, 1], [0]]
    assert compute([1.0, 0.0], ["q"] * 2, [0, 0], "gigpo", anchors=anchors).values[1][1] == 0.0
    assert compute(torch.tensor([1.0, 0.0]), ["q"] * 2, [0, 0], "gigpo", anchors=anchors).values.shape == (2, 2)


def test_scope_batch_takes_all_rollouts_for_one_group():
    rewards, strata = np.array([0.0, 1.0, 2.0, 5.0]), [0, 1, 0, 1]
    whole = compute(rewards, ["one"] * 4, strata)
    reaching = compute(rewards, ["a", "a", "b", "b"], strata, scope="batch")
    np.testing.assert_array_equal(reaching.values, whole.values)
    assert reaching.report == whole.report


@given(st.integers(2, 5), st.integers(2, 4), st.data())
def test_ids_that_restart_in_each_data_set_are_refused(size, questions, data):
    """Two data sets number their questions from 0: both groups of some number fall together."""
    shared = data.draw(st.integers(1, questions))
    groups = [q for q in range(questions) for _ in range(size)] + [q for q in range(shared) for _ in range(size)]
    rewards = [float(i % 2) for i in range(len(groups))]
    with pytest.raises(AdvantageError, match=f"group 0 has {2 * size} rollouts instead of {size}; do two data sets"):
        compute(rewards, groups, [0] * len(groups), group_size=size)
    named = [("nq" if i < questions * size else "hotpotqa", group) for i, group in enumerate(groups)]
    compute(rewards, named, [0] * len(groups), group_size=size)


@given(st.integers(2, 6), st.integers(1, 5))
def test_a_group_that_was_taken_apart_is_refused(size, left):
    groups = ["a"] * size + ["b"] * min(left, size - 1)
    with pytest.raises(AdvantageError, match="group 'b' has"):
        compute([0.0] * len(groups), groups, [0] * len(groups), group_size=size)


def test_a_failed_rollout_counts_towards_the_size_of_its_group():
    compute([1.0, None, 0.0, 1.0], ["a", "a", "b", "b"], [0] * 4, group_size=2)
