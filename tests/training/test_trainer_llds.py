"""LLDS inside the trainer: its weight, its mean, its metrics, and the settings with which it would be wrong."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from trainers import (
    LENGTH_LIMIT,
    likelihoods,
    logged,
    loss_and_gradients,
    make_trainer,
    make_trajectories,
    tokens_of,
)

from agentrl.training.sampling import ScoredBatch
from agentrl.training.settings import LOSSES
from agentrl.training.updates import Additions, Updates

# The first turn fell by half a nat a token since before the batch, the second rose, the third moved less than the tolerance.
FALLS = (0.5, -0.5, 0.0005)


def displaced(trainer, batch, falls=FALLS):
    """A batch whose turns moved by `falls` since the first update on it began."""
    whole = trainer.whole_batch(batch)
    by_turn = torch.zeros_like(whole.tensors["sampling_per_token_logps"])
    for turn, fall in enumerate(falls):
        by_turn[whole.tensors["turn_index"] == turn] = fall
    now = likelihoods(trainer, batch.trajectories)
    whole.tensors["old_per_token_logps"] = (now + by_turn) * whole.own
    return whole


def llds_of(tmp_path, tokenizer, batch, falls=FALLS, weight=1.0, tolerance=1e-3, **settings):
    """Loss and gradients of the displaced batch, and what was logged."""
    additions = Additions(llds_weight=weight, llds_tolerance=tolerance)
    # Without LLDS the episodes of advantage 0 would not run.
    trainer = make_trainer(tmp_path, tokenizer, batch, additions=additions, **({"beta": 0.1} | settings))
    found = loss_and_gradients(trainer, displaced(trainer, batch, falls))
    return *found, logged(trainer)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_llds_adds_its_weight_times_the_mean_that_the_loss_takes(tmp_path, tokenizer, loss, tokens):
    advantages = [1.0, -1.0, 0.5, 0.0]
    trajectories = make_trajectories(4, random.Random(13))
    batch = ScoredBatch(trajectories, advantages, {})
    sums = [0.5 * tokens_of(t, 0) * (a >= 0) for t, a in zip(trajectories, advantages, strict=True)]
    lengths = [sum(t.action_mask) for t in trajectories]
    over_tokens = sum(sums) / sum(lengths)
    over_episodes = np.mean([total / length for total, length in zip(sums, lengths, strict=True)])
    expected = {
        "dapo": over_tokens,
        "bnpo": over_tokens,
        "cispo": over_tokens,
        "vespo": over_tokens,
        "dr_grpo": sum(sums) / (len(sums) * LENGTH_LIMIT),
        "luspo": sum(sums) / len(sums),
    }.get(loss, over_episodes)

    settings = {"loss": loss, "tokens": tokens}
    found = {w: llds_of(tmp_path, tokenizer, batch, weight=w, **settings) for w in (0.0, 0.3, 0.6)}
    assert found[0.6][2]["llds/loss"] == pytest.approx(expected, rel=1e-4)
    (loss_0, gradient_0, logs_0), (loss_3, gradient_3, _), (loss_6, gradient_6, logs_6) = found.values()
    assert loss_3 - loss_0 == pytest.approx(0.3 * expected, rel=1e-3)
    assert loss_6 - loss_0 == pytest.approx(0.6 * expected, rel=1e-3)
    assert (gradient_3 - gradient_0).norm() > 0
    assert torch.allclose(gradient_6 - gradient_0, 2 * (gradient_3 - gradient_0), atol=1e-5)
    # It changes no other metric.
    assert {n: v for n, v in logs_6.items() if not n.startswith("llds/")} == logs_0


def test_llds_of_the_first_update_on_a_batch_is_zero(tmp_path, tokenizer):
    """Both log-probabilities are the trainer's own, so that not even the noise between engine and trainer is there."""
    batch = ScoredBatch(make_trajectories(4, random.Random(15)), [1.0, -1.0, 0.0, 1.0], {})
    additions = Additions(llds_weight=1.0, llds_tolerance=0.0)
    trainer = make_trainer(tmp_path, tokenizer, batch, additions=additions, updates=Updates(group_size=2, epochs=2))
    loss_and_gradients(trainer, trainer.whole_batch(batch))
    assert logged(trainer)["llds/loss"] == 0.0


def test_llds_makes_what_fell_likelier_again(tmp_path, tokenizer):
    batch = ScoredBatch(make_trajectories(2, random.Random(14)), [0.0, 0.0], {})
    trainer = make_trainer(
        tmp_path, tokenizer, batch, additions=Additions(llds_weight=1.0), learning_rate=1e-3, packing="none"
    )
    whole = displaced(trainer, batch)
    before = likelihoods(trainer, batch.trajectories)
    trainer._minibatches = lambda batch: iter([whole])
    trainer.train()
    change = likelihoods(trainer, batch.trajectories) - before
    assert change[(whole.tensors["turn_index"] == 0) & whole.own].sum() > 0


def test_a_fall_within_the_tolerance_is_none_for_llds(tmp_path, tokenizer):
    batch = ScoredBatch(make_trajectories(2, random.Random(15)), [1.0, -1.0], {})
    for tolerance, falls in ((1e-3, False), (2e-4, True)):
        logs = llds_of(tmp_path, tokenizer, batch, [5e-4] * 3, tolerance=tolerance)[2]
        assert (logs["llds/loss"] > 0) == falls


def test_llds_metrics_leave_out_what_is_not_trained(tmp_path, tokenizer):
    trajectories = make_trajectories(4, random.Random(17))
    # The first episode fell in one of two turns, the third in one of three, the last is not trained.
    trajectories[0] = dataclasses.replace(trajectories[0], turns=trajectories[0].turns[:2])
    batch = ScoredBatch(trajectories, [1.0, -1.0, 0.5, 2.0], {}, trained=[True, True, True, False])
    tokens = sum(sum(t.action_mask) for t in trajectories[:3])
    fallen = tokens_of(trajectories[0], 0) + tokens_of(trajectories[2], 0)
    for packs in (1, 90, 10_000):
        logs = llds_of(tmp_path, tokenizer, batch, tokens=packs)[2]
        assert logs["llds/loss"] == pytest.approx(0.5 * fallen / tokens, rel=1e-4)
        assert logs["llds/actions_fallen_share"] == pytest.approx(2 / 5)


def test_llds_looks_at_the_advantage_of_the_turn(tmp_path, tokenizer):
    trajectories = make_trajectories(2, random.Random(18))
    batch = ScoredBatch(trajectories, [[-1.0, 1.0, 1.0], [1.0, -1.0, -1.0]], {})
    first, second = trajectories
    kept = tokens_of(first, 1) + tokens_of(first, 2) + tokens_of(second, 0)
    expected = 0.5 * kept / sum(sum(t.action_mask) for t in trajectories)
    logs = llds_of(tmp_path, tokenizer, batch, [0.5] * 3)[2]
    assert logs["llds/loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("settings", [{"llds_weight": -0.1}, {"llds_tolerance": -1e-3}])
def test_settings_with_which_llds_would_be_wrong_are_refused(settings):
    with pytest.raises(ValueError, match="at least 0"):
        Additions(**settings)
