"""The statements T1 to T12 of docs/algorithm.md, each to 1e-10 in float64, and T10 by simulation.

Rewards are quarters of small integers, so that an error of 1e-10 can only come from the code and not from the inputs.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.advantages import compute

EXACT = 1e-10

pytestmark = pytest.mark.filterwarnings("error")

modest = settings(deadline=None, max_examples=60)

REWARD = st.integers(-8, 8).map(lambda quarter: quarter / 4)
ALPHA = st.floats(0, 1)
GROUP = st.lists(st.tuples(REWARD, st.integers(0, 3)), min_size=1, max_size=16)
BATCH = st.lists(st.tuples(REWARD, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


def arrays(rollouts):
    return tuple(np.array(column) for column in zip(*rollouts, strict=True))


def one_group(rewards, strata, **options):
    return compute(rewards, np.zeros(len(rewards), int), strata, **{"alpha": 1.0, "eps": 0.0, **options}).values


def gn(rewards, **options):
    return one_group(rewards, np.zeros(len(rewards), int), alpha=0.0, **options)


def members(rewards, strata):
    """Each stratum's mask with its mean and standard deviation (ddof 0)."""
    for key in np.unique(strata):
        mask = strata == key
        yield mask, rewards[mask].mean(), rewards[mask].std()


def stratum_means(rewards, strata):
    means = np.empty(len(rewards))
    for mask, mean, _ in members(rewards, strata):
        means[mask] = mean
    return means


def reference(rewards, groups, strata, alpha, eps, ddof=0):
    out = np.zeros(len(rewards))
    for i in range(len(rewards)):
        for weight, peer in ((alpha, (groups == groups[i]) & (strata == strata[i])), (1 - alpha, groups == groups[i])):
            peers = rewards[peer & ~np.isnan(rewards)]
            if np.isnan(rewards[i]) or len(peers) < 2 or np.ptp(peers) == 0:
                continue
            out[i] += weight * (rewards[i] - peers.mean()) / (peers.std(ddof=ddof) + eps)
    return out


@modest
@given(BATCH, ALPHA, st.sampled_from([0.0, 1e-6, 0.1]), st.sampled_from([0, 1]), st.sets(st.integers(0, 39)))
def test_agrees_with_a_plain_reference(rollouts, alpha, eps, ddof, failed):
    rewards, groups, strata = arrays(rollouts)
    rewards[[i for i in failed if i < len(rewards)]] = np.nan
    result = compute(rewards, groups, strata, alpha=alpha, eps=eps, ddof=ddof)
    np.testing.assert_allclose(result.values, reference(rewards, groups, strata, alpha, eps, ddof), rtol=0, atol=EXACT)
    np.testing.assert_array_equal(result.valid, ~np.isnan(rewards))


@modest
@given(GROUP, st.floats(0.1, 2))
def test_t1_global_deviation_is_stratum_deviation_plus_a_bias_constant_in_each_stratum(rollouts, eps):
    rewards, strata = arrays(rollouts)
    std = rewards.std()
    scale = std + eps if np.ptp(rewards) > 0 else 0.0
    deviation = gn(rewards, eps=eps) * scale
    for mask, mean, stratum_std in members(rewards, strata):
        within = one_group(rewards, strata, eps=eps)[mask] * (stratum_std + eps)
        bias = deviation[mask] - within
        np.testing.assert_allclose(bias, mean - rewards.mean(), rtol=0, atol=EXACT)


@modest
@given(GROUP)
def test_t2_stratifying_removes_exactly_the_variance_between_strata(rollouts):
    rewards, strata = arrays(rollouts)
    means = stratum_means(rewards, strata)
    total = np.mean((rewards - rewards.mean()) ** 2)
    removed = total - np.mean((rewards - means) ** 2)
    between = sum(mask.sum() * (mean - rewards.mean()) ** 2 for mask, mean, _ in members(rewards, strata)) / len(
        rewards
    )
    assert removed == pytest.approx(between, abs=EXACT)
    assert (between < EXACT) == np.allclose(means, rewards.mean(), rtol=0, atol=1e-6)
    share = compute(rewards, np.zeros(len(rewards), int), strata).report.between_strata_share
    assert share == pytest.approx(between / total if total > EXACT else 0.0, abs=EXACT)


@modest
@given(GROUP, st.lists(st.tuples(st.integers(1, 64), st.integers(-64, 64)), min_size=4, max_size=4))
def test_t3_san_ignores_scale_and_offset_of_rewards_even_of_each_stratum_apart(rollouts, changes):
    rewards, strata = arrays(rollouts)
    before = one_group(rewards, strata)
    scale, offset = arrays(changes)
    np.testing.assert_allclose(one_group(scale[0] * rewards + offset[0], strata), before, rtol=0, atol=EXACT)
    np.testing.assert_allclose(one_group(scale[strata] * rewards + offset[strata], strata), before, rtol=0, atol=EXACT)


@modest
@given(GROUP, st.sampled_from([0, 1]))
def test_t4_san_has_mean_zero_and_unit_variance_in_each_stratum_with_variance(rollouts, ddof):
    rewards, strata = arrays(rollouts)
    san = one_group(rewards, strata, ddof=ddof)
    for mask, _, std in members(rewards, strata):
        n = mask.sum()
        assert san[mask].mean() == pytest.approx(0, abs=EXACT)
        assert san[mask].var() == pytest.approx((n - ddof) / n if std > 0 else 0, abs=EXACT)


@modest
@given(GROUP)
def test_t5_san_has_mean_zero_over_the_group_and_as_variance_the_share_of_strata_with_variance(rollouts):
    rewards, strata = arrays(rollouts)
    san = one_group(rewards, strata)
    share = sum(mask.sum() for mask, _, std in members(rewards, strata) if std > 0) / len(rewards)
    assert san.mean() == pytest.approx(0, abs=EXACT)
    assert san.var() == pytest.approx(share, abs=EXACT)
    report = compute(rewards, np.zeros(len(rewards), int), strata).report
    assert report.degenerate_share == pytest.approx(1 - share, abs=EXACT)


@modest
@given(GROUP.filter(lambda rollouts: len({reward for reward, _ in rollouts}) > 1))
def test_t6_gn_has_the_bias_as_mean_and_a_variance_other_than_one_in_each_stratum(rollouts):
    rewards, strata = arrays(rollouts)
    advantages, std = gn(rewards), rewards.std()
    for mask, mean, stratum_std in members(rewards, strata):
        assert advantages[mask].mean() == pytest.approx((mean - rewards.mean()) / std, abs=EXACT)
        assert advantages[mask].var() == pytest.approx((stratum_std / std) ** 2, abs=EXACT)


@modest
@given(GROUP.filter(lambda rollouts: len({reward for reward, _ in rollouts}) > 1))
def test_t7_gn_is_san_scaled_by_the_ratio_of_deviations_plus_the_bias(rollouts):
    rewards, strata = arrays(rollouts)
    san, std = one_group(rewards, strata), rewards.std()
    for mask, mean, stratum_std in members(rewards, strata):
        rebuilt = stratum_std / std * san[mask] + (mean - rewards.mean()) / std
        np.testing.assert_allclose(gn(rewards)[mask], rebuilt, rtol=0, atol=EXACT)


def test_t7_gn_is_not_san_plus_the_difference_of_means():
    rewards, strata = np.array([0.0, 1.0, 2.0, 6.0]), np.array([0, 0, 1, 1])
    sum_of_parts = one_group(rewards, strata) + stratum_means(rewards, strata) - rewards.mean()
    assert np.abs(gn(rewards) - sum_of_parts).max() > 0.5


@modest
@given(GROUP.filter(lambda rollouts: len({reward for reward, _ in rollouts}) > 1), ALPHA)
def test_t8_mean_and_variance_of_the_blend(rollouts, alpha):
    rewards, strata = arrays(rollouts)
    blend, std = one_group(rewards, strata, alpha=alpha), rewards.std()
    share = rho = 0.0
    for mask, mean, stratum_std in members(rewards, strata):
        assert blend[mask].mean() == pytest.approx((1 - alpha) * (mean - rewards.mean()) / std, abs=EXACT)
        share += (stratum_std > 0) * mask.sum() / len(rewards)
        rho += mask.sum() * stratum_std / (len(rewards) * std)
    expected = alpha**2 * share + (1 - alpha) ** 2 + 2 * alpha * (1 - alpha) * rho
    assert blend.var() == pytest.approx(expected, abs=EXACT)


@modest
@given(BATCH, ALPHA, st.sampled_from([0.0, 1e-6]))
def test_t9_with_one_stratum_san_is_gn(rollouts, alpha, eps):
    rewards, groups, _ = arrays(rollouts)
    same = np.zeros(len(rewards), int)
    expected = compute(rewards, groups, same, "grpo", eps=eps).values
    np.testing.assert_array_equal(compute(rewards, groups, same, alpha=1.0, eps=eps).values, expected)
    blend = compute(rewards, groups, same, alpha=alpha, eps=eps).values
    np.testing.assert_allclose(blend, expected, rtol=0, atol=EXACT)


@modest
@given(BATCH, st.sampled_from(["zero", "global", "merge"]), st.sampled_from([0, 1]), st.sampled_from([0.0, 1e-6]))
def test_t9_alpha_zero_is_grpo_bit_for_bit(rollouts, degenerate, ddof, eps):
    rewards, groups, strata = arrays(rollouts)
    blend = compute(rewards, groups, strata, alpha=0.0, degenerate=degenerate, ddof=ddof, eps=eps)
    assert blend.values.tobytes() == compute(rewards, groups, strata, "grpo", ddof=ddof, eps=eps).values.tobytes()


@modest
@given(BATCH)
def test_t9_when_every_stratum_holds_one_rollout_san_is_zero(rollouts):
    rewards, groups, _ = arrays(rollouts)
    distinct = np.arange(len(rewards))
    assert not compute(rewards, groups, distinct, alpha=1.0).values.any()
    half = compute(rewards, groups, distinct, alpha=0.5).values
    np.testing.assert_array_equal(half, 0.5 * compute(rewards, groups, distinct, "grpo").values)


@modest
@given(BATCH, ALPHA, st.sampled_from(["zero", "global", "merge"]), st.randoms(use_true_random=False))
def test_t9_permuting_rollouts_permutes_advantages(rollouts, alpha, degenerate, random):
    rewards, groups, strata = arrays(rollouts)
    order = np.array(random.sample(range(len(rewards)), len(rewards)))
    before = compute(rewards, groups, strata, alpha=alpha, degenerate=degenerate).values
    after = compute(rewards[order], groups[order], strata[order], alpha=alpha, degenerate=degenerate).values
    np.testing.assert_allclose(after, before[order], rtol=0, atol=EXACT)


@modest
@given(BATCH, ALPHA, st.sampled_from(["zero", "global"]))
def test_t9_names_of_groups_and_strata_do_not_matter(rollouts, alpha, degenerate):
    rewards, groups, strata = arrays(rollouts)
    names = [("late", 2), "none", frozenset(), 3.5]
    questions = ["nq/7", ("hotpot", 7), 12, b"x"]
    renamed = compute(
        rewards, [questions[g] for g in groups], [names[s] for s in strata], alpha=alpha, degenerate=degenerate
    )
    expected = compute(rewards, groups, strata, alpha=alpha, degenerate=degenerate)
    np.testing.assert_allclose(renamed.values, expected.values, rtol=0, atol=EXACT)


@pytest.mark.parametrize("success", [0.2, 0.5, 0.9])
def test_t10_large_strata_standardise_by_the_moments_of_their_rewards(success):
    """For a stratum's rewards that are 1 with probability p and else 0, E[(A_S - Z)^2] <= 2 (1 + kappa) / n_k, where
    Z = (R - p) / sqrt(p (1 - p)) and kappa is the fourth moment of Z; so A_S has mean 0 and variance 1 in the limit.

    The expansion of A_S around Z gives 1 + (kappa - 1) / 4 times 1 / n_k in the first order; the bound leaves a factor
    above two for chance and higher orders.
    """
    rng = np.random.default_rng(0)
    spread = np.sqrt(success * (1 - success))
    kappa = (1 - 3 * success + 3 * success**2) / spread**2
    rollouts = 2**17
    for size in (128, 512, 2048):
        groups = np.arange(rollouts) // (2 * size)
        # A second stratum stands beside the one that is looked at.
        strata = rng.permuted(np.tile(np.repeat([0, 1], size), (rollouts // (2 * size), 1)), axis=1).ravel()
        rewards = np.where(strata == 0, rng.random(rollouts) < success, rng.normal(3, 2, rollouts)).astype(float)
        san = compute(rewards, groups, strata, alpha=1.0, eps=0.0).values[strata == 0]
        standard = (rewards[strata == 0] - success) / spread
        assert np.mean((san - standard) ** 2) < 2 * (1 + kappa) / size
        assert san.mean() == pytest.approx(0, abs=EXACT)
        assert san.var() == pytest.approx(1, abs=EXACT)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def test_t11_the_stratum_mean_is_no_valid_baseline():
    structure = softmax(np.array([0.3, -0.2, 0.5]))
    reward_means = np.array([0.1, 0.4, 0.9])
    # grad_log[k] is the gradient of log P(k) by the three logits.
    grad_log = np.eye(3) - structure
    removed = (structure * reward_means) @ grad_log
    jacobian = np.diag(structure) - np.outer(structure, structure)
    np.testing.assert_allclose(removed, reward_means @ jacobian, rtol=0, atol=EXACT)
    assert np.abs(removed).max() > 0.05
    np.testing.assert_allclose(structure @ grad_log, 0, atol=EXACT)


@modest
@given(GROUP)
def test_t11_pure_san_has_no_gradient_for_the_choice_between_strata(rollouts):
    rewards, strata = arrays(rollouts)
    grad_log = np.eye(4) - softmax(np.array([0.3, -0.2, 0.5, 0.0]))
    np.testing.assert_allclose(one_group(rewards, strata) @ grad_log[strata], 0, atol=EXACT)


def test_t11_rewards_constant_within_strata():
    rewards, strata = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 1])
    np.testing.assert_array_equal(one_group(rewards, strata), np.zeros(4))
    np.testing.assert_array_equal(gn(rewards), [-1, -1, 1, 1])
    np.testing.assert_allclose(one_group(rewards, strata, alpha=0.8), [-0.2, -0.2, 0.2, 0.2], rtol=0, atol=EXACT)


@modest
@given(st.lists(st.tuples(REWARD, st.integers(0, 3)), min_size=2, max_size=6))
def test_t12_random_strata_leave_the_direction_of_dr_grpo_on_average(rollouts):
    rewards, strata = arrays(rollouts)
    orders = [list(order) for order in itertools.permutations(strata)]
    left = np.mean([rewards - stratum_means(rewards, np.array(order)) for order in orders], axis=0)
    size, parts = len(rewards), len(set(strata.tolist()))
    np.testing.assert_allclose(left, (size - parts) / (size - 1) * (rewards - rewards.mean()), rtol=0, atol=EXACT)
