"""LLDS inside the trainer: its weight, its mean, its metrics, and the settings with which it would be wrong."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from trainers import (
    LENGTH_LIMIT,
    LOSSES,
    likelihoods,
    loss_and_gradients,
    make_policy,
    make_trainer,
    make_trajectories,
    sampled_earlier,
    score,
    tokens_of,
)
from trl import GRPOTrainer

from agentrl.training.batch import batch_tensors
from agentrl.training.sampling import ScoredBatch

# The first turn fell by half a nat a token, the second rose, the third moved by less than the tolerance.
FALLS = (0.5, -0.5, 0.0005)


def displaced(tmp_path, tokenizer, advantages, rng, falls=FALLS):
    """Episodes with the given advantages, whose turns moved by `falls` since they were sampled."""
    trajectories = make_trajectories(len(advantages), rng)
    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch([], [], {}), 2)
    return sampled_earlier(trajectories, likelihoods(trainer, trajectories), [falls] * len(trajectories))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_llds_adds_its_weight_times_the_mean_that_the_loss_takes(tmp_path, tokenizer, loss_type):
    advantages = [1.0, -1.0, 0.5, 0.0]
    trajectories = displaced(tmp_path, tokenizer, advantages, random.Random(13))
    batch = ScoredBatch(trajectories, advantages, {})
    sums = [0.5 * tokens_of(t, 0) * (a >= 0) for t, a in zip(trajectories, advantages, strict=True)]
    lengths = [sum(t.action_mask) for t in trajectories]
    expected = {
        "grpo": np.mean([total / length for total, length in zip(sums, lengths, strict=True)]),
        "bnpo": sum(sums) / sum(lengths),
        "dapo": sum(sums) / sum(lengths),
        "dr_grpo": sum(sums) / (len(sums) * LENGTH_LIMIT),
    }[loss_type]

    results = {}
    for weight in (0.0, 0.3, 0.6):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            batch,
            4,
            llds_weight=weight,
            loss_type=loss_type,
            beta=0.1,
            max_completion_length=LENGTH_LIMIT,
        )
        results[weight] = loss_and_gradients(trainer, score(trainer, 4), trainer._compute_loss)
    assert trainer._metrics["train"]["llds/loss"] == [pytest.approx(expected, rel=1e-4)]
    (loss, gradient), (loss_3, gradient_3), (loss_6, gradient_6) = results.values()
    assert loss_3 - loss == pytest.approx(0.3 * expected, rel=1e-4)
    assert loss_6 - loss == pytest.approx(0.6 * expected, rel=1e-4)
    assert (gradient_3 - gradient).norm() > 0
    assert torch.allclose(gradient_6 - gradient, 2 * (gradient_3 - gradient), atol=1e-6)


def test_llds_alone_makes_only_what_fell_likelier_again(tmp_path, tokenizer):
    trajectories = displaced(tmp_path, tokenizer, [0.0, 0.0], random.Random(14))
    batch = ScoredBatch(trajectories, [0.0, 0.0], {})
    trainer = make_trainer(tmp_path, tokenizer, batch, 2, llds_weight=1.0, learning_rate=1e-3)
    _, gradient = loss_and_gradients(trainer, score(trainer, 2), trainer._compute_loss)
    trainer.model.zero_grad()
    tensors = batch_tensors(trajectories, 0)
    trainer._scored_mask = tensors["tool_mask"] * (tensors["turn_index"] == 0)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1),
        torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1),
        tensors["completion_ids"].size(1),
    )
    (-logps.sum() / sum(sum(t.action_mask) for t in trajectories)).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert torch.allclose(gradient, expected, atol=1e-6)
    before = likelihoods(trainer, trajectories)
    trainer.train()
    change = likelihoods(trainer, trajectories) - before
    assert change[tensors["turn_index"] == 0].sum() > 0


def decoded(policy, trajectory):
    """The episode with the log-probabilities that an engine finds, which reads one token after the other from a cache."""
    logps, cache = [], None
    with torch.no_grad():
        for token, following in itertools.pairwise((*trajectory.prompt_ids, *trajectory.completion_ids)):
            out = policy(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logps.append(out.logits[0, -1].log_softmax(-1)[following].item())
    logps, turns = logps[len(trajectory.prompt_ids) - 1 :], []
    for turn in trajectory.turns:
        turns.append(dataclasses.replace(turn, logprobs=tuple(logps[: len(turn.token_ids)])))
        logps = logps[len(turn.token_ids) + len(turn.observation_ids) :]
    return dataclasses.replace(trajectory, turns=tuple(turns))


def test_llds_of_rollouts_that_an_engine_has_just_sampled_is_zero(tmp_path, tokenizer):
    """Engine and trainer compute the same log-probabilities in another order: the noise is there, far below the tolerance."""
    policy = make_policy()
    trajectories = [decoded(policy, trajectory) for trajectory in make_trajectories(4, random.Random(15))]
    batch = ScoredBatch(trajectories, [1.0, -1.0, 0.0, 1.0], {})
    results = []
    for weight in (0.0, 1.0):
        trainer = make_trainer(tmp_path, tokenizer, batch, 4, policy, llds_weight=weight)
        results.append(loss_and_gradients(trainer, score(trainer, 4), trainer._compute_loss))
    assert trainer._metrics["train"]["llds/loss"] == [0.0]
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    logs = {}
    trainer.log(logs)
    assert 0 < logs["logprobs/difference_max"] < trainer._llds_tolerance / 10


def test_a_fall_within_the_tolerance_is_none_for_llds(tmp_path, tokenizer):
    trajectories = displaced(tmp_path, tokenizer, [1.0, -1.0], random.Random(15), falls=[5e-4] * 3)
    for tolerance, falls in ((1e-3, False), (2e-4, True)):
        batch = ScoredBatch(trajectories, [1.0, -1.0], {})
        trainer = make_trainer(tmp_path, tokenizer, batch, 2, llds_weight=1.0, llds_tolerance=tolerance)
        loss_and_gradients(trainer, score(trainer, 2), trainer._compute_loss)
        assert (trainer._metrics["train"]["llds/loss"][0] > 0) == falls


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_mean_that_llds_takes_is_that_of_trls_loss(tmp_path, tokenizer, loss_type, micro_batch):
    """With a ratio of 1 and no divergence from a reference, TRL's loss of a token is its negative advantage."""
    rng = random.Random(23)
    batch = ScoredBatch(make_trajectories(4, rng), [0.0] * 4, {}, trained=[True, True, False, True])
    trainer = make_trainer(
        tmp_path, tokenizer, batch, 4, micro_batch=micro_batch, loss_type=loss_type, max_completion_length=LENGTH_LIMIT
    )
    tensors = score(trainer, 4)
    trainer.current_gradient_accumulation_steps = 4 // micro_batch
    values = torch.rand(tensors["tool_mask"].shape, generator=torch.Generator().manual_seed(0)) * tensors["tool_mask"]
    for start in range(0, 4, micro_batch):
        rows = slice(start, start + micro_batch)
        inputs = {name: tensor[rows] if tensor.dim() else tensor for name, tensor in tensors.items()}
        own = inputs["tool_mask"].bool()
        found = trainer._mean_over_tokens(values[rows], own, inputs)
        trainer._scored_mask = inputs["tool_mask"]
        expected = GRPOTrainer._compute_loss(trainer, trainer.model, {**inputs, "advantages": -values[rows]})
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_llds_of_weight_0_computes_nothing_and_leaves_trls_loss_as_it_is(tmp_path, tokenizer, monkeypatch):
    trajectories = displaced(tmp_path, tokenizer, [1.0, -1.0], random.Random(16))
    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch(trajectories, [1.0, -1.0], {}), 2, llds_weight=0.0)
    monkeypatch.setattr("agentrl.training.trainer.displacement", lambda *_: pytest.fail("LLDS was computed"))
    tensors = score(trainer, 2)
    loss, gradients = loss_and_gradients(trainer, tensors, trainer._compute_loss)
    expected_loss, expected = loss_and_gradients(
        trainer, tensors, lambda model, inputs: GRPOTrainer._compute_loss(trainer, model, inputs)
    )
    assert loss == expected_loss
    assert torch.equal(gradients, expected)
    assert not any(name.startswith("llds/") for name in trainer._metrics["train"])


def test_llds_leaves_what_trl_logs_as_it_is(tmp_path, tokenizer):
    trajectories = displaced(tmp_path, tokenizer, [1.0, -1.0], random.Random(22))
    logged = []
    for weight in (0.0, 1.0):
        batch = ScoredBatch(trajectories, [1.0, -1.0], {})
        trainer = make_trainer(tmp_path, tokenizer, batch, 2, llds_weight=weight, beta=0.1)
        loss_and_gradients(trainer, score(trainer, 2), trainer._compute_loss)
        logged.append(dict(trainer._metrics["train"]))
    assert logged[1].pop("llds/loss") != [0.0]
    assert logged[0].keys() >= {"entropy", "kl"}
    assert logged[1] == logged[0]


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_llds_metrics_of_a_step_do_not_depend_on_its_micro_batches(tmp_path, tokenizer, micro_batch):
    advantages = [1.0, -1.0, 0.5, 2.0]
    trajectories = displaced(tmp_path, tokenizer, advantages, random.Random(17))
    # The first episode fell in one of two turns, the third in one of three, the last is not trained.
    trajectories[0] = dataclasses.replace(trajectories[0], turns=trajectories[0].turns[:2])
    batch = ScoredBatch(trajectories, advantages, {}, trained=[True, True, True, False])
    trainer = make_trainer(tmp_path, tokenizer, batch, 4, micro_batch=micro_batch, llds_weight=0.5, loss_type="dapo")
    trainer.train()
    logs = trainer.state.log_history[0]
    tokens = sum(sum(t.action_mask) for t in trajectories[:3])
    fallen = tokens_of(trajectories[0], 0) + tokens_of(trajectories[2], 0)
    assert logs["llds/loss"] == pytest.approx(0.5 * fallen / tokens, rel=1e-4)
    assert logs["llds/actions_fallen_share"] == pytest.approx(2 / 5)
    assert "llds/actions_fallen_share" not in trainer.state.log_history[1], "a later log holds only what came since"


def test_llds_looks_at_the_advantage_of_the_turn(tmp_path, tokenizer):
    advantages = [[-1.0, 1.0, 1.0], [1.0, -1.0, -1.0]]
    trajectories = displaced(tmp_path, tokenizer, advantages, random.Random(18), falls=[0.5] * 3)
    batch = ScoredBatch(trajectories, advantages, {})
    trainer = make_trainer(tmp_path, tokenizer, batch, 2, llds_weight=1.0, loss_type="dapo")
    loss_and_gradients(trainer, score(trainer, 2), trainer._compute_loss)
    first, second = trajectories
    kept = tokens_of(first, 1) + tokens_of(first, 2) + tokens_of(second, 0)
    expected = 0.5 * kept / sum(sum(t.action_mask) for t in trajectories)
    assert trainer._metrics["train"]["llds/loss"] == [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"llds_weight": -0.1}, "at least 0"),
        ({"llds_tolerance": -1e-3}, "at least 0"),
        ({"llds_weight": 0.1, "loss_type": "cispo"}, "LLDS needs a loss of grpo, bnpo, dr_grpo, dapo, got 'cispo'"),
    ],
)
def test_settings_with_which_llds_would_be_wrong_are_refused(tmp_path, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, ScoredBatch([], [], {}), 2, **settings)
