"""alpha as a number of its own for each stratum, as a schedule and by progress; and the balance of strata."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.advantages import AdvantageError, compute
from agentrl.advantages.schedule import Options, StratumRewards, make_rule

REWARD = st.integers(-8, 8).map(lambda quarter: quarter / 4)
GROUP = st.lists(st.tuples(REWARD, st.integers(0, 3)), min_size=1, max_size=24)


def arrays(rollouts):
    return tuple(np.array(column) for column in zip(*rollouts, strict=True))


def values(rewards, strata, **options):
    return compute(np.asarray(rewards, float), ["q"] * len(rewards), strata, **{"eps": 0.0, **options}).values


def weights(rewards, strata):
    """What auto weighs each rollout's own stratum with, by the definition."""
    group = np.asarray(rewards, float)
    parts = {key: group[strata == key] for key in np.unique(strata)}
    k, s = len(group), len(parts)
    if s < 2 or k == s:
        return np.zeros(k)
    within = sum(((part - part.mean()) ** 2).sum() for part in parts.values()) / (k - s)
    between = sum(len(part) * (part.mean() - group.mean()) ** 2 for part in parts.values()) / (s - 1)
    spread = max(0.0, (between - within) / ((k - sum(len(part) ** 2 for part in parts.values()) / k) / (s - 1)))
    out = np.zeros(k)
    for key, part in parts.items():
        if np.ptp(part) > 0 and spread > 1e-12:
            out[strata == key] = spread / (spread + within / len(part))
    return out


@given(GROUP)
def test_auto_agrees_with_its_formula_and_lies_between_grpo_and_san(rollouts):
    rewards, strata = arrays(rollouts)
    weight = weights(rewards, strata)
    expected = weight * values(rewards, strata, alpha=1.0) + (1 - weight) * values(rewards, strata, alpha=0.0)
    np.testing.assert_allclose(values(rewards, strata, alpha="auto"), expected, rtol=0, atol=1e-8)
    assert ((weight >= 0) & (weight < 1)).all()


@given(GROUP)
def test_auto_is_grpo_where_strata_hold_one_rollout_each_or_there_is_one(rollouts):
    rewards, _ = arrays(rollouts)
    gn = values(rewards, np.zeros(len(rewards), int), alpha=0.0)
    np.testing.assert_array_equal(values(rewards, np.arange(len(rewards)), alpha="auto"), gn)
    np.testing.assert_array_equal(values(rewards, np.zeros(len(rewards), int), alpha="auto"), gn)


@given(st.lists(REWARD, min_size=2, max_size=8), st.integers(2, 4))
def test_auto_is_grpo_where_strata_do_not_differ(stratum, copies):
    rewards, strata = np.tile(stratum, copies), np.repeat(np.arange(copies), len(stratum))
    np.testing.assert_allclose(
        values(rewards, strata, alpha="auto"), values(rewards, strata, alpha=0.0), rtol=0, atol=1e-10
    )


def test_auto_tends_to_san_as_strata_grow_and_differ():
    distances = []
    for copies in (1, 10, 100, 1000):
        rewards = np.concatenate([np.tile([0.0, 1.0], copies), np.tile([2.0, 4.0], copies)])
        strata = np.repeat([0, 1], 2 * copies)
        distances.append(np.abs(values(rewards, strata, alpha="auto") - values(rewards, strata, alpha=1.0)).max())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-2 < distances[0]


def test_auto_keeps_the_whole_of_grpo_where_rewards_are_constant_within_strata():
    """The example of T11: pure SAN is 0 there."""
    np.testing.assert_array_equal(values([0, 0, 1, 1], [0, 0, 1, 1], alpha="auto"), [-1, -1, 1, 1])


@given(GROUP, st.integers(3, 6))
def test_strata_below_the_least_size_count_as_degenerate(rollouts, least):
    rewards, strata = arrays(rollouts)
    small = np.bincount(strata)[strata] < least
    san, whole = values(rewards, strata, alpha=1.0), values(rewards, strata, alpha=1.0, min_stratum_size=least)
    np.testing.assert_array_equal(whole, np.where(small, 0.0, san))


@given(GROUP, st.floats(0.01, 3), st.floats(0, 1))
def test_balance_pulls_towards_rare_strata_and_sums_to_zero(rollouts, beta, alpha):
    rewards, strata = arrays(rollouts)
    pull = values(rewards, strata, alpha=alpha, balance=beta) - values(rewards, strata, alpha=alpha)
    assert pull.sum() == pytest.approx(0, abs=1e-9)
    share = np.bincount(strata)[strata] / len(strata)
    entropy = -np.mean(np.log(share))
    np.testing.assert_allclose(pull, alpha * beta * (-np.log(share) - entropy), rtol=0, atol=1e-9)


def test_balance_follows_the_gradient_of_the_entropy_of_the_strata():
    """In a group whose shares are those of the policy: softmax over three strata with shares 1/8, 2/8 and 5/8."""
    strata = np.repeat([0, 1, 2], [1, 2, 5])
    shares = np.array([1, 2, 5]) / 8
    pull = values(np.zeros(8), strata, alpha=1.0, balance=1.0)
    grad_log = np.eye(3)[strata] - shares
    estimate = (pull[:, None] * grad_log).mean(axis=0)

    def entropy(logits):
        p = np.exp(logits) / np.exp(logits).sum()
        return -(p * np.log(p)).sum()

    step, logits = 1e-6, np.log(shares)
    exact = [(entropy(logits + step * e) - entropy(logits - step * e)) / (2 * step) for e in np.eye(3)]
    np.testing.assert_allclose(estimate, exact, atol=1e-8)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("step", [1, 1, 1, 0, 0]), ("linear", [1, 2 / 3, 1 / 3, 0, 0]), ("cosine", [1, 0.75, 0.25, 0, 0])],
)
def test_schedules(shape, expected):
    rule = make_rule("alpha", {"start": 1.0, "end": 0.0, "shape": shape, "at": 0.6})
    assert [rule.value(progress) for progress in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx(expected)


@given(
    st.floats(0, 1), st.floats(0, 1), st.sampled_from(["step", "linear", "cosine"]), st.floats(0, 1), st.floats(0, 1)
)
def test_a_schedule_stays_between_its_ends_and_has_the_last_from_its_place_on(start, end, shape, at, progress):
    value = make_rule("alpha", {"start": start, "end": end, "shape": shape, "at": at}).value(progress)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12
    assert progress < at or value == end


def feed(rule, *means, count=100, steps=1):
    seen = []
    for mean in means:
        for _ in range(steps):
            rule.observe({"1": StratumRewards(count, mean, mean * (1 - mean))})
        seen.append(rule.value(0.0))
    return seen


def test_progress_moves_to_the_end_when_rewards_stop_rising_and_back_when_they_rise_again():
    rule = make_rule("alpha", {"rule": "progress", "window": 1, "patience": 2, "stride": 0.5})
    assert feed(rule, 0.2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9, 0.9) == [1, 1, 1, 0.5, 0, 0, 0.5, 0.5]


def test_progress_looks_at_windows_and_not_at_steps():
    rule = make_rule("alpha", {"rule": "progress", "window": 5, "patience": 1, "stride": 1.0})
    assert feed(rule, 0.5, 0.5, steps=5) == [1, 0]


def test_progress_does_not_trust_few_rollouts():
    rule = make_rule("alpha", {"rule": "progress", "window": 1, "patience": 1, "stride": 1.0, "least": 30})
    assert feed(rule, 0.0, 1.0, count=29) == [1, 0]


def test_progress_takes_a_rise_within_the_error_for_none():
    rule = make_rule("alpha", {"rule": "progress", "window": 1, "patience": 1, "stride": 1.0})
    error = math.sqrt(2 * 0.25 / 100)
    assert feed(rule, 0.5, 0.5 + 1.9 * error) == [1, 0]
    rule = make_rule("alpha", {"rule": "progress", "window": 1, "patience": 1, "stride": 1.0})
    assert feed(rule, 0.5, 0.5 + 2.1 * error) == [1, 1]


def test_options_resolve_rules_and_keep_constants():
    options = Options({"alpha": {"start": 1, "end": 0}, "eps": 1e-6})
    assert options.at(0.0) == {"alpha": 1, "eps": 1e-6}
    assert options.at(0.5) == {"alpha": 0, "eps": 1e-6}
    assert options.moving == ["alpha"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rule": "steps"}, "alpha: rule must be one of schedule, progress, got 'steps'"),
        ({"start": 1}, "alpha: rule schedule needs a start and an end"),
        ({"start": 1, "end": 0, "shap": "step"}, "no setting 'shap'.*did you mean shape"),
        ({"start": 1, "end": 0, "shape": "sine"}, "alpha: shape must be one of"),
        ({"start": 1, "end": 0, "at": 2}, "alpha: at must be from 0 to 1"),
        ({"start": "one", "end": 0}, "alpha: start must be a finite number"),
        ({"rule": "progress", "window": 0}, "alpha: window must be a whole number of at least 1"),
        ({"rule": "progress", "_value": 0}, "no setting '_value'"),
    ],
)
def test_errors_of_rules_name_the_option(spec, message):
    with pytest.raises(AdvantageError, match=message):
        Options({"alpha": spec})


def test_balance_is_refused_beside_auto_which_would_leave_it_out_where_it_matters():
    with pytest.raises(AdvantageError, match="balance needs an alpha that is a number"):
        values([0.0, 1.0, 1.0], [0, 0, 1], alpha="auto", balance=0.5)
