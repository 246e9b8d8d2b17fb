"""The learnt baseline: what it is fitted to, what it takes out of the gradient, and what it does before it knows anything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.advantages import AdvantageError, Estimate, compute, label

pytestmark = pytest.mark.filterwarnings("error")

ROLLOUT = st.tuples(
    st.integers(-8, 8).map(lambda quarter: quarter / 4) | st.none(),
    st.integers(0, 3),
    st.sampled_from([0, 1, 2, ("late", 1)]),
)
BATCH = st.lists(ROLLOUT, min_size=1, max_size=16)


def run(rollouts, past=(), **options):
    rewards, groups, strata = zip(*rollouts, strict=True)
    return compute(np.array(rewards, dtype=float), groups, strata, "value_baseline", past=past, **options)


def run_all(batches, **options):
    """The results of the batches of a run, one after another."""
    results = []
    for rollouts in batches:
        results.append(run(rollouts, [result.notes for result in results], **options))
    return results


def with_others(rollouts):
    """Yield reward, mean of the others, stratum and place of each rollout that counts and has company."""
    for i, (reward, group, stratum) in enumerate(rollouts):
        others = [r for j, (r, g, _) in enumerate(rollouts) if g == group and j != i and r is not None]
        if reward is not None and others:
            yield reward, np.mean(others), stratum, i


def features(others, stratum, strata):
    return [1.0, others, *(float(stratum == known) for known in strata)]


def reference(past, rollouts, window, ridge, per_stratum):
    """The definition: least squares over the rollouts themselves, with a row for the penalty of each coefficient."""
    seen = [row for batch in past[-window:] for row in with_others(batch)]
    strata = sorted({stratum for _, _, stratum, _ in seen}, key=label) if per_stratum else []
    rows = [features(others, stratum, strata) for _, others, stratum, _ in seen]
    targets = [reward - others for reward, others, _, _ in seen]
    size = 2 + len(strata)
    design = np.vstack([np.reshape(rows, (-1, size)), np.sqrt(ridge) * np.eye(size)])
    coefficients = np.linalg.lstsq(design, np.concatenate([targets, np.zeros(size)]), rcond=None)[0]
    out = np.zeros(len(rollouts))
    for reward, others, stratum, i in with_others(rollouts):
        out[i] = reward - others - coefficients @ features(others, stratum, strata)
    return out


@settings(deadline=None)
@given(st.lists(BATCH, min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([0.1, 1.0, 30.0]), st.booleans())
def test_the_baseline_is_the_ridge_regression_over_the_rollouts_of_the_window(batches, window, ridge, per_stratum):
    *past, last = batches
    found = run_all(batches, window=window, ridge=ridge, per_stratum=per_stratum)[-1].values
    np.testing.assert_allclose(found, reference(past, last, window, ridge, per_stratum), rtol=0, atol=1e-9)


@given(BATCH)
def test_without_a_past_it_is_rloo_bit_for_bit(rollouts):
    rewards, groups, strata = zip(*rollouts, strict=True)
    rloo = compute(np.array(rewards, dtype=float), groups, strata, "rloo")
    assert run(rollouts).values.tobytes() == rloo.values.tobytes()


@given(st.lists(BATCH, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_permuting_rollouts_permutes_advantages_and_leaves_what_is_learnt(batches, random):
    orders = [random.sample(range(len(batch)), len(batch)) for batch in batches]
    before = run_all(batches)[-1].values
    after = run_all([[batch[i] for i in order] for batch, order in zip(batches, orders, strict=True)])[-1].values
    np.testing.assert_allclose(after, before[orders[-1]], rtol=0, atol=1e-9)


@given(st.lists(BATCH, min_size=1, max_size=3), BATCH)
def test_a_batch_is_not_compared_with_what_came_before_the_window(batches, last):
    first = [(1.0, 0, 0), (0.0, 0, 1)] * 8
    short, long = (run_all([*start, *batches, last], window=len(batches))[-1] for start in ([], [first]))
    np.testing.assert_array_equal(long.values, short.values)


def test_what_strata_earn_is_learnt_and_taken_off():
    """Strata that earn 0.2 and 0.8 of the time apart from all else: V tends to these, given enough batches."""
    rng = np.random.default_rng(0)

    def batch(step):
        strata = rng.integers(0, 2, 512)
        rewards = (rng.random(512) < np.where(strata == 1, 0.8, 0.2)).astype(float)
        return list(zip(rewards.tolist(), (np.arange(512) // 8).tolist(), strata.tolist(), strict=True))

    batches = [batch(step) for step in range(40)]
    results = run_all(batches, window=40)
    baseline = np.array([reward for reward, _, _ in batches[-1]]) - results[-1].values
    strata = np.array([stratum for _, _, stratum in batches[-1]])
    assert np.abs(baseline - np.where(strata == 1, 0.8, 0.2)).max() < 0.1
    # The true V explains 1 - 0.16 / 0.25 of the variance; the mean of seven others has more variance than the best constant.
    assert results[0].notes["r2"] < 0
    assert results[-1].notes["r2"] == pytest.approx(0.36, abs=0.08)


def test_r2_is_that_of_a_baseline_that_has_not_seen_the_batch():
    batches = [[(1.0, 0, 0), (0.0, 0, 1), (1.0, 0, 0)], [(0.0, 0, 0), (1.0, 0, 1), (0.5, 0, 0), (0.3, 5, 0)]]
    result = run_all(batches)[-1]
    rewards = np.array([0.0, 1.0, 0.5])
    squares = (result.values[:3] ** 2).sum() / ((rewards - rewards.mean()) ** 2).sum()
    assert result.notes["r2"] == pytest.approx(1 - squares)
    assert "r2" not in run([(1.0, 0, 0), (1.0, 0, 1)]).notes
    assert "r2" not in run([(1.0, 0, 0), (0.0, 1, 1)]).notes


def test_a_group_of_equal_rewards_is_compared_with_past_batches_and_a_rollout_alone_is_not():
    past = [[(1.0, 0, 0), (0.0, 0, 1)] * 8]
    values = run_all([*past, [(0.0, 0, 0), (0.0, 0, 1), (0.0, 1, 0)]])[-1].values
    assert values[0] < 0 < values[1]
    assert values[2] == 0


# Four things a policy can do: the stratum and the reward of each.
STRATA, REWARDS = np.array([0, 0, 1, 1]), np.array([0.0, 1.0, 0.0, 0.5])
PAST = [[(0.0, 0, 0), (1.0, 0, 1), (1.0, 0, 1)], [(0.5, 0, 0), (0.0, 0, 0), (0.5, 0, 1)]]


def gradient(**options):
    """The expectation of sum_i A(i) grad log pi(i) over all groups of three, and the policy with its grad log pi."""
    policy = np.exp([0.3, -0.2, 0.5, 0.0])
    policy /= policy.sum()
    grad_log = np.eye(4) - policy
    past = [result.notes for result in run_all(PAST)]
    total = np.zeros(4)
    for group in itertools.product(range(4), repeat=3):
        picked = list(group)
        rollouts = list(zip(REWARDS[picked].tolist(), [0] * 3, STRATA[picked].tolist(), strict=True))
        total += policy[picked].prod() * run(rollouts, past, **options).values @ grad_log[picked]
    return total, policy, grad_log


def test_t13_without_strata_the_learnt_baseline_leaves_the_gradient_unbiased():
    found, policy, grad_log = gradient(per_stratum=False)
    np.testing.assert_allclose(found, 3 * (policy * REWARDS) @ grad_log, rtol=0, atol=1e-10)


def test_t13_with_strata_it_takes_out_what_it_learnt_of_the_choice_between_them():
    found, policy, grad_log = gradient()
    past = [result.notes for result in run_all(PAST)]
    # Two rollouts without a reward in one group: what is left of A is what V adds for their strata.
    probe = -run([(0.0, 0, 0), (0.0, 0, 1)], past).values
    coefficients = probe[STRATA] - probe[0]
    removed = 3 * (policy * coefficients) @ grad_log
    np.testing.assert_allclose(found, 3 * (policy * REWARDS) @ grad_log - removed, rtol=0, atol=1e-10)
    assert np.abs(removed).max() > 0.05


@given(st.lists(BATCH, min_size=1, max_size=3), st.sampled_from([0, 1]))
def test_scaling_divides_by_the_deviation_of_the_rewards_of_the_batch(batches, ddof):
    plain, scaled = run_all(batches)[-1], run_all(batches, scale="batch", eps=0.5, ddof=ddof)[-1]
    rewards = [reward for reward, _, _ in batches[-1] if reward is not None]
    assert scaled.notes == plain.notes
    if len(set(rewards)) < 2:
        assert not scaled.values.any()
    else:
        expected = plain.values / (np.std(rewards, ddof=ddof) + 0.5)
        np.testing.assert_allclose(scaled.values, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number"),
        ({"window": 2.5}, "window must be a whole number"),
        ({"ridge": 0.0}, "ridge must be a finite number above 0"),
        ({"ridge": np.inf}, "ridge must be a finite number above 0"),
        ({"scale": "group"}, "scale must be none or batch"),
        ({"scale": "batch", "eps": -1.0}, "eps must be"),
        ({"scale": "batch", "ddof": 2}, "ddof must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(AdvantageError, match=message):
        run([(1.0, 0, 0), (0.0, 0, 1)], **options)


def counting(batch):
    """An estimator of a user's own that learns: how many batches there were."""
    return Estimate(batch.rewards * len(batch.past), {"batches": 1.0 + sum(notes["batches"] for notes in batch.past)})


def vague(batch):
    return Estimate(batch.rewards, {"mean": float("nan")})


def test_any_estimator_can_note_what_later_batches_shall_know():
    first = compute([1.0, 2.0], [0, 0], [0, 0], "test_value:counting")
    second = compute([1.0, 2.0], [0, 0], [0, 0], "test_value:counting", past=[first.notes])
    assert (first.values, first.notes) == ([0.0, 0.0], {"batches": 1.0})
    assert (second.values, second.notes) == ([1.0, 2.0], {"batches": 2.0})
    assert compute([1.0, 2.0], [0, 0], [0, 0], "grpo", past=[first.notes]).notes == {}


def test_notes_that_are_no_finite_numbers_are_refused():
    with pytest.raises(AdvantageError, match="must note finite numbers by name, got 'mean': nan"):
        compute([1.0], [0], [0], "test_value:vague")
