"""Each kind of collapse is seen in the metrics of a run, once and with its numbers, and a healthy run gives no alarm."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.config import WatchConfig
from agentrl.training.watch import RollBack, Watch, forecast, no_signal_share

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STEPS = 30


def healthy(step, rng):
    """The metrics of a step of a run that learns, with the noise of a batch."""
    done, noise = step / STEPS, lambda size: float(rng.normal(0, size))
    several = min(max(0.3 * (1 - done) + noise(0.02), 0.0), 1.0)
    return {
        "reward/mean": 0.3 + 0.4 * done + noise(0.05),
        "correct/share": 0.3 + 0.4 * done + noise(0.05),
        "ends/answered": 0.97 + noise(0.01),
        "searches/mean": 1.1 + 0.6 * done + noise(0.1),
        "strata/0/share": several,
        "strata/1/share": 0.6 * (1 - several),
        "strata/2/share": 0.4 * (1 - several),
        "entropy": 0.27 - 0.17 * done + noise(0.02),
        "kl": 0.02 + 0.05 * done + noise(0.002),
        "advantages/no_signal_share": 0.3 + 0.4 * done + noise(0.1),
        "logprobs/correct_mean": -0.11 + 0.03 * done + noise(0.01),
        "repetition": 0.03 + 0.1 * done + noise(0.01),
    }


def watched(lines, **settings):
    """Return the steps and the sentences of all alarms."""
    watch = Watch(WatchConfig(**settings))
    return [(step, reason) for step, line in enumerate(lines, 1) for reason in watch.see(line)]


def run(broken=lambda progress: {}, seed=0):
    """A healthy run of which `broken` replaces metrics from the middle on; it gets a number that rises from 0 to 1."""
    rng = np.random.default_rng(seed)
    lines = [healthy(step, rng) for step in range(1, STEPS + 1)]
    middle = STEPS // 2
    return [line | (broken((i - middle) / middle) if i >= middle else {}) for i, line in enumerate(lines)]


COLLAPSES = {
    "the mean reward fell from": lambda progress: {"reward/mean": 0.5 * (1 - progress) ** 3},
    "the share of episodes that end with an answer fell from": lambda progress: {"ends/answered": 1 - progress},
    "the policy stopped searching": lambda progress: {"searches/mean": max(0.0, 1 - 2 * progress)},
    "are in one stratum (0)": lambda progress: {
        "strata/0/share": 1.0,
        "strata/1/share": 0.0,
        "strata/2/share": 0.0,
    },
    "entropy fell from": lambda progress: {"entropy": 0.001},
    "entropy grew from": lambda progress: {"entropy": 0.2 + 6 * progress},
    "training.watch.max_kl is 1": lambda progress: {"kl": 5 * progress},
    "of the groups had no learning signal": lambda progress: {"advantages/no_signal_share": 1.0},
    "the log-probability of correct episodes fell from": lambda progress: {
        "logprobs/correct_mean": -0.1 - 3 * progress
    },
    "repeats what it wrote before": lambda progress: {"repetition": 0.1 + 0.9 * progress},
}


@pytest.mark.parametrize("reason", COLLAPSES)
def test_each_collapse_is_told_once_in_a_sentence_with_its_numbers(reason):
    alarms = watched(run(COLLAPSES[reason]))
    assert len(alarms) == 1
    step, said = alarms[0]
    assert reason in said
    assert "over the last 5 steps" in said
    assert any(letter.isdigit() for letter in said.replace("5 steps", ""))
    # Of 15 steps that are collapsed more and more, not only the last ones show it.
    assert STEPS // 2 < step <= STEPS - 2


@given(st.integers(0, 2**32 - 1))
def test_a_run_that_learns_gives_no_alarm(seed):
    assert watched(run(seed=seed)) == []


def test_the_measured_runs_that_learned_give_no_alarm():
    checked = 0
    for name in ("learning_pocket", "learning_settings"):
        for measured in json.loads((RESULTS / f"{name}.json").read_text())["runs"]:
            lines = [
                {
                    "reward/mean": step["reward"],
                    "searches/mean": step["searches"],
                    **{f"strata/{key}/share": share for key, share in step["strata"].items()},
                }
                for step in measured["steps"]
            ]
            assert watched(lines) == []
            checked += len(lines)
    assert checked > 400


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.3, 0.5]), st.sampled_from([8, 32, 128]))
def test_the_reward_of_a_policy_that_stays_the_same_is_no_collapse_however_small_its_batches(seed, accuracy, episodes):
    rng = np.random.default_rng(seed)
    questions = rng.beta(accuracy, 1 - accuracy, (60, episodes // 4))
    rewards = rng.binomial(4, questions).mean(1) / 4
    assert watched([{"reward/mean": float(reward)} for reward in rewards]) == []


def test_a_policy_that_is_nearly_always_right_may_have_little_entropy_and_no_signal():
    right = {"correct/share": 0.97, "entropy": 0.001, "advantages/no_signal_share": 1.0}
    assert watched(run(lambda progress: right)) == []
    assert len(watched(run(lambda progress: right | {"correct/share": 0.6}))) == 2


def test_what_a_penalty_for_length_takes_off_the_reward_is_no_collapse():
    rng = np.random.default_rng(3)
    lines = run()
    taken = [0.2 + 0.9 * min(1.0, step / STEPS) + float(rng.normal(0, 0.01)) for step in range(STEPS)]
    punished = [
        line | {"reward/mean": line["reward/mean"] - off, "reward/penalty": off}
        for line, off in zip(lines, taken, strict=True)
    ]
    assert watched(lines) == []
    assert watched(punished) == []


def test_metrics_that_are_missing_or_null_are_not_judged():
    lines = [{name: None if i % 2 else value for name, value in line.items()} for i, line in enumerate(run())]
    assert watched(lines) == []
    assert watched([{} for _ in range(STEPS)]) == []


def test_what_was_seen_before_a_resume_is_not_told_again_and_what_recovers_is_told_when_it_comes_back():
    lines = run(COLLAPSES["training.watch.max_kl is 1"])
    watch = Watch(WatchConfig(), lines)
    assert watch.see(lines[-1]) == []
    for _ in range(WatchConfig().window):
        assert watch.see(lines[-1] | {"kl": 0.02}) == []
    assert len([reason for _ in range(5) for reason in watch.see(lines[-1] | {"kl": 9.0})]) == 1


def test_thresholds_are_those_of_the_settings():
    lines = run(COLLAPSES["repeats what it wrote before"])
    assert watched(lines, max_repetition=1.0) == []
    assert watched(lines, max_kl=0.01) != []
    assert watched(lines, window=STEPS) == []


def test_a_roll_back_survives_the_way_to_another_process():
    back = pickle.loads(pickle.dumps(RollBack("the mean reward fell", 12, 5)))
    assert (back.reason, back.step, back.target) == ("the mean reward fell", 12, 5)
    assert "step 12: the mean reward fell; the run goes back to step 5" in str(back)


@given(st.floats(0, 1), st.integers(2, 64))
def test_the_share_without_signal_is_one_for_certain_answers_and_least_for_even_ones(accuracy, size):
    share = no_signal_share(accuracy, size)
    assert 2 * 0.5**size - 1e-12 <= share <= 1 + 1e-12
    assert share == pytest.approx(no_signal_share(1 - accuracy, size))
    assert no_signal_share(0.0, size) == no_signal_share(1.0, size) == 1.0


def test_the_share_without_signal_is_what_is_drawn():
    drawn = np.random.default_rng(0).random((20_000, 8)) < 0.1
    assert no_signal_share(0.1, 8) == pytest.approx(float((drawn.all(1) | ~drawn.any(1)).mean()), abs=0.02)


def test_a_forecast_advises_only_where_most_groups_would_teach_nothing():
    fine, hard, easy = (forecast(p, 8, "the exact match before training,") for p in (0.47, 0.03, 0.97))
    assert fine.startswith(
        "forecast: at the exact match before training, 0.470, about 1% of the groups of 8 will have no"
    )
    assert "selection" not in fine
    assert "about 78%" in hard
    assert "raise rollout.group_size (61% with 16), set advantages.selection.enabled=true, or begin with easier" in hard
    assert "take harder questions" in easy
    assert "group_size" not in forecast(0.0, 8, "the share of right answers in the first step,")
