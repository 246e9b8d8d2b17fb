"""agentrl's advantages against those that TRL itself computes from the same rewards."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama
from trl import GRPOConfig, GRPOTrainer

from agentrl.advantages import compute

GROUP, GROUPS = 4, 3
# TRL 1.16 divides by the sample standard deviation plus 1e-4.
TRLS_SETTINGS = {"ddof": 1, "eps": 1e-4}

random_rewards = np.random.default_rng(0).normal(size=GROUP * GROUPS)
REWARDS = {
    "random": random_rewards,
    "large": 1000.0 * random_rewards,
    "ties": np.array([0.1, 0.1, 0.7, 0.7] * GROUPS),
    "constant groups": np.repeat([0.0, 0.5, 1.0], GROUP),
    "binary": np.array([0, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0], dtype=np.float64),
    "binary with constant groups": np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0], dtype=np.float64),
}


@pytest.fixture(scope="module")
def trls_advantages(tokenizer, tmp_path_factory):
    """Run TRL's generate-and-score path on a model of a few thousand weights, with the given rewards for its text."""
    rewards = []
    model = tiny_llama(
        len(tokenizer),
        hidden=8,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda **columns: list(rewards),
        train_dataset=Dataset.from_dict({"prompt": ["Question: "]}),
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=GROUP * GROUPS,
            num_generations=GROUP,
            max_completion_length=2,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        ),
    )
    trainer.model.train()

    def run(values, scale):
        rewards[:] = values.tolist()
        trainer.scale_rewards = scale
        scored = trainer._generate_and_score_completions([{"prompt": "Question: "} for _ in values])
        return scored["advantages"].numpy()

    return run


def agentrls_advantages(rewards, **settings):
    count = np.arange(GROUP * GROUPS)
    # Strata that cut through the groups, so that they would show if they were used.
    return np.asarray(compute(rewards, groups=count // GROUP, strata=count % 2, **settings).values)


@pytest.mark.parametrize("name", REWARDS)
def test_alpha_0_equals_trls_own_group_normalised_advantages(trls_advantages, name):
    found = agentrls_advantages(REWARDS[name], alpha=0.0, **TRLS_SETTINGS)
    np.testing.assert_allclose(found, trls_advantages(REWARDS[name], "group"), rtol=1e-5, atol=1e-6)


def test_a_positive_alpha_is_told_apart(trls_advantages):
    found = agentrls_advantages(REWARDS["random"], alpha=0.5, **TRLS_SETTINGS)
    assert np.abs(found - trls_advantages(REWARDS["random"], "group")).max() > 0.1


@pytest.mark.parametrize("name", REWARDS)
def test_dr_grpo_equals_trls_own_advantages_without_scaling(trls_advantages, name):
    found = agentrls_advantages(REWARDS[name], estimator="dr_grpo")
    np.testing.assert_allclose(
        found, trls_advantages(REWARDS[name], "none"), rtol=1e-5, atol=1e-6 * max(1, np.abs(REWARDS[name]).max())
    )


def test_torch_rewards_give_the_same_advantages_as_numpy_rewards():
    rewards = REWARDS["random"]
    expected = agentrls_advantages(rewards, alpha=0.0, **TRLS_SETTINGS)
    np.testing.assert_array_equal(agentrls_advantages(torch.from_numpy(rewards), alpha=0.0, **TRLS_SETTINGS), expected)
