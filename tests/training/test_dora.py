"""An adapter that engines cannot load is trained and saved as one, and engines get the model with it merged in."""

import json

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from agentrl.adapters import adapter_folder, check_tensors
from agentrl.config import ConfigError, parse_config
from agentrl.models import ModelError
from agentrl.training.adapter import merged_weights
from agentrl.training.policy import engine_files, load_policy, save_policy, saved_files
from agentrl.types import AgentRLError

IDS = torch.arange(8)[None]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(64, hidden=16, tie_word_embeddings=request.param, initializer_range=0.2).save_pretrained(folder)
    return str(folder)


def config_of(model, dtype="float32", adapter=None, **lora):
    section = {
        "path": model,
        "dtype": dtype,
        "adapter": adapter,
        "lora": {"rank": 4, "alpha": 8.0, "dora": True} | lora,
    }
    device = "cpu" if dtype == "float32" else "cuda"
    return parse_config({"name": "dora", "device": device, "model": section}, source="test")


def trained(config, model):
    """A policy after some training, here drawn at random."""
    policy, generator = load_policy(config, model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return policy


def test_layers_whose_weights_are_the_other_way_round_change_nothing_at_first_either(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    policy = load_policy(config_of(str(tmp_path)), str(tmp_path)).eval()
    torch.testing.assert_close(policy(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=1e-5)


def written(files, folder):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_changes_nothing(model, dtype):
    """To the last bit in bf16, where PEFT itself would round the lengths of the rows."""
    config = config_of(model, dtype)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).state_dict()
    policy = load_policy(config, model)
    for name, tensor in merged_weights(policy).items():
        if dtype == "float32":
            torch.testing.assert_close(tensor, base[name], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(tensor.bfloat16(), base[name]), name


def test_engines_get_the_model_with_the_adapter_merged_and_the_policy_stays_as_it_is(model, tmp_path):
    policy = trained(config_of(model), model)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with torch.no_grad():
        expected = policy(IDS).logits
        merged = written(engine_files(config_of(model), policy), tmp_path)
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(policy(IDS).logits, expected)
        with policy.disable_adapter():
            assert (policy(IDS).logits - expected).abs().max() > 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


def test_what_is_saved_is_an_adapter_that_training_and_evaluation_begin_with(model, tmp_path):
    policy = trained(config_of(model), model)
    save_policy(policy, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["use_dora"] is True
    start = config_of(model, adapter=str(tmp_path / "adapter"))
    check_tensors(adapter_folder(start), model)
    (tmp_path / "merged").mkdir()
    with torch.no_grad():
        again = load_policy(start, model)
        assert torch.equal(again(IDS).logits, policy(IDS).logits)
        merged = written(saved_files(config_of(model), tmp_path / "adapter"), tmp_path / "merged")
        torch.testing.assert_close(merged(IDS).logits, policy(IDS).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_taken_for_what_the_config_says_that_it_is(model, tmp_path):
    for name, dora in (("dora", True), ("plain", False)):
        save_policy(load_policy(config_of(model, dora=dora), model), tmp_path / name)
    with pytest.raises(ModelError, match=r"use_dora True is more than plain LoRA.*set model\.lora\.dora to true"):
        adapter_folder(config_of(model, adapter=str(tmp_path / "dora"), dora=False))
    with pytest.raises(ConfigError, match=r"model\.lora\.dora True differs from the dora False"):
        adapter_folder(config_of(model, adapter=str(tmp_path / "plain")))


def test_one_of_two_weights_that_the_model_ties_cannot_be_merged(model):
    policy = load_policy(config_of(model, target_modules=["q_proj", "lm_head"]), model)
    if policy.get_base_model().config.tie_word_embeddings:
        with pytest.raises(AgentRLError, match=r"the adapter changes lm_head, .* leave it out of model\.lora\.target"):
            merged_weights(policy)
    else:
        assert merged_weights(policy)["lm_head.weight"].shape == (64, 16)


def test_a_row_without_a_length_is_refused(tmp_path):
    made = tiny_llama(64, hidden=16)
    with torch.no_grad():
        made.model.layers[1].self_attn.q_proj.weight[3] = 0
    made.save_pretrained(tmp_path)
    with pytest.raises(
        AgentRLError, match=r"1 rows of model\.layers\.1\.self_attn\.q_proj are zeros; leave the layer out"
    ):
        load_policy(config_of(str(tmp_path)), str(tmp_path))
    load_policy(config_of(str(tmp_path), target_modules=["v_proj", "up_proj"]), str(tmp_path))
