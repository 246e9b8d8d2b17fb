"""Which of a policy's own episodes it is trained on, and that it is."""

import dataclasses

import pytest
from fakes import make_episode
from hypothesis import given
from hypothesis import strategies as st
from test_warmstart import model  # noqa: F401, a fixture

from agentrl.config import EpisodesConfig, WarmStartConfig
from agentrl.data.errors import DataError
from agentrl.runs.trajectories import write_trajectories
from agentrl.training.own_episodes import choose_episodes
from agentrl.types import Action, End, Question


@pytest.fixture
def sampled(codec):
    """An episode in which the model wrote `said`, after some searches."""

    def make(name, said="so", *, reward=1.0, question="q", searches=0, **rest):
        episode = make_episode(name, Question(question, "?", ("so",)), reward=reward, searches=searches, **rest)
        ids = tuple(codec.encode(f"<answer> {said} </answer>"))
        if not episode.turns:
            return episode
        turns = [dataclasses.replace(turn, text=codec.decode(turn.token_ids)) for turn in episode.turns[:-1]]
        last = dataclasses.replace(
            episode.turns[-1], token_ids=ids, logprobs=(-0.1,) * len(ids), text=codec.decode(ids)
        )
        return dataclasses.replace(episode, turns=(*turns, last))

    return make


@pytest.fixture
def choose(codec, tmp_path):
    def of(*episodes, seed=0, **settings):
        write_trajectories(tmp_path / "episodes.jsonl.zst", episodes)
        config = EpisodesConfig(files=[str(tmp_path / "episodes.jsonl.zst")], **settings)
        return [episode.id for episode in choose_episodes(config, seed, codec)]

    return of


def test_right_episodes_that_answer_are_chosen(sampled, choose):
    unread = sampled("unread", "b")
    unread = dataclasses.replace(unread, turns=(dataclasses.replace(unread.turns[0], action=Action("invalid", "x")),))
    cut = sampled("cut", "c", end=End.TURN_LIMIT)
    failed = sampled("failed", end=End.ENVIRONMENT_FAILURE, reward=None)
    assert choose(sampled("right"), sampled("wrong", "a", reward=0.0), unread, cut, failed) == ["right"]
    assert choose(sampled("right"), sampled("half", "a", reward=0.5), min_reward=0.4) == ["right", "half"]


def test_they_can_be_chosen_by_their_searches(sampled, choose):
    episodes = [sampled(str(number), f"answer {number}", searches=number) for number in range(4)]
    assert choose(*episodes, min_searches=1, max_searches=2) == ["1", "2"]
    assert choose(*episodes, min_searches=3) == ["3"]


def test_one_that_says_the_same_as_another_of_its_question_counts_once(sampled, choose):
    assert choose(sampled("a"), sampled("b"), sampled("c", question="other"), sampled("d", "else")) == ["a", "d", "c"]


def test_a_question_has_at_most_so_many_and_the_seed_draws_them(sampled, choose):
    episodes = [sampled(f"{question}{n}", f"{n}", question=question) for question in "xy" for n in range(9)]
    first = choose(*episodes, per_question=3)
    assert [name[0] for name in first] == ["x"] * 3 + ["y"] * 3
    assert first == choose(*episodes, per_question=3)
    assert any(first != choose(*episodes, per_question=3, seed=seed) for seed in range(1, 5))
    assert len(choose(*episodes, per_question=None)) == 18


def test_where_none_is_left_it_says_what_was_wrong_with_them(sampled, choose):
    with pytest.raises(DataError, match=r"no episode to train on \(2 earned less than 1, 1 failed\); sample more"):
        choose(
            sampled("a", reward=0.0),
            sampled("b", "c", reward=0.5),
            sampled("d", end=End.ENVIRONMENT_FAILURE, reward=None),
        )


def test_episodes_of_another_tokenizer_are_refused(sampled, choose):
    other = sampled("a")
    other = dataclasses.replace(other, turns=(dataclasses.replace(other.turns[0], text="<answer> other </answer>"),))
    with pytest.raises(DataError, match="ids of episode a are not those of this model's tokenizer"):
        choose(other)


def test_a_file_that_is_missing_is_named(codec, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.zst: no such file; give one that `agentrl rollout --out`"):
        choose_episodes(EpisodesConfig(files=[str(tmp_path / "nothing.zst")]), 0, codec)


@given(st.integers(0, 5), st.integers(0, 5))
def test_bounds_that_exclude_each_other_are_refused(least, most):
    if least <= most:
        assert EpisodesConfig(files=["/x"], min_searches=least, max_searches=most).min_searches == least
    else:
        with pytest.raises(ValueError, match="max_searches"):
            EpisodesConfig(files=["/x"], min_searches=least, max_searches=most)


def test_a_warm_start_needs_something_to_train_on():
    with pytest.raises(ValueError, match="set sources, or episodes"):
        WarmStartConfig()


def test_a_command_trains_an_adapter_on_own_episodes(model, sampled, agentrl, tmp_path):  # noqa: F811
    file = tmp_path / "episodes.jsonl.zst"
    write_trajectories(file, [sampled(str(n), f"answer {n}", searches=n % 3, question=str(n)) for n in range(6)])
    config = tmp_path / "c.yaml"
    config.write_text(f"name: warm\nmodel: {{path: '{model}', lora: {{rank: 4, alpha: 8}}}}\n")
    out = tmp_path / "adapter"
    settings = [f"warmstart.out={out}", "warmstart.batch=2", "warmstart.threads=1"]
    status, shown, _ = agentrl("warmstart", "--config", config, *settings, "--from", file)
    assert status == 0
    assert "adapter of 6 demonstrations" in shown
    assert (out / "adapter_model.safetensors").exists()
    status, _, err = agentrl("warmstart", "--config", config, *settings, "--from", file)
    assert status == 1
    assert "exists already" in err
