"""A run stops when its engines sample without the adapter, and only then."""

import dataclasses
import random

import pytest
import torch
from trainers import likelihoods, make_policy, make_trainer, make_trajectories, sampled_earlier

from agentrl.training.proof import Evidence, WeightsNotUsed
from agentrl.training.sampling import ScoredBatch


def sampled_by(trainer, trajectories):
    """The episodes as the trainer's present policy samples them."""
    return sampled_earlier(trajectories, likelihoods(trainer, trajectories), [[0.0] * 3] * len(trajectories))


def undecided(tmp_path, tokenizer, policy=None):
    """A trainer whose episodes so far prove nothing."""
    trainer = make_trainer(tmp_path, tokenizer, None, policy)
    trainer._proves_weights = lambda batch, newest: False
    return trainer


def test_rollouts_of_the_model_without_its_adapter_stop_the_run(tmp_path, tokenizer):
    trajectories = make_trajectories(6, random.Random(1))
    engine = undecided(tmp_path, tokenizer)
    with engine.model.disable_adapter():
        sampled = sampled_by(engine, trajectories)
    batch = ScoredBatch(sampled, [1.0, -1.0] * 3, {})
    with pytest.raises(
        WeightsNotUsed, match=r"do not use the trained weights: .* differs by .* nats a token from the untrained model"
    ):
        make_trainer(tmp_path, tokenizer, batch).train()


def test_once_it_is_proven_that_the_weights_are_used_nothing_more_is_computed(tmp_path, tokenizer):
    trajectories = make_trajectories(6, random.Random(2))
    batch = ScoredBatch(sampled_by(undecided(tmp_path, tokenizer), trajectories), [1.0, -1.0] * 3, {})
    trainer = make_trainer(tmp_path, tokenizer, batch)
    trainer.whole_batch(batch)
    trainer._proves_weights = lambda whole, newest: pytest.fail("it is proven")
    trainer.whole_batch(batch)


def test_an_adapter_that_changes_nothing_yet_proves_nothing(tmp_path, tokenizer):
    policy = make_policy()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    trajectories = make_trajectories(4, random.Random(3))
    batch = ScoredBatch(sampled_by(undecided(tmp_path, tokenizer, policy), trajectories), [1.0, -1.0] * 2, {})
    trainer = make_trainer(tmp_path, tokenizer, batch, policy)
    trainer.train()
    assert not trainer._weights_are_used


def test_rollouts_of_older_weights_prove_nothing(tmp_path, tokenizer):
    """The first weights of a fresh adapter are those of the model without one."""
    trajectories = make_trajectories(4, random.Random(4))
    engine = undecided(tmp_path, tokenizer)
    with engine.model.disable_adapter():
        sampled = sampled_by(engine, trajectories)
    batches = [[with_version(t, 0) for t in trajectories], [with_version(t, 0) for t in sampled]]
    trainer = make_trainer(tmp_path, tokenizer, None, max_steps=2)
    trainer._sample = lambda: ScoredBatch(batches.pop(0), [1.0, -1.0] * 2, {})
    trainer.train()
    assert not trainer._weights_are_used

    batches = [[with_version(t, 0) for t in trajectories], [with_version(t, 1) for t in sampled]]
    trainer = make_trainer(tmp_path, tokenizer, None, max_steps=2)
    trainer._sample = lambda: ScoredBatch(batches.pop(0), [1.0, -1.0] * 2, {})
    with pytest.raises(WeightsNotUsed):
        trainer.train()


def with_version(trajectory, version):
    turns = tuple(dataclasses.replace(turn, adapter_version=version) for turn in trajectory.turns)
    return dataclasses.replace(trajectory, turns=turns)


@pytest.mark.parametrize(
    ("effect", "noise", "verdict"), [(0.1, 0.01, True), (0.01, 0.05, False), (1e-6, 0.0, False), (0.1, 0.0, True)]
)
def test_noise_between_engine_and_trainer_decides_nothing(effect, noise, verdict):
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn(4000, generator=rng)
    adapted = plain + effect * torch.randn(4000, generator=rng).sign()
    sampled = adapted + noise * torch.randn(4000, generator=rng)
    assert Evidence.of(sampled, adapted, plain).proves_use() == verdict
