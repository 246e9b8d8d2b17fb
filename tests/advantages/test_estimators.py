"""Every estimator against a plain float64 reference, and the laws that hold for all of them.

Rewards are quarters of small integers times 1e-12, 1 or 1e12; groups have ties, failures, strata of one and of all.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.advantages import ESTIMATORS, AdvantageError, compute

pytestmark = pytest.mark.filterwarnings("error")

TURN = st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 1))
ROLLOUT = st.fixed_dictionaries(
    {
        "reward": st.integers(-8, 8).map(lambda quarter: quarter / 4) | st.none(),
        "group": st.integers(0, 3),
        "stratum": st.integers(0, 3),
        "length": st.integers(1, 50),
        "turns": st.lists(TURN, min_size=1, max_size=4),
    }
)
BATCH = st.lists(ROLLOUT, min_size=1, max_size=30)
SCALE = st.sampled_from([1e-12, 1.0, 1e12])
STRATA = st.sampled_from(["as drawn", "one", "distinct"])
NAMES = st.sampled_from(sorted(ESTIMATORS))
OPTIONS = {
    "stratified": {"alpha": 0.7, "eps": 0.0},
    "grpo": {"eps": 0.0},
    "reinforce_pp": {"eps": 0.0},
    "gigpo": {"eps": 0.0, "weight": 0.5, "gamma": 0.9},
    "mt_grpo": {"eps": 0.0, "weight": 0.5},
}


def table(rollouts, strata="as drawn", scale=1.0):
    rows = []
    for number, rollout in enumerate(rollouts):
        key = {"as drawn": rollout["stratum"], "one": 0, "distinct": number}[strata]
        reward = np.nan if rollout["reward"] is None else rollout["reward"] * scale
        rows.append({**rollout, "stratum": key, "reward": reward})
    return rows


def run(rows, name):
    return compute(
        np.array([row["reward"] for row in rows]),
        [row["group"] for row in rows],
        [row["stratum"] for row in rows],
        name,
        lengths=[row["length"] for row in rows],
        turn_rewards=[[reward for reward, _ in row["turns"]] for row in rows],
        anchors=[[anchor for _, anchor in row["turns"]] for row in rows],
        **OPTIONS.get(name, {}),
    )


def varies(values):
    return len(values) > 1 and np.ptp(values) > 1e-9 * np.abs(values).max()


def score(value, peers):
    return (value - np.mean(peers)) / np.std(peers) if varies(peers) else 0.0


def reference(rows, name):
    """The definitions, one rollout after another."""
    valid = [row for row in rows if not np.isnan(row["reward"])]
    width = max((len(row["turns"]) for row in valid), default=0)
    out = np.zeros((len(rows), width)) if name in ("gigpo", "mt_grpo") else np.zeros(len(rows))
    for i, row in enumerate(rows):
        if np.isnan(row["reward"]):
            continue
        group = [other for other in valid if other["group"] == row["group"]]
        own = [other["reward"] for other in group if other["stratum"] == row["stratum"]]
        rewards, lengths = [other["reward"] for other in group], [other["length"] for other in group]
        k, everyone = len(group), [other["reward"] for other in valid]
        gn = score(row["reward"], rewards)
        if name in ("gigpo", "mt_grpo"):
            out[i, : len(row["turns"])] = list(turn_reference(row, group, gn, name))
        elif name == "reinforce_pp":
            out[i] = score(row["reward"], everyone)
        elif name in ("grpo", "stratified"):
            out[i] = gn if name == "grpo" else 0.7 * score(row["reward"], own) + 0.3 * gn
        elif varies(rewards):
            rest = (np.sum(rewards) - row["reward"]) / (k - 1)
            baseline = {"dr_grpo": np.mean(rewards), "rloo": rest, "opo": np.average(rewards, weights=lengths)}
            # Without a past.
            baseline["value_baseline"] = rest
            out[i] = row["reward"] - baseline[name]
    return out


def turn_reference(row, group, gn, name):
    def returns(other):
        earned = [reward for reward, _ in other["turns"]]
        earned[-1] += other["reward"]
        return [sum(0.9 ** (s - t) * earned[s] for s in range(t, len(earned))) for t in range(len(earned))]

    last = len(row["turns"]) - 1
    for t, (reward, anchor) in enumerate(row["turns"]):
        if name == "gigpo":
            peers = [
                v for other in group for v, (_, at) in zip(returns(other), other["turns"], strict=True) if at == anchor
            ]
            yield gn + 0.5 * score(returns(row)[t], peers)
        else:
            peers = [other["turns"][t][0] for other in group if t < len(other["turns"]) - 1]
            yield gn if t == last else score(reward, peers) + 0.5 * gn


@settings(max_examples=200)
@given(BATCH, NAMES, SCALE, STRATA)
def test_every_estimator_agrees_with_a_plain_reference(rollouts, name, scale, strata):
    # Turn rewards are of size 1 and stay so; a reward of 1e-12 beside them is below what float64 keeps of their sum.
    rows = table(rollouts, strata, 1.0 if name == "gigpo" else scale)
    values, expected = run(rows, name).values, np.array(reference(rows, name))
    unit = scale if name in ("dr_grpo", "rloo", "opo", "value_baseline") else 1.0
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values / unit, expected / unit, rtol=0, atol=1e-9)


@given(BATCH, NAMES, SCALE, st.randoms(use_true_random=False))
def test_permuting_rollouts_permutes_advantages(rollouts, name, scale, random):
    rows = table(rollouts, scale=scale)
    order = random.sample(range(len(rows)), len(rows))
    before, after = run(rows, name).values, run([rows[i] for i in order], name).values
    np.testing.assert_allclose(after, before[order], rtol=1e-9, atol=1e-10 * max(scale, 1.0))


@given(BATCH, NAMES, SCALE, st.lists(ROLLOUT, max_size=5))
def test_excluded_rollouts_change_nothing_for_the_others(rollouts, name, scale, failed):
    """Padding invariance: what is marked as failed may stand anywhere and be anything."""
    rows = table(rollouts, scale=scale)
    padding = [{**row, "reward": np.nan} for row in table(failed)]
    alone, beside = run(rows, name), run([*padding, *rows], name)
    np.testing.assert_array_equal(beside.values[len(padding) :], alone.values)
    assert not beside.values[: len(padding)].any()
    assert beside.report.metrics() == {**alone.report.metrics(), "excluded": alone.report.excluded + len(padding)}


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-12, 1e12])
def test_a_group_of_equal_rewards_has_no_advantage(name, value):
    rows = [{"reward": value, "group": 0, "stratum": i % 3, "length": 1 + i, "turns": [(0.0, 0)]} for i in range(101)]
    assert not np.any(run(rows, name).values)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_rollout_alone_in_its_group_has_no_advantage_against_it(name):
    rows = [
        {"reward": reward, "group": group, "stratum": 0, "length": 3, "turns": [(0.0, 0)]}
        for reward, group in ((7.0, 0), (1.0, 1), (0.0, 1))
    ]
    # Whitening compares with the whole batch, which is larger than the group.
    assert np.any(run(rows, name).values[0]) == (name == "reinforce_pp")


def test_the_group_baseline_of_reinforce_pp_is_taken_before_whitening():
    rewards, groups = np.array([0.0, 1.0, 10.0, 12.0]), [0, 0, 1, 1]
    values = compute(rewards, groups, [0] * 4, "reinforce_pp", baseline="group", eps=0.0).values
    centred = np.array([-0.5, 0.5, -1.0, 1.0])
    np.testing.assert_allclose(values, centred / centred.std(), atol=1e-12)


def test_opo_with_equal_lengths_is_dr_grpo():
    rewards, groups = np.array([0.0, 1.0, 3.0, 12.0]), [0, 0, 1, 1]
    lengths = np.full(4, 17)
    opo = compute(rewards, groups, [0] * 4, "opo", lengths=lengths).values
    np.testing.assert_allclose(opo, compute(rewards, groups, [0] * 4, "dr_grpo").values, atol=1e-12)


def test_gigpo_separates_two_choices_from_one_observation():
    """Both rollouts begin at the same observation; the one that goes on to be right has the better first turn."""
    values = compute([1.0, 0.0], ["q"] * 2, [2, 1], "gigpo", anchors=[["", "a"], [""]], eps=0.0, gamma=0.5).values
    np.testing.assert_allclose(values, [[2.0, 1.0], [-2.0, 0.0]])


@pytest.mark.parametrize(
    ("estimator", "given", "options", "message"),
    [
        ("opo", {}, {}, "'opo' needs lengths="),
        ("gigpo", {}, {}, "'gigpo' needs anchors="),
        ("gigpo", {"turn_rewards": [[0], [0]]}, {}, "'gigpo' needs anchors="),
        ("mt_grpo", {"anchors": [[0], [0]]}, {}, "'mt_grpo' needs turn_rewards="),
        ("opo", {"lengths": [1]}, {}, r"one entry for each of 2 rollouts, got shape \(1,\)"),
        ("opo", {"lengths": [1, 0]}, {}, "lengths must be positive"),
        ("gigpo", {"anchors": [[0]]}, {}, "one sequence for each of 2 rollouts, got 1"),
        ("gigpo", {"anchors": [[0], []]}, {}, "rollout 1 has no turn"),
        ("gigpo", {"anchors": [[0], [0]], "turn_rewards": [[0], [0, 0]]}, {}, "the same number of turns"),
        ("mt_grpo", {"turn_rewards": [[0], [np.nan]]}, {}, "turn_rewards must be finite"),
        ("gigpo", {"anchors": [[{}], [0]]}, {}, "anchors must be hashable"),
        ("gigpo", {"anchors": [[0], [0]]}, {"gamma": 1.5}, "gamma must be from 0 to 1"),
        ("gigpo", {"anchors": [[0], [0]]}, {"weight": -1}, "weight must be"),
        ("mt_grpo", {"turn_rewards": [[0], [0]]}, {"weight": np.inf}, "weight must be"),
        ("reinforce_pp", {}, {"baseline": "mean"}, "baseline must be none or group"),
        ("stratified", {}, {"min_stratum_size": 1}, "min_stratum_size must be at least 2"),
        ("stratified", {}, {"balance": -0.1}, "balance must be"),
        ("stratified", {}, {"alpha": "atuo"}, "alpha must be auto, or from 0"),
        ("grpo", {"scope": "step"}, {}, "scope must be prompt or batch"),
        ("grpo", {"valid": [1, 0]}, {}, "valid must be 2 booleans"),
        ("grpo", {"valid": [True]}, {}, "valid must be 2 booleans"),
    ],
)
def test_errors_name_what_is_missing_or_wrong(estimator, given, options, message):
    with pytest.raises(AdvantageError, match=message):
        compute([1.0, 0.0], ["q"] * 2, [0, 0], estimator, **given, **options)
