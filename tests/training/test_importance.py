"""Importance weights make stale rollouts count by how likely the trained policy is to have sampled them."""

import dataclasses
import math
import random

import pytest
import torch
from trainers import loss_and_gradients, make_policy, make_trajectories, score
from trl import GRPOTrainer

from agentrl.training.importance import importance_weights
from agentrl.training.sampling import ScoredBatch
from agentrl.training.trainer import StratifiedTrainer, grpo_config


def make_trainer(tmp_path, tokenizer, batch, importance, **settings):
    return StratifiedTrainer(
        model=make_policy(),
        processing_class=tokenizer,
        questions=4,
        sample=lambda episodes: batch,
        importance=importance,
        args=grpo_config(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(batch.trajectories),
            num_generations=len(batch.trajectories),
            max_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        ),
    )


def logged(trainer):
    """What the trainer adds to a step's metrics."""
    logs = {}
    trainer.log(logs)
    return logs


def test_weights_are_cut_or_masked_at_the_cap():
    ratios = torch.tensor([[0.1, 0.6, 1.0, 1.9, 5.0]])
    sampler = torch.full((1, 5), -3.0)
    torch.testing.assert_close(
        importance_weights(ratios.log() + sampler, sampler, "truncate", 2.0), torch.tensor([[0.1, 0.6, 1.0, 1.9, 2.0]])
    )
    torch.testing.assert_close(
        importance_weights(ratios.log() + sampler, sampler, "mask", 2.0), torch.tensor([[0.0, 0.6, 1.0, 1.9, 0.0]])
    )


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_gradient_is_that_of_advantages_times_weights(tmp_path, tokenizer, loss_type, beta):
    rng = random.Random(1)
    trajectories = make_trajectories(4, rng)
    batch = ScoredBatch(trajectories, [1.0, -0.5, 0.3, -1.0], {})
    settings = {"loss_type": loss_type, "beta": beta}
    plain = make_trainer(tmp_path, tokenizer, batch, None, **settings)
    tensors = score(plain, 4)
    with torch.no_grad():
        plain._scored_mask = tensors["tool_mask"]
        ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1)
        attended = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1)
        width = tensors["completion_ids"].size(1)
        logps = plain._get_per_token_logps_and_entropies(plain.model, ids, attended, width)[0]
    # The sampler was of another mind about each token: ratios from 0.3 to 3.
    noise = torch.empty_like(logps).uniform_(-math.log(3), math.log(3), generator=torch.Generator().manual_seed(0))
    tensors["sampling_per_token_logps"] = torch.where(tensors["tool_mask"].bool(), logps - noise, 0.0)
    by_hand = {**tensors, "advantages": tensors["advantages"][:, None] * noise.exp().clamp(max=2.0)}
    expected = loss_and_gradients(plain, by_hand, plain._compute_loss)
    weighing = make_trainer(tmp_path, tokenizer, batch, ("truncate", 2.0), **settings)
    found = loss_and_gradients(weighing, tensors, weighing._compute_loss)
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    assert ((found[1] - expected[1]).norm() / expected[1].norm()).item() < 1e-5
    unweighted = loss_and_gradients(plain, tensors, plain._compute_loss)
    assert ((found[1] - unweighted[1]).norm() / unweighted[1].norm()).item() > 0.05
    assert logged(weighing)["importance/cut_share"] == pytest.approx(
        (noise.exp() > 2)[tensors["tool_mask"].bool()].float().mean().item(), abs=1e-6
    )


def test_without_importance_nothing_changes_and_nothing_is_logged(tmp_path, tokenizer):
    trajectories = make_trajectories(2, random.Random(2))
    batch = ScoredBatch(trajectories, [1.0, -1.0], {})
    trainer = make_trainer(tmp_path, tokenizer, batch, None)
    loss_and_gradients(trainer, score(trainer, 2), trainer._compute_loss)
    assert not any(name.startswith("importance/") for name in logged(trainer))


def test_trl_reads_the_advantages_after_the_log_probabilities():
    """The weights are put into them in between."""
    import inspect

    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert source.index("_get_per_token_logps_and_entropies(") < source.index('inputs["advantages"]')


def test_an_episode_that_is_not_trained_has_no_part_in_the_weights(tmp_path, tokenizer):
    trajectories = make_trajectories(2, random.Random(3))
    stale = [
        dataclasses.replace(turn, logprobs=tuple(value - 5 for value in turn.logprobs))
        for turn in trajectories[1].turns
    ]
    trajectories[1] = dataclasses.replace(trajectories[1], turns=tuple(stale))
    batch = ScoredBatch(trajectories, [1.0, 0.0], {}, [True, False])
    trainer = make_trainer(tmp_path, tokenizer, batch, ("mask", 1e6))
    loss_and_gradients(trainer, score(trainer, 2), trainer._compute_loss)
    alone = ScoredBatch(trajectories[:1] * 2, [1.0, 1.0], {})
    twice = make_trainer(tmp_path, tokenizer, alone, ("mask", 1e6))
    loss_and_gradients(twice, score(twice, 2), twice._compute_loss)
    means = [logged(t)["importance/mean"] for t in (trainer, twice)]
    assert means[0] == pytest.approx(means[1], rel=1e-5)
