"""Importance weights make rollouts count by how likely the trained policy is to have sampled them."""

import math
import random

import pytest
import torch
from trainers import likelihoods, logged, loss_and_gradients, make_trainer, make_trajectories, trls_loss_and_gradients

from agentrl.training.importance import importance_weights
from agentrl.training.sampling import ScoredBatch
from agentrl.training.updates import Additions, Updates


def test_weights_are_cut_or_masked_at_the_cap():
    ratios = torch.tensor([[0.1, 0.6, 1.0, 1.9, 5.0]])
    sampler, own = torch.full((1, 5), -3.0), torch.ones(1, 5, dtype=torch.bool)
    for mode, expected in (("truncate", [0.1, 0.6, 1.0, 1.9, 2.0]), ("mask", [0.0, 0.6, 1.0, 1.9, 0.0])):
        found = importance_weights(ratios.log() + sampler, sampler, own, mode, 2.0)
        torch.testing.assert_close(found, torch.tensor([expected]))


def test_an_episode_is_masked_by_the_mean_of_its_own_tokens():
    sampler = torch.full((3, 3), -3.0)
    change = torch.tensor([[1.5, 0.3, 0.0], [0.1, 0.1, 9.0], [-1.0, -1.0, -1.0]])
    own = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    found = importance_weights(sampler + change, sampler, own, "mask_episode", 2.0)
    assert found[0].tolist() == pytest.approx([2.0, math.exp(0.3), 1.0])
    assert found[1, :2].tolist() == pytest.approx([math.exp(0.1)] * 2)
    assert found[2].tolist() == [0.0] * 3


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo", "gspo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_gradient_is_that_of_advantages_times_weights(tmp_path, tokenizer, loss, beta, epochs):
    """With several updates the weights are those of the policy before the first, and the clip acts beside them."""
    trajectories = make_trajectories(4, random.Random(1))
    batch = ScoredBatch(trajectories, [1.0, -0.5, 0.3, -1.0], {})
    settings = {"loss": loss, "beta": beta}
    weighing = make_trainer(
        tmp_path,
        tokenizer,
        batch,
        additions=Additions(importance=("truncate", 2.0)),
        updates=Updates(group_size=2, epochs=epochs),
        **settings,
    )
    whole = weighing.whole_batch(batch)
    logps = likelihoods(weighing, trajectories)
    # The sampler was of another mind about each token: ratios from 0.3 to 3.
    noise = torch.empty_like(logps).uniform_(-math.log(3), math.log(3), generator=torch.Generator().manual_seed(0))
    whole.tensors["sampling_per_token_logps"] = torch.where(whole.own, logps - noise, 0.0)
    if epochs > 1:
        whole.tensors["old_per_token_logps"] = torch.where(whole.own, logps + 0.3, 0.0)
        noise = noise + 0.3
    found = loss_and_gradients(weighing, whole)

    advantages = whole.tensors["advantages"][:, None]
    unweighted = trls_loss_and_gradients(tmp_path, tokenizer, whole, **settings)
    whole.tensors["advantages"] = advantages * noise.exp().clamp(max=2.0)
    expected = trls_loss_and_gradients(tmp_path, tokenizer, whole, **settings)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert ((found[1] - expected[1]).norm() / expected[1].norm()).item() < 1e-5
    assert ((found[1] - unweighted[1]).norm() / unweighted[1].norm()).item() > 0.05
    assert logged(weighing)["importance/cut_share"] == pytest.approx(
        (noise.exp() > 2)[whole.own].float().mean().item(), abs=1e-6
    )


def test_without_importance_nothing_is_logged(tmp_path, tokenizer):
    batch = ScoredBatch(make_trajectories(2, random.Random(2)), [1.0, -1.0], {})
    trainer = make_trainer(tmp_path, tokenizer, batch)
    loss_and_gradients(trainer, trainer.whole_batch(batch))
    assert not any(name.startswith("importance/") for name in logged(trainer))


def test_an_episode_that_is_not_trained_has_no_part_in_the_weights(tmp_path, tokenizer):
    trajectories = make_trajectories(2, random.Random(3))
    means = []
    for batch in (
        ScoredBatch(trajectories, [1.0, 1.0], {}, [True, False]),
        ScoredBatch(trajectories[:1] * 2, [1.0, 1.0], {}),
    ):
        trainer = make_trainer(tmp_path, tokenizer, batch, additions=Additions(importance=("mask", 1e6)))
        loss_and_gradients(trainer, trainer.whole_batch(batch))
        means.append(logged(trainer)["importance/mean"])
    assert means[0] == pytest.approx(means[1], rel=1e-5)
