"""With `model.lora: null` all weights of the model are trained, as TRL's own pass trains them."""

import random

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from trainers import (
    VOCABULARY,
    likelihoods,
    loss_and_gradients,
    make_trainer,
    make_trajectories,
    sampled_earlier,
    trls_loss_and_gradients,
)
from transformers import AutoModelForCausalLM

from agentrl.adapters import is_model
from agentrl.config import ConfigError, parse_config
from agentrl.training.batch import Minibatch
from agentrl.training.policy import engine_files, frozen_copy, load_policy, restore_policy, save_policy, saved_files
from agentrl.training.proof import WeightsNotUsed, require_agreement
from agentrl.training.sampling import ScoredBatch
from agentrl.training.settings import LOSSES


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    tiny_llama(
        VOCABULARY, hidden=32, max_position_embeddings=512, tie_word_embeddings=request.param, initializer_range=0.1
    ).save_pretrained(made)
    return made


def config_of(folder, dtype="float32", **training):
    return parse_config(
        {
            "name": "whole",
            "device": "cpu" if dtype == "float32" else "cuda",
            "model": {"path": str(folder), "dtype": dtype, "lora": None},
            "training": {"steps": 1} | training,
        },
        source="test",
    )


def policy_of(folder, **settings):
    return load_policy(config_of(folder, **settings), str(folder))


def changed(policy):
    """The policy after some training, here drawn at random."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def trainer_of(tmp_path, tokenizer, folder, batch, **settings):
    policy = policy_of(folder)
    reference = frozen_copy(config_of(folder, kl={"coefficient": settings.get("beta", 0.0)}), policy)
    return make_trainer(tmp_path, tokenizer, batch, policy, reference=reference, prove_weights=False, **settings)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_of_all_weights_equal_those_of_trls_padded_pass(tmp_path, tokenizer, folder, loss):
    rng = random.Random(1)
    trajectories = make_trajectories(5, rng)
    batch = ScoredBatch(trajectories, [rng.gauss(0, 1) for _ in trajectories], {})
    settings = {"loss": loss, "beta": 0.1, "epsilon_high": 5.0 if loss == "cispo" else 0.28, "delta": 1.6}
    trainer = trainer_of(tmp_path, tokenizer, folder, batch, tokens=90, **settings)
    changed(trainer.model)
    whole = trainer.whole_batch(batch)
    noise = torch.randn(whole.own.shape, generator=torch.Generator().manual_seed(2)) * 0.05
    whole.tensors["old_per_token_logps"] = (likelihoods(trainer, trajectories) + noise) * whole.own

    plain = changed(policy_of(folder))
    expected_loss, expected = trls_loss_and_gradients(tmp_path, tokenizer, whole, plain, **settings)
    found_loss, found = loss_and_gradients(trainer, whole)
    assert found.numel() == sum(parameter.numel() for parameter in plain.parameters())
    assert expected.norm() > 0
    assert found_loss == pytest.approx(expected_loss, abs=1e-5, rel=1e-5)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("packing", ["prefix_tree", "episodes"])
def test_weights_in_fp32_that_compute_in_bf16_give_packs_the_gradients_of_single_episodes(
    tmp_path, tokenizer, folder, packing
):
    trajectories = make_trajectories(6, random.Random(2))
    batch = ScoredBatch(trajectories, [1.0, -1.0, 0.5, -2.0, 1.0, 0.3], {})
    found = []
    for chosen, dtype in (("none", torch.float32), ("none", torch.bfloat16), (packing, torch.bfloat16)):
        trainer = trainer_of(tmp_path, tokenizer, folder, batch, tokens=90, packing=chosen, dtype=dtype)
        found.append(loss_and_gradients(trainer, trainer.whole_batch(batch))[1])
        assert found[-1].dtype == torch.float32
    exact, alone, packed = found
    rounding = (alone - exact).norm()
    assert 0 < rounding < 0.05 * exact.norm()
    assert (packed - exact).norm() < 2 * rounding


def test_the_reference_of_the_kl_term_stays_the_model_that_training_began_with(tmp_path, tokenizer, folder):
    trajectories = make_trajectories(3, random.Random(3))
    batch = ScoredBatch(trajectories, [1.0, -1.0, 0.5], {})
    trainer = trainer_of(tmp_path, tokenizer, folder, batch, beta=0.1)
    before = likelihoods(trainer, trajectories)
    changed(trainer.model)
    found = trainer.whole_batch(batch).tensors["ref_per_token_logps"]
    torch.testing.assert_close(found, before)
    assert (likelihoods(trainer, trajectories) - before).abs().max() > 0.1


def test_a_kl_term_needs_a_reference(tmp_path, tokenizer, folder):
    with pytest.raises(ValueError, match="needs a reference"):
        make_trainer(tmp_path, tokenizer, None, policy_of(folder), beta=0.1)


def test_a_policy_that_is_saved_and_restored_is_the_same_to_the_bit(tmp_path, folder):
    policy = changed(policy_of(folder))
    save_policy(policy, tmp_path)
    again = policy_of(folder)
    restore_policy(again, tmp_path)
    weights = policy.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    tied = policy.config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied, "tied weights are written once"
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_a_policy_is_published_in_the_precision_of_engines_and_saved_in_that_of_training(tmp_path, folder):
    policy = changed(policy_of(folder, dtype="bfloat16"))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    files = engine_files(config_of(folder, dtype="bfloat16"), policy)
    assert is_model(files)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    published = load_file(tmp_path / "model.safetensors")
    save_policy(policy, tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    assert published.keys() == kept.keys()
    for name, tensor in kept.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(published[name], tensor.bfloat16())
    saved = saved_files(config_of(folder, dtype="bfloat16"), tmp_path)
    assert saved["model.safetensors"].tobytes() == (tmp_path / "model.safetensors").read_bytes()


def test_any_reader_of_transformers_reads_what_engines_get(tmp_path, folder):
    policy = changed(policy_of(folder))
    for name, content in engine_files(config_of(folder), policy).items():
        (tmp_path / name).write_bytes(content)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, policy(ids).logits)


def sampled_by(trainer, trajectories):
    return sampled_earlier(trajectories, likelihoods(trainer, trajectories), [[0.0] * 3] * len(trajectories))


def test_with_a_reference_engines_that_still_have_its_weights_are_found(tmp_path, tokenizer, folder):
    trajectories = make_trajectories(4, random.Random(4))
    trainer = trainer_of(tmp_path, tokenizer, folder, None, beta=0.1)
    began = trainer.whole_batch(ScoredBatch(sampled_by(trainer, trajectories), [1.0] * 4, {}))
    changed(trainer.model)
    now = trainer.whole_batch(ScoredBatch(sampled_by(trainer, trajectories), [1.0] * 4, {}))
    newest = torch.ones(4, dtype=torch.bool)
    assert trainer._proves_weights(now, newest)
    with pytest.raises(WeightsNotUsed, match="from the untrained model"):
        trainer._proves_weights(began, newest)
    assert not trainer._proves_weights(began, ~newest), "older weights prove nothing"


def test_without_a_reference_engines_must_agree_with_the_trainer_in_each_batch(tmp_path, tokenizer, folder):
    trajectories = make_trajectories(4, random.Random(4))
    trainer = trainer_of(tmp_path, tokenizer, folder, None)
    newest = torch.ones(4, dtype=torch.bool)
    batch = trainer.whole_batch(ScoredBatch(sampled_by(trainer, trajectories), [1.0] * 4, {}))
    assert not trainer._proves_weights(batch, newest), "one agreement proves nothing"
    changed(trainer.model)
    with pytest.raises(
        WeightsNotUsed, match=r"log-probabilities differ by .* nats a token, and rounding explains 0\.02"
    ):
        trainer._proves_weights(Minibatch(batch.tensors, batch.runs), newest)


def test_more_may_be_rounding_in_bf16_than_in_fp32():
    sampled = torch.zeros(100)
    require_agreement(sampled, sampled + 0.01, torch.float32)
    require_agreement(sampled, sampled + 0.1, torch.bfloat16)
    with pytest.raises(WeightsNotUsed):
        require_agreement(sampled, sampled + 0.1, torch.float32)
    with pytest.raises(WeightsNotUsed):
        require_agreement(sampled, sampled + 0.5, torch.bfloat16)


def test_an_adapter_to_start_from_needs_an_adapter_to_train(folder):
    tree = config_of(folder).model_dump()
    tree["model"]["adapter"] = "owner/adapter"
    with pytest.raises(ConfigError, match="merge the adapter into the model first"):
        parse_config(tree, source="test")


def test_demonstrations_train_an_adapter_alone(folder):
    tree = config_of(folder).model_dump()
    tree["warmstart"] = {"sources": [{"questions": "a", "index": "b", "count": 1}]}
    with pytest.raises(ConfigError, match=r"warmstart trains an adapter, and model\.lora is null"):
        parse_config(tree, source="test")
