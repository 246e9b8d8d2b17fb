"""The updates that a batch gets: minibatches, several passes, clipping, what stops them, and the metrics of a step."""

import random

import numpy as np
import pytest
import torch
from trainers import (
    likelihoods,
    logged,
    make_trainer,
    make_trajectories,
    sampled_earlier,
    tokens_of,
)
from trl import GRPOTrainer

from agentrl.training.batch import Minibatch, batch_tensors, deal
from agentrl.training.sampling import ScoredBatch
from agentrl.training.trainer import NotFiniteError
from agentrl.training.updates import Additions, Updates


def test_a_bonus_for_entropy_makes_the_policy_less_sure(tmp_path, tokenizer):
    batch = ScoredBatch(make_trajectories(4, random.Random(31)), [0.0] * 4, {})
    entropies = []
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        batch,
        additions=Additions(entropy_bonus=1.0),
        learning_rate=1e-2,
        max_steps=4,
        # Steps of the same size show the direction of the gradient.
        lr_scheduler_type="constant",
    )
    trainer.train()
    entropies = [line["entropy"] for line in trainer.state.log_history if "entropy" in line]
    assert len(entropies) == 4
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0]


def test_a_batch_is_trained_on_in_minibatches_of_whole_groups_as_often_as_asked(tmp_path, tokenizer, monkeypatch):
    rng = random.Random(32)
    trajectories = make_trajectories(10, rng)
    batches = []

    def sample():
        batches.append(len(batches))
        return ScoredBatch(trajectories, [rng.gauss(0, 1) for _ in trajectories], {})

    trainer = make_trainer(
        tmp_path,
        tokenizer,
        None,
        updates=Updates(group_size=2, epochs=2, minibatches=2, seed=3),
        max_steps=8,
        logging_steps=4,
        learning_rate=1e-3,
    )
    trainer._sample = sample
    seen, backward = [], type(trainer).backward

    def watched(self, minibatch):
        prompts = minibatch.tensors["prompt_ids"].tolist()
        seen.append((trainer.batches, prompts, minibatch.tensors["old_per_token_logps"]))
        return backward(self, minibatch)

    monkeypatch.setattr(type(trainer), "backward", watched)
    trainer.train()
    assert batches == [0, 1]
    assert [batch for batch, _, _ in seen] == [0, 0, 0, 0, 1, 1, 1, 1]
    everyone = sorted(batch_tensors(trajectories, tokenizer.pad_token_id)["prompt_ids"].tolist())
    for first, second in ((0, 1), (2, 3), (4, 5), (6, 7)):
        assert sorted(seen[first][1] + seen[second][1]) == everyone
        assert {len(seen[first][1]), len(seen[second][1])} == {4, 6}
    assert seen[0][1] != seen[2][1], "each pass deals the groups anew"
    # Updates move the policy away from the one before the batch, which stays what it was.
    assert len(trainer.state.log_history[:-1]) == 2
    for line in trainer.state.log_history[:-1]:
        assert line["seconds/train"] > 0


def test_dealing_keeps_groups_together():
    batch = ScoredBatch(make_trajectories(12, random.Random(33)), [0.0] * 12, {})
    tensors = batch_tensors(batch.trajectories, 0) | {"number": torch.arange(12)}
    whole = Minibatch(tensors, torch.ones(12, dtype=torch.bool))
    parts = list(deal(whole, 3, 2, torch.Generator().manual_seed(0)))
    numbers = [part.tensors["number"].tolist() for part in parts]
    assert sorted(number for some in numbers for number in some) == list(range(12))
    for some in numbers:
        assert [n // 3 for n in some[::3]] == [n // 3 for n in some[1::3]] == [n // 3 for n in some[2::3]]


@pytest.mark.parametrize(
    ("loss", "high", "logged"),
    [
        ("dapo", 0.1, {"clip_ratio/low", "clip_ratio/high"}),
        ("cispo", 1.05, {"clip_ratio/high"}),
        ("sapo", 0.1, set()),
        ("vespo", 0.1, set()),
    ],
)
def test_what_the_loss_cuts_is_logged_once_a_batch_has_several_updates(tmp_path, tokenizer, loss, high, logged):
    batch = ScoredBatch(make_trajectories(4, random.Random(34)), [1.0, -1.0, 0.5, -0.5], {})

    def cut(updates):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            batch,
            updates=Updates(group_size=2, epochs=updates),
            max_steps=updates,
            logging_steps=updates,
            learning_rate=0.02,
            loss=loss,
            epsilon=0.1,
            epsilon_high=high,
        )
        trainer.train()
        return {name: v for name, v in trainer.state.log_history[0].items() if name.startswith("clip_ratio/")}

    once, often = cut(1), cut(6)
    assert set(once) == set(often) == logged
    assert all(0 < value < 1 for value in often.values())
    assert not any(once.values())


def test_under_gspo_it_is_the_ratio_of_an_episode_that_is_cut(tmp_path, tokenizer):
    trajectories = make_trajectories(2, random.Random(35))
    trainer = make_trainer(
        tmp_path, tokenizer, None, updates=Updates(group_size=2, epochs=2), loss="gspo", epsilon=0.2, epsilon_high=0.2
    )
    whole = trainer.whole_batch(ScoredBatch(trajectories, [1.0, -1.0], {}))
    # Tokens go up and down by turns, and episodes as a whole hardly.
    swing = torch.where(torch.arange(whole.own.shape[1]) % 2 == 0, 0.5, -0.5) * whole.own
    even = swing - swing.sum(1, keepdim=True) / whole.own.sum(1, keepdim=True) * whole.own
    whole.tensors["old_per_token_logps"] = whole.tensors["old_per_token_logps"] - even
    trainer.backward(whole)
    logs = {"loss": 0.0}
    trainer.log(logs)
    assert trainer.state.log_history[-1]["clip_ratio/high"] == trainer.state.log_history[-1]["clip_ratio/low"] == 0.0


def test_a_step_whose_advantages_are_all_0_moves_on_by_momentum_alone(tmp_path, tokenizer):
    """As if the model had run for its episodes, whose gradient is 0."""
    trajectories = make_trajectories(2, random.Random(35))
    batches = [ScoredBatch(trajectories, [1.0, -1.0], {}), ScoredBatch(trajectories, [0.0, 0.0], {})]
    trainer = make_trainer(tmp_path, tokenizer, None, learning_rate=1e-2, max_steps=2, lr_scheduler_type="constant")
    weights = []

    def sample():
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        return batches[len(weights) - 1]

    trainer._sample = sample
    trainer.train()
    changed = [name for name, p in trainer.model.named_parameters() if not p.equal(weights[1][name])]
    assert changed
    assert all("lora" in name for name in changed)


def test_what_a_step_logs_leaves_out_episodes_that_do_not_run_and_does_not_depend_on_packs(tmp_path, tokenizer):
    trajectories = make_trajectories(4, random.Random(12))
    whole = ScoredBatch(trajectories, [1.0, 1.0, -1.0, 1.0], {}, trained=[True, False, True, False])
    half = ScoredBatch(trajectories[::2], [1.0, -1.0], {})
    logs = []
    for batch, tokens in ((whole, 1), (half, 10_000)):
        trainer = make_trainer(tmp_path, tokenizer, batch, tokens=tokens, beta=0.1)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    names = {"entropy", "kl", "logprobs/difference_max", "logprobs/difference_mean"}
    names |= {name for name in logs[1] if name.startswith(("clip_ratio/", "ratio/"))}
    assert len(names) == 9
    for name in names:
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-5), name


def test_progress_counts_the_episodes_of_each_pass(tmp_path, tokenizer):
    told = []
    batch = ScoredBatch(make_trajectories(4, random.Random(36)), [1.0, -1.0, 0.5, 0.0], {})
    trainer = make_trainer(tmp_path, tokenizer, batch, tokens=1, on_trained=told.append)
    trainer.train()
    assert told == [1, 2, 3]


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        ("advantage", r"step 1: an advantage is nan; the optimizer did not .*: check the estimator and its rewards"),
        ("loss", r"step 1: the loss is -?inf; .* lower training.learning_rate or training.max_grad_norm"),
        ("gradient", r"step 1: the gradient norm is nan; .* lower training.learning_rate"),
    ],
)
def test_a_number_that_is_not_finite_stops_the_training_before_any_weight_changes(
    tmp_path, tokenizer, monkeypatch, poison, message
):
    advantages = [1.0, float("nan") if poison == "advantage" else -1.0]
    batch = ScoredBatch(make_trajectories(2, random.Random(24)), advantages, {})
    trainer = make_trainer(tmp_path, tokenizer, batch, tokens=1, learning_rate=1e-2)
    if poison == "loss":
        compute_loss = GRPOTrainer._compute_loss
        monkeypatch.setattr(
            GRPOTrainer, "_compute_loss", lambda self, *arguments: compute_loss(self, *arguments) * float("inf")
        )
    if poison == "gradient":
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trained[-1].register_hook(lambda gradient: gradient * float("nan"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(NotFiniteError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(p.equal(before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("by_turn", [False, True])
def test_ratio_quantiles_are_over_the_tokens_of_advantage_at_least_0_in_the_whole_step(tmp_path, tokenizer, by_turn):
    rng = random.Random(19)
    # With a KL term the episodes of advantage 0 run as well.
    advantages = [[rng.choice([-1.0, 0.0, 1.0])] * 3 for _ in range(6)]
    if by_turn:
        advantages = [[rng.choice([-1.0, 0.0, 1.0]) for _ in range(3)] for _ in range(6)]
    falls = [[rng.gauss(0, 0.3) for _ in range(3)] for _ in range(6)]
    trajectories = make_trajectories(6, rng)
    trainer = make_trainer(tmp_path, tokenizer, None)
    trajectories = sampled_earlier(trajectories, likelihoods(trainer, trajectories), falls)
    batch = ScoredBatch(
        trajectories, advantages if by_turn else [row[0] for row in advantages], {}, trained=[True] * 5 + [False]
    )
    trainer = make_trainer(tmp_path, tokenizer, batch, tokens=90, beta=0.1)
    trainer.train()
    ratios = [
        np.exp(-falls[row][turn])
        for row in range(5)
        for turn in range(3)
        if advantages[row][turn] >= 0
        for _ in range(tokens_of(trajectories[row], turn))
    ]
    logs = trainer.state.log_history[0]
    found = [logs[f"ratio/positive_{name}"] for name in ("q01", "q50", "q99")]
    assert found == pytest.approx(np.quantile(ratios, (0.01, 0.5, 0.99)).tolist(), rel=1e-4)
    assert not any(name.startswith("ratio/") for name in logged(trainer)), "a later log holds only what came since"


def test_without_a_token_of_advantage_at_least_0_no_ratio_is_logged(tmp_path, tokenizer):
    batch = ScoredBatch(make_trajectories(2, random.Random(20)), [-1.0, -2.0], {})
    trainer = make_trainer(tmp_path, tokenizer, batch)
    trainer.train()
    assert not any(name.startswith("ratio/") for name in trainer.state.log_history[0])
    assert "logprobs/difference_max" in trainer.state.log_history[0]
