"""The metrics of a step's episodes: shares add up, means follow from the strata, failures stand apart."""

import dataclasses

import pytest
from fakes import make_episode
from hypothesis import given
from hypothesis import strategies as st

from agentrl.config import RewardConfig
from agentrl.training.metrics import batch_metrics
from agentrl.types import End


def test_the_log_probability_of_correct_episodes_is_reported_apart():
    right, wrong = make_episode("a", answer="gold", reward=1.0), make_episode("b", reward=0.0)
    doubled = dataclasses.replace(wrong.turns[0], logprobs=tuple(2 * value for value in wrong.turns[0].logprobs))
    metrics = batch_metrics([right, dataclasses.replace(wrong, turns=(doubled,))], [0, 0], [0, 0])
    assert metrics["logprobs/correct_mean"] == -0.5
    assert metrics["logprobs/mean"] == -0.75
    assert metrics["correct/share"] == 0.5
    metrics = batch_metrics([wrong], [0], [0])
    assert "logprobs/correct_mean" not in metrics
    assert metrics["correct/share"] == 0.0


def test_each_reward_is_reported_by_its_name_and_what_penalties_took_off_together():
    settings = [
        RewardConfig(weight=0.5),
        RewardConfig(kind="length", weight=2.0, options={"limit": 30, "cache": 30}),
        RewardConfig(kind="mine:style"),
    ]
    parts = [
        {"exact_match": 1.0, "length": -0.1, "style/short": 0.5, "style/calm": -0.75},
        {"exact_match": 0.0, "length": -0.4, "style/short": 0.25},
    ]
    rewards = [0.5 - 0.2 - 0.25, -0.8 + 0.25]
    episodes = [make_episode(str(i)).with_reward(*earned) for i, earned in enumerate(zip(rewards, parts, strict=True))]
    failed = make_episode("2", end=End.ENVIRONMENT_FAILURE)
    metrics = batch_metrics([*episodes, failed], [0] * 3, [0] * 3, settings)
    named = {name: value for name, value in metrics.items() if name.startswith("rewards/")}
    expected = {"exact_match": 0.5, "length": -0.25, "style/short": 0.375, "style/calm": -0.75}
    assert named == pytest.approx({f"rewards/{name}": value for name, value in expected.items()})
    assert metrics["reward/mean"] == pytest.approx((0.05 - 0.55) / 2)
    assert metrics["reward/penalty"] == pytest.approx((0.2 + 0.25 + 0.8) / 2)


def test_the_share_of_overlong_episodes_is_reported():
    ends = [End.ANSWERED, End.TURN_LIMIT, End.TRUNCATED, End.TIMED_OUT, End.INVALID]
    episodes = [make_episode(str(i), reward=0.0, end=end) for i, end in enumerate(ends)]
    assert batch_metrics(episodes, [0] * 5, [0] * 5)["overlong/share"] == 3 / 5


def test_repetition_is_the_share_of_n_grams_that_came_before_in_the_episode():
    def writing(*turns):
        episode = make_episode("a", reward=0.0)
        return dataclasses.replace(
            episode,
            turns=tuple(
                dataclasses.replace(episode.turns[0], token_ids=ids, logprobs=(-0.5,) * len(ids)) for ids in turns
            ),
        )

    def repetition(*episodes):
        return batch_metrics(episodes, [0] * len(episodes), [0] * len(episodes))["repetition"]

    once, loop = tuple(range(10)), (7,) * 10
    assert repetition(writing(once)) == 0.0
    # Seven n-grams of four, of which one is new.
    assert repetition(writing(loop)) == pytest.approx(6 / 7)
    assert repetition(writing(once, once)) == pytest.approx(1 / 2)
    assert repetition(writing(once, loop)) == pytest.approx(6 / 14)
    # Episodes of a group are alike without repeating themselves.
    assert repetition(writing(once), writing(once)) == 0.0
    assert repetition(writing((1, 2))) == 0.0


INVALID = (End.ENVIRONMENT_FAILURE, End.PROMPT_TOO_LONG)

batches = st.lists(
    st.tuples(st.sampled_from(End), st.integers(0, 3), st.sampled_from([0.0, 1.0]), st.integers(0, 2)), min_size=1
).filter(lambda rows: any(end not in INVALID for end, *_ in rows))


@given(batches)
def test_shares_sum_to_one_and_means_follow_from_the_strata(rows):
    episodes = [
        make_episode(str(i), end=end, searches=searches, reward=None if end in INVALID else reward)
        for i, (end, searches, reward, _) in enumerate(rows)
    ]
    metrics = batch_metrics(episodes, [len(e.searches) for e in episodes], [group for *_, group in rows])
    shares = {name: value for name, value in metrics.items() if name.startswith("strata/") and name.endswith("/share")}
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(value for name, value in metrics.items() if name.startswith("ends/")) == pytest.approx(1)
    mean = sum(share * metrics[name.replace("/share", "/reward")] for name, share in shares.items())
    assert metrics["reward/mean"] == pytest.approx(mean)
    assert metrics["tokens/model"] + metrics["tokens/environment"] == sum(len(e.completion_ids) for e in episodes)
    assert metrics["tokens/model"] == sum(map(sum, (e.action_mask for e in episodes)))
    assert 0 <= metrics["groups/reward_varies"] <= 1
