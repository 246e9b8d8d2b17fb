"""Edge cases, errors and the report of `agentrl.advantages.compute`."""

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from agentrl.advantages import ESTIMATORS, AdvantageError, by_stratum, compute

pytestmark = pytest.mark.filterwarnings("error")


def one_group(rewards, strata, **options):
    result = compute(np.asarray(rewards), ["q"] * len(rewards), strata, **{"alpha": 1.0, "eps": 0.0, **options})
    return result.values


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("degenerate", ["zero", "global", "merge"])
def test_a_stratum_of_one_never_gives_nan(ddof, degenerate):
    """std(ddof=1) of a single reward is NaN, and one NaN in a batch ends the training run."""
    values = one_group([1.0, 0.0, 1.0, 0.5], [0, 0, 0, 1], ddof=ddof, degenerate=degenerate)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("estimator", ["grpo", "stratified"])
def test_a_rollout_alone_does_not_get_its_raw_reward(ddof, estimator):
    """GRPO code that takes mean 0 and std 1 for a group of one turns the reward itself into the advantage."""
    result = compute([7.0, 1.0, 0.0], ["alone", "q", "q"], [0, 0, 0], estimator, ddof=ddof)
    assert result.values[0] == 0
    assert one_group([7.0, 1.0, 0.0], [2, 0, 0], ddof=ddof)[0] == 0


def test_zero_leaves_the_global_part_and_global_uses_it_whole():
    rewards, strata = [1.0, 0.0, 1.0, 0.0, 4.0], [0, 0, 0, 0, 1]
    gn = one_group(rewards, strata, alpha=0.0)
    zero = one_group(rewards, strata, alpha=0.75)
    whole = one_group(rewards, strata, alpha=0.75, degenerate="global")
    assert zero[4] == 0.25 * gn[4]
    assert whole[4] == pytest.approx(gn[4], rel=1e-15)
    np.testing.assert_array_equal(zero[:4], whole[:4])


@pytest.mark.parametrize(
    ("strata", "joined"),
    [
        ([0, 0, 4, 4, 1], [0, 0, 4, 4, 0]),
        ([0, 0, 4, 4, 3], [0, 0, 4, 4, 4]),
        ([0, 0, 4, 4, 2], [0, 0, 4, 4, 0]),
        ([0, 0, 4, 4, 9], [0, 0, 4, 4, 4]),
        ([2, 2, 2, 2, -1.5], [2, 2, 2, 2, 2]),
        ([0, 1, 2, 3, 4], [0, 0, 0, 0, 0]),
        ([0, 1, 5, 5, 2], [5, 5, 5, 5, 5]),
    ],
    ids=[
        "below",
        "above",
        "tie to the smaller",
        "beyond the last",
        "before the first",
        "all alone",
        "several join one",
    ],
)
def test_merge_joins_the_nearest_stratum_with_variance(strata, joined):
    rewards = [1.0, 0.0, 3.0, 0.0, 2.0]
    expected = one_group(rewards, joined)
    assert expected.any()
    np.testing.assert_allclose(one_group(rewards, strata, degenerate="merge"), expected, rtol=0, atol=1e-12)


def test_merge_stays_within_the_group():
    rewards, groups = [1.0, 0.0, 5.0, 1.0, 0.0, 2.0], [0, 0, 0, 1, 1, 1]
    values = compute(rewards, groups, [9, 9, 1, 1, 1, 8], alpha=1.0, degenerate="merge").values
    expected = compute(rewards, groups, [0, 0, 0, 0, 0, 0], "grpo").values
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12)


ROLLOUT = st.tuples(st.integers(-8, 8), st.integers(0, 2), st.integers(-3, 6))


@settings(deadline=None, max_examples=60)
@given(st.lists(ROLLOUT, min_size=1, max_size=30))
def test_merge_agrees_with_a_plain_reference(rollouts):
    rewards, groups, strata = (np.array(column) for column in zip(*rollouts, strict=True))
    joined = strata.copy()
    for g in set(groups):
        keys = sorted(set(strata[groups == g]))
        sound = [k for k in keys if len(set(rewards[(groups == g) & (strata == k)])) > 1]
        for k in set(keys) - set(sound):
            to = min(sound, key=lambda other: (abs(other - k), other)) if sound else keys[0]
            joined[(groups == g) & (strata == k)] = to
    values = compute(rewards, groups, strata, alpha=1.0, degenerate="merge").values
    np.testing.assert_allclose(values, compute(rewards, groups, joined, alpha=1.0).values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("key", ["two", (1, 2), float("inf")])
def test_merge_needs_numbers_as_keys(key):
    with pytest.raises(AdvantageError, match="finite numbers, got"):
        one_group([1.0, 0.0], [1, key], degenerate="merge")


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3, 1e-12, 1e12])
@pytest.mark.parametrize("options", [{}, {"degenerate": "global"}, {"degenerate": "merge"}, {"ddof": 1}])
def test_constant_rewards_give_exactly_zero(value, options):
    assert not one_group([value] * 1001, [i % 3 for i in range(1001)], alpha=0.5, **options).any()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_small_and_large_rewards_give_the_same_advantages(scale, offset):
    rewards, strata = np.array([0, 1, 1, 0, 2, 5, 2, 3.0]), [0, 0, 0, 1, 1, 1, 2, 3]
    for alpha in (0.0, 0.6, 1.0):
        expected = one_group(rewards, strata, alpha=alpha)
        np.testing.assert_allclose(one_group(scale * (rewards + offset), strata, alpha=alpha), expected, rtol=1e-10)


def test_a_small_difference_on_a_large_offset_is_variance():
    np.testing.assert_array_equal(one_group([1e12, 1e12 + 1, 1e12, 1e12 + 1], [0] * 4), [-1, 1, -1, 1])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12, -1.0])
def test_rounding_noise_of_equal_rewards_is_not_variance(scale):
    noisy = np.array([0.1 + 0.2, 0.3, 0.1 * 3, 0.6 / 2]) * scale
    assert len(set(noisy.tolist())) > 1
    assert not one_group(noisy, [0] * 4, alpha=0.5).any()


SINGLE = np.array([0.1, 0.1, 0.1000001, 0.1], dtype=np.float32)


@pytest.mark.parametrize(
    "rewards",
    [SINGLE, list(SINGLE), [None, *SINGLE], torch.tensor(SINGLE), list(torch.tensor(SINGLE))],
    ids=["array", "list", "list with a failure", "tensor", "list of tensors"],
)
@pytest.mark.parametrize("estimator", ["grpo", "stratified", "dr_grpo", "reinforce_pp"])
def test_rounding_noise_of_float32_rewards_is_not_variance(rewards, estimator):
    assert len(set(SINGLE.tolist())) > 1
    assert not np.asarray(compute(rewards, ["q"] * len(rewards), [0] * len(rewards), estimator).values).any()
    assert compute(SINGLE.astype(np.float64), ["q"] * 4, [0] * 4, estimator).values.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rewards_that_differ_by_one_unit_differ(dtype):
    one = torch.ones((), dtype=dtype)
    values = compute(torch.stack([one, torch.nextafter(one, 2 * one)]), ["q"] * 2, [0, 0], "grpo").values
    assert values[1] > 0 > values[0]


def test_ties_share_an_advantage():
    values = one_group([1.0, 1.0, 0.0, 0.0, 1.0], [0, 0, 0, 0, 0])
    assert values[0] == values[1] == values[4] > 0 > values[2] == values[3]


def test_excluded_rollouts_take_no_part_and_are_counted():
    rewards, groups, strata = [1.0, np.nan, 0.0, 1.0, np.nan], ["a", "a", "a", "a", "b"], [0, 0, 0, 1, 7]
    result = compute(rewards, groups, strata)
    kept = compute([1.0, 0.0, 1.0], ["a"] * 3, [0, 0, 1])
    assert [result.values[i] for i in (0, 2, 3)] == kept.values
    assert result.values[1] == result.values[4] == 0
    assert result.valid == [True, False, True, True, False]
    assert result.report == dataclasses.replace(kept.report, excluded=2)


def test_valid_false_excludes_as_nan_does():
    rewards, groups, strata = [1.0, np.inf, 0.0, 1.0, 0.5], ["a", "a", "a", "a", "b"], [0, 0, 0, 1, 7]
    flagged = compute(rewards, groups, strata, valid=[True, False, True, True, False])
    missing = compute([1.0, None, 0.0, 1.0, None], groups, strata)
    assert flagged.values == missing.values
    assert flagged.valid == missing.valid
    assert flagged.report == missing.report


def test_no_rollout_and_only_excluded_rollouts():
    assert compute([], [], []).values == []
    for estimator in ESTIMATORS:
        result = compute(
            [None, np.nan], ["a", "b"], [0, 1], estimator, lengths=[1, 1], turn_rewards=[[], []], anchors=[[], []]
        )
        assert not np.any(result.values)
        assert result.report.excluded == 2
        assert result.report.groups == 0


def test_report():
    rewards = [0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, np.nan]
    groups = ["constant in strata"] * 4 + ["one stratum"] * 4 + ["constant"] * 2 + ["failed"]
    strata = [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0]
    report = compute(rewards, groups, strata, alpha=1.0).report
    metrics = report.metrics()
    assert {name: value for name, value in metrics.items() if "/" not in name} == {
        "rollouts": 10.0,
        "excluded": 1.0,
        "groups": 3.0,
        "strata": 5.0,
        "degenerate_share": pytest.approx(0.6),
        "between_strata_share": pytest.approx(0.5),
        "no_signal_share_gn": pytest.approx(1 / 3),
        "no_signal_share_san": pytest.approx(2 / 3),
        "no_signal_share": pytest.approx(2 / 3),
        "effective_rollouts": pytest.approx(4.0),
        "sign_flip_share": 0.0,
        # SAN has mean 0 in each stratum, and variance 1 in the one with variance, which holds four of ten rollouts.
        "variance_between_strata": 0.0,
        "variance_within_strata": pytest.approx(0.4, abs=1e-5),
    }
    assert [(s.key, s.rollouts, s.reward) for s in report.per_stratum] == [(0, 7, 3 / 7), (1, 3, 1.0)]
    none, one = report.per_stratum
    # By group: -1 -1 | -1 1 -1 1 | 0 for the stratum without, 1 1 | 0 for the one with a search.
    assert (none.gn_mean, none.gn_variance) == pytest.approx((-2 / 7, 6 / 7 - 4 / 49))
    assert (one.gn_mean, one.gn_variance) == pytest.approx((2 / 3, 2 / 9))
    assert (none.san_mean, none.san_variance) == pytest.approx((0, 4 / 7))
    assert (one.san_mean, one.san_variance, one.advantage) == (0, 0, 0)
    assert metrics["strata/1/reward"] == 1.0


def test_numbers_of_a_stratum_are_found_by_its_label_whatever_it_holds():
    report = compute([0.0, 1.0, 1.0, 0.0], ["q"] * 4, ["a/b", "a/b", (1, "rollouts"), (1, "rollouts")]).report
    found = by_stratum(report.metrics())
    assert found.keys() == {"a/b", "1, rollouts"}
    assert [(part["rollouts"], part["reward"]) for part in found.values()] == [(2.0, 0.5), (2.0, 0.5)]


def test_sign_flips_count_rollouts_that_the_blend_moves_against_grpo():
    # The second rollout is the worst of the good stratum and still better than the group.
    rewards, strata = [4.0, 3.0, 1.0, 0.0], [1, 1, 0, 0]
    assert compute(rewards, ["q"] * 4, strata, alpha=1.0).report.sign_flip_share == 0.5
    assert compute(rewards, ["q"] * 4, strata, alpha=0.0).report.sign_flip_share == 0.0


def test_the_reports_table_shows_each_stratum_and_the_whole():
    report = compute([0.0, 1.0, 1.0, 0.0], ["q"] * 4, [(1, "hit"), (1, "hit"), 0, 0]).report
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "1, hit" in text
    assert "4 rollouts (0 more excluded), 1 groups, 2 strata" in text
    assert "groups without signal: GN 0%, SAN 0%, as trained 0%" in text


def test_keys_of_any_hashable_type_and_integer_arrays_agree():
    rng = np.random.default_rng(0)
    rewards, groups, strata = rng.normal(size=60), rng.integers(0, 6, 60), rng.integers(0, 3, 60)
    expected = compute(rewards, groups, strata).values
    tuples = compute(rewards, [("set", int(g)) for g in groups], [(int(s), "x") for s in strata]).values
    strings = compute(rewards, groups.astype(str), strata.astype(str)).values
    np.testing.assert_allclose(tuples, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(strings, expected, rtol=0, atol=1e-10)


MISSING = {
    "None": ["a", "a", None, None],
    "NaN": ["a", "a", float("nan"), float("nan")],
    "array": np.array([1.0, 1.0, np.nan, np.nan]),
    "masked array": np.ma.masked_equal([1, 1, 9, 9], 9),
    "tensor": torch.tensor([1.0, 1.0, float("nan"), 2.0]),
    "pandas' NA": pd.array([1, 1, None, None], dtype="Int64"),
    "pandas' NaT": pd.to_datetime(pd.Series(["2026-11-27", "2026-11-27", None, None])),
    "series": pd.Series(["a", "a", None, None]),
    "in a tuple": [("nq", 1), ("nq", 1), ("nq", None), ("nq", None)],
}


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("what", ["groups", "strata"])
def test_a_missing_key_is_refused_by_its_row(kind, what):
    keys = {"groups": ["q"] * 4, "strata": [0] * 4, what: MISSING[kind]}
    with pytest.raises(AdvantageError, match=rf"^{what}\[2\] is missing"):
        compute([1.0, 0.0, 1.0, 0.0], **keys)


def test_a_missing_key_of_an_excluded_rollout_does_not_matter():
    result = compute([None, 1.0, 0.0], [None, "a", "a"], [float("nan"), 0, 0])
    assert result.values == [0.0, *compute([1.0, 0.0], ["a", "a"], [0, 0]).values]
    with pytest.raises(AdvantageError, match=r"groups\[3\] is missing"):
        compute([None, 1.0, 0.0, 1.0], [None, "a", "a", None], [None, 0, 0, 0])


def test_a_group_of_a_given_size_needs_the_ids_of_failed_rollouts_too():
    with pytest.raises(AdvantageError, match=r"groups\[0\] is missing"):
        compute([None, 1.0, 0.0, 1.0], [None, "a", "b", "b"], [0] * 4, group_size=2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0, 0.0], ["a"], [0, 0]), {}, "got 2, 1 and 2"),
        (([1.0, 0.0], ["a", "a"], [0]), {}, "got 2, 2 and 1"),
        (([[1.0]], ["a"], [0]), {}, "one-dimensional"),
        ((["good"], ["a"], [0]), {}, "must be numbers"),
        (([1.0, -np.inf], ["a", "a"], [0, 0]), {}, r"rewards\[1\] is -inf"),
        (([1.0], [["a"]], [0]), {}, "groups must be hashable"),
        (([1.0], ["a"], [{}]), {}, "strata must be hashable"),
        (([1.0], ["a"], [0], "stratifed"), {}, "unknown estimator 'stratifed'.*did you mean stratified"),
        (([1.0], ["a"], [0], "no.such.module:f"), {}, "cannot be imported"),
        (([1.0], ["a"], [0], "math:no_such"), {}, "cannot be imported"),
        (([1.0], ["a"], [0], ":f"), {}, "not an import path"),
        (([1.0], ["a"], [0], "math:pi"), {}, "is a float, not a function"),
        (([1.0], ["a"], [0]), {"alhpa": 1}, "no option 'alhpa'.*alpha, eps, ddof, degenerate.*did you mean alpha"),
        (([1.0], ["a"], [0], "grpo"), {"alpha": 1}, r"'grpo' has no option 'alpha' \(it has: eps, ddof\)"),
        (([1.0], ["a"], [0]), {"alpha": 1.5}, "alpha must be auto, or from 0"),
        (([1.0], ["a"], [0]), {"alpha": float("nan")}, "alpha must be auto, or from 0"),
        (([1.0], ["a"], [0]), {"eps": -1e-6}, "eps must be"),
        (([1.0], ["a"], [0]), {"ddof": 2}, "ddof must be"),
        (([1.0], ["a"], [0]), {"degenerate": "drop"}, "degenerate must be zero, global or merge"),
    ],
)
def test_errors_name_what_is_wrong(arguments, options, message):
    with pytest.raises(AdvantageError, match=message):
        compute(*arguments, **options)


USER_MODULE = """
import numpy as np

def centred(batch, *, scale=1.0):
    means = np.bincount(batch.groups, batch.rewards) / np.bincount(batch.groups)
    return scale * (batch.rewards - means[batch.groups])

def anything(batch, **options):
    return np.full(len(batch.rewards), options["value"])
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_estimators.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_estimators"
    sys.modules.pop("my_estimators", None)


def test_an_estimator_by_import_path(user_module):
    result = compute([1.0, np.nan, 0.0], ["a"] * 3, [0, 0, 0], f"{user_module}:centred", scale=4.0)
    assert result.values == [2, 0, -2]
    with pytest.raises(AdvantageError, match=r"no option 'alpha' \(it has: scale\)"):
        compute([1.0], ["a"], [0], f"{user_module}:centred", alpha=1.0)
    assert compute([1.0], ["a"], [0], f"{user_module}:anything", value=3).values == [3]


@pytest.mark.parametrize("value", [np.nan, np.inf, [1, 2]])
def test_an_estimator_must_return_one_finite_number_for_each_rollout(user_module, value, monkeypatch):
    import my_estimators

    monkeypatch.setattr(my_estimators, "anything", lambda batch, **options: np.array(value, ndmin=1))
    with pytest.raises(AdvantageError, match="must return 1 finite numbers"):
        compute([1.0], ["a"], [0], f"{user_module}:anything")


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, agentrl.advantages; "
        "print([m for m in ('torch', 'ray', 'jnius', 'pyserini', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_an_estimator_that_fails_is_named_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "failing_estimator.py").write_text("def mine(batch):\n    return batch.rewards[99:100][0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        AdvantageError, match=r"'failing_estimator:mine' fails: IndexError: .*failing_estimator\.py:2\)"
    ):
        compute([0.0, 1.0], ["q"] * 2, [0, 0], "failing_estimator:mine")


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2), st.integers(0, 3), st.booleans()),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([0.0, 0.8, 1.0]),
)
@settings(deadline=None)
def test_the_report_splits_the_variance_of_advantages_into_that_between_strata_and_that_within(rows, alpha):
    rewards, strata, groups, valid = (list(column) for column in zip(*rows, strict=True))
    result = compute(rewards, groups, strata, valid=valid, alpha=alpha)
    report, counted = result.report, np.array(valid)
    values, numbers = np.asarray(result.values)[counted], np.array(groups)[counted]
    whole = sum(np.var(values[numbers == group]) * (numbers == group).sum() for group in set(numbers.tolist()))
    found = report.variance_between_strata + report.variance_within_strata
    assert found == pytest.approx(whole / max(1, counted.sum()), abs=1e-9)
    if alpha == 1.0:
        assert report.variance_between_strata == pytest.approx(0.0, abs=1e-9)
    # Where each rollout is a stratum of its own, nothing is within.
    apart = compute(rewards, groups, list(range(len(rows))), "grpo", valid=valid).report
    assert apart.variance_within_strata == 0.0
