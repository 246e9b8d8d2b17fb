"""The study's tables, gradients and moments agree with `compute`, with derivatives and with sampling."""

import io
import json
from dataclasses import replace

import estimators as study
import numpy as np
import pytest
from rich.console import Console
from study_rules import (
    BETA,
    ESTIMATOR_RULES,
    RECOMMENDED,
    SAN,
    Rule,
    advantages,
    code,
    compositions,
    of_rollouts,
    ranks,
)
from study_scenarios import SCENARIOS, column, exact_gradient, expected_reward, policy, random_scenarios
from study_training import (
    PROMPTS,
    RATE,
    Tables,
    Weights,
    exact_moments,
    gradient,
    sample,
    train,
)

from agentrl.advantages import compute
from agentrl.advantages.schedule import ProgressRule, Schedule, StratumRewards

NOISY = SCENARIOS[3]
BY_NAME = {rule.name: rule for rule in ESTIMATOR_RULES}
THETA, PHI = np.array([[0.4], [-0.2], [-0.9]]), np.array([[0.3], [-1.0], [-0.5]])


def names(rules):
    return [rule.name for rule in rules]


def derivative(function, at, width=1e-6):
    """Central differences of a function of [6], in each of its arguments."""
    return np.array([(function(at + step) - function(at - step)) / (2 * width) for step in width * np.eye(6)])


@pytest.mark.parametrize("scenario", SCENARIOS, ids=names(SCENARIOS))
def test_the_exact_gradient_is_the_derivative_of_the_expected_reward(scenario):
    def reward(logits):
        return expected_reward(scenario, logits[:3, None], logits[3:, None])[0]

    numeric = derivative(reward, np.concatenate([THETA, PHI])[:, 0])
    assert np.concatenate(exact_gradient(scenario, THETA, PHI))[:, 0] == pytest.approx(numeric, abs=1e-8)


def test_the_best_is_what_no_policy_beats():
    for scenario in SCENARIOS:
        theta, phi = np.random.default_rng(0).normal(0, 4, (2, 3, 1000))
        assert expected_reward(scenario, theta, phi).max() <= scenario.best[0]
        sure = np.eye(3)[:, scenario.best_structure] * 50
        assert expected_reward(scenario, sure, np.full((3, 1), 50.0)) == pytest.approx(scenario.best)


@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize("rule", [r for r in ESTIMATOR_RULES if r.scope == "prompt"], ids=lambda rule: rule.name)
def test_tables_hold_what_compute_gives_the_rollouts_themselves(rule, k):
    category = np.random.default_rng(1).integers(0, 6, 200 * k)
    group = np.repeat(np.arange(200), k)
    counts = np.stack([np.bincount(row, minlength=6) for row in category.reshape(200, k)], axis=1)
    place = ranks(k)[code(counts, k)]
    assert (compositions(k)[place] == counts.T).all()
    last, early = advantages(rule, NOISY.levels, k)
    expected = of_rollouts(rule.estimator, rule.practice, NOISY.levels.ravel(), category, group)
    searches = category // 2
    for turn in range(expected.shape[1]):
        found = last[category, place[group]]
        if turn < 2:
            found = found + early[turn, category, place[group]]
        has_turn = searches >= turn
        np.testing.assert_allclose(found[has_turn], expected[has_turn, turn], atol=1e-12)


def test_pooled_counts_give_what_compute_gives_over_the_batch():
    study.check_pooled(NOISY.levels)


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_the_recommended_rule_is_the_stratified_estimator_with_balance(w):
    direct = Rule("direct", {"alpha": w, "balance": BETA})
    shape = 3, 2, 50
    p, q = (np.broadcast_to(x[:, None], shape) for x in policy(THETA, PHI))
    drawn = sample(NOISY, p, q, 8, np.random.default_rng(0))
    weights = np.array([[w], [1.0]]) * np.ones(shape[1:])
    for part in Tables((RECOMMENDED, direct), NOISY.levels, 8).gradient(weights, p, q, *drawn):
        np.testing.assert_allclose(part[:, 0], part[:, 1], atol=1e-6)


def log_policy(logits, searches, turn):
    """log P(the decision of a rollout at a turn), where deciding at the last turn includes its skill or not."""
    p, _ = policy(logits[:3], logits[3:])
    rest = p[turn:].sum()
    return np.log((p[turn] if turn == searches else p[turn + 1 :].sum()) / rest)


@pytest.mark.parametrize("rule", ESTIMATOR_RULES, ids=lambda rule: rule.name)
def test_a_step_is_the_sum_over_rollouts_and_turns_of_advantage_times_score(rule):
    logits = np.concatenate([THETA, PHI])[:, 0]
    p, q = (x[:, None] for x in policy(THETA, PHI))
    counts, skilled = sample(NOISY, p, q, 8, np.random.default_rng(3))
    of_theta, of_phi = Tables([rule], NOISY.levels, 8).gradient(np.ones((1, 1)), p, q, counts, skilled)
    category, group, skill = [], [], []
    for (structure, level, prompt), n in np.ndenumerate(counts[..., 0, 0]):
        category += [2 * structure + level] * int(n)
        group += [prompt] * int(n)
        skill += [i < skilled[structure, level, prompt, 0, 0] for i in range(n)]
    values = of_rollouts(rule.estimator, rule.practice, NOISY.levels.ravel(), np.array(category), np.array(group))
    expected = np.zeros(6)
    for searches, value, took in zip(np.array(category) // 2, values, skill, strict=True):
        of_turn = np.broadcast_to(value, 3)
        for turn in range(searches + 1):
            expected += of_turn[turn] * derivative(lambda x, t=turn, s=searches: log_policy(x, s, t), logits)
        expected[3 + searches] += of_turn[searches] * (took - q[searches, 0, 0])
    assert np.concatenate([of_theta, of_phi]).ravel() == pytest.approx(expected / (8 * PROMPTS), abs=1e-6)


def test_sampling_follows_the_policy():
    p, q = (np.broadcast_to(x[:, None], (3, 1, 20_000)) for x in policy(THETA, PHI))
    counts, skilled = sample(NOISY, p, q, 8, np.random.default_rng(0))
    assert (counts.sum(axis=(0, 1)) == 8).all()
    assert (skilled <= counts).all()
    n = 8 * PROMPTS * 20_000
    good, bad = column(NOISY.good), column(NOISY.bad)
    high = p[:, 0, :1] * (q[:, 0, :1] * good + (1 - q[:, 0, :1]) * bad)
    found = counts[:, 1].sum(axis=(1, 2, 3), dtype=float)[:, None] / n
    assert (abs(found - high) < 5 * np.sqrt(high * (1 - high) / n)).all()
    both = p[:, 0, :1] * q[:, 0, :1] * good
    found = skilled[:, 1].sum(axis=(1, 2, 3), dtype=float)[:, None] / n
    assert (abs(found - both) < 5 * np.sqrt(both * (1 - both) / n)).all()


@pytest.mark.parametrize("k", [4, 8])
def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks(k):
    truth = np.concatenate(exact_gradient(NOISY, THETA, PHI))[:, 0]
    assert exact_moments(NOISY, BY_NAME["rloo"], k, THETA, PHI)[0] == pytest.approx(truth, abs=1e-12)
    assert exact_moments(NOISY, BY_NAME["dr_grpo"], k, THETA, PHI)[0] == pytest.approx(truth * (k - 1) / k, abs=1e-12)


def test_pure_san_gives_the_structures_no_gradient():
    mean, _ = exact_moments(NOISY, BY_NAME["stratified 1.0"], 8, THETA, PHI)
    assert mean[:3] == pytest.approx(np.zeros(3), abs=1e-12)
    assert np.linalg.norm(exact_gradient(NOISY, THETA, PHI)[0]) > 0.05


@pytest.mark.parametrize("name", ["grpo", "stratified 0.8", "opo", "gigpo"])
def test_exact_moments_agree_with_sampling(name):
    n = 40_000
    drawn = study.single_steps(NOISY, [BY_NAME[name]], 8, THETA, PHI, n, seed=0)[0]
    mean, variance = exact_moments(NOISY, BY_NAME[name], 8, THETA, PHI)
    error = drawn.std(axis=0) / n**0.5
    assert (abs(drawn.mean(axis=0) - mean) < 5 * error + 1e-7).all()
    squares = ((drawn - mean) ** 2).sum(axis=1)
    assert abs(squares.mean() - variance / PROMPTS) < 5 * squares.std() / n**0.5


def test_structures_sampled_off_policy_are_weighted_back():
    p, q = policy(THETA, PHI)
    sampled = np.array([[0.2], [0.3], [0.5]])
    good, bad = column(NOISY.good), column(NOISY.bad)
    high = q * good + (1 - q) * bad
    # Expected counts [3, 2, 1, 1] of one rollout whose advantage is its reward.
    counts = (sampled * np.hstack([1 - high, high]))[:, :, None, None]
    of_theta, _ = gradient(p, q, counts, counts, NOISY.levels[:, :, None, None], p / sampled)
    assert of_theta == pytest.approx(exact_gradient(NOISY, THETA, PHI)[0])


def test_alpha_of_zero_trains_as_grpo_does():
    rules = [BY_NAME["grpo"], Rule("zero", {"alpha": 0.0}), Rule("chosen", SAN, fade=Schedule(0, 0))]
    outcome = train(NOISY, rules, 8, seeds=4, steps=50)
    np.testing.assert_array_equal(outcome.theta[:, 0], outcome.theta[:, 1])
    np.testing.assert_array_equal(outcome.theta[:, 0], outcome.theta[:, 2])
    np.testing.assert_array_equal(outcome.phi[:, 0], outcome.phi[:, 2])


def test_a_step_never_exceeds_its_clip_and_a_floor_of_one_samples_evenly():
    rules = [Rule("clipped", {"alpha": 0.0}, clip=0.05), Rule("free", {"alpha": 0.0})]
    outcome = train(SCENARIOS[0], rules, 8, seeds=20, steps=1)
    moved = np.sqrt((outcome.theta**2 + outcome.phi**2).sum(axis=0)) / RATE
    assert moved[0] == pytest.approx(np.minimum(moved[1], 0.05))
    assert (moved[1] > 0.05).sum() > 10
    rare = replace(SCENARIOS[0], theta=(9.0, 0.0, 0.0))
    outcome = train(rare, [Rule("even", SAN, floor=1.0), Rule("own", SAN)], 8, seeds=20, steps=20)
    learned = abs(outcome.phi[1:]).max(axis=(0, 2))
    assert learned[0] > 0.05
    assert learned[1] < 0.02


def test_seeds_reproduce():
    first, again, other = (train(NOISY, [RECOMMENDED], 4, 3, steps=20, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.final, again.final)
    assert (first.final != other.final).all()


def test_the_progress_rule_moves_as_the_library_s_does():
    settings = ProgressRule(window=5, least=10, patience=1, stride=0.25)
    rng, seeds, levels = np.random.default_rng(0), 4, NOISY.levels
    weights = Weights([Rule("moving", SAN, fade=settings)], seeds)
    alone, seen = [replace(settings) for _ in range(seeds)], set()
    for step in range(60):
        counts = rng.integers(0, 4 + step % 20, (3, 2, 2, 1, seeds)).astype(np.uint8)
        weights.observe(counts, levels)
        for s, rule in enumerate(alone):
            strata = {}
            for name, (n, rewards) in enumerate(zip(counts[..., 0, s].sum(axis=2), levels, strict=True)):
                if n.sum():
                    earned = np.repeat(rewards, n.astype(int))
                    strata[str(name)] = StratumRewards(len(earned), earned.mean(), earned.var())
            rule.observe(strata)
        expected = [rule.value(0.0) for rule in alone]
        assert weights.at(0.0)[0] == pytest.approx(expected)
        seen.update(expected)
    assert len(seen) > 3


def test_balanced_practice_solves_what_grpo_and_the_blend_do_not():
    rules = [BY_NAME["grpo"], BY_NAME["stratified 0.8"], RECOMMENDED]
    outcome = train(SCENARIOS[-1], rules, 8, seeds=5)
    shares = outcome.final / SCENARIOS[-1].best
    assert shares[:2].max() < 0.7
    assert shares[2].min() > 0.98


def test_random_scenarios_repeat_side_by_side_and_by_seed():
    scenario = random_scenarios(3, 2, seed=1)
    good = column(scenario.good)
    assert good.shape == (3, 6)
    np.testing.assert_array_equal(good[:, 0], good[:, 1])
    assert (good[:, 0] != good[:, 2]).all()
    assert scenario == random_scenarios(3, 2, seed=1)
    assert scenario.best == pytest.approx(good.max(axis=0))


def test_verdicts_count_solved_scenarios_by_the_interval_s_lower_end():
    shares = {
        ("a", "one"): [0.99, 0.98, 1.0],
        ("a", "two"): [0.98, 0.96, 1.0],
        ("b", "one"): [0.5, 0.5, 0.5],
        ("b", "two"): [0.9, 0.9, 0.9],
    }
    records = [{"scenario": s, "rule": r, "k": 8, "share": share} for (s, r), share in shares.items()]
    one, two = study.verdicts(records, 8)
    assert (one["near"], one["solved"], one["worst"]) == (1, 1, pytest.approx(0.98 / 0.99))
    assert (two["near"], two["solved"], two["worst"]) == (0, 1, pytest.approx(0.96 / 0.99))


@pytest.mark.slow
def test_the_whole_study_runs_and_writes_tables_json_and_a_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SINGLE_STEPS", 100)
    found = study.run(2, (4, 8), scenarios=2, repeats=1, steps=20, seed=0, workers=1)
    console = Console(width=200, record=True, file=io.StringIO())
    study.show(found, console)
    text = console.export_text()
    assert "step + balance" in text
    assert "slow and rare" in text
    assert json.loads(json.dumps(found))["settings"]["seeds"] == 2
    assert {record["k"] for record in found["gradients"]} == {4, 8}
    pytest.importorskip("matplotlib")
    study.draw(found, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")


def test_strata_are_compared_within_prompts_only():
    # The tables rest on it: a composition's advantages do not depend on the other groups of the call.
    alone = compute([1.0, 0.0, 1.0], [0, 0, 0], [1, 1, 2], **SAN).values
    together = compute([1.0, 0.0, 1.0, 0.0, 0.0, 1.0], [0, 0, 0, 1, 1, 1], [1, 1, 2, 1, 1, 2], **SAN).values
    np.testing.assert_array_equal(alone, together[:3])
