"""The trained adapter is packed in memory, and PEFT reads what is packed."""

import json
import socket

import pytest
import torch
from safetensors.torch import load

from agentrl.adapters import CONFIG, WEIGHTS, check_tensors, read_adapter
from agentrl.config import parse_config
from agentrl.training.adapter import adapter_files, save_adapter
from agentrl.training.policy import load_policy


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tiny import tiny_llama

    folder = tmp_path_factory.mktemp("model")
    tiny_llama(64, hidden=16).save_pretrained(folder)
    return str(folder)


def policy_of(model, **settings):
    lora = {"rank": 4, "alpha": 8.0} | settings.pop("lora", {})
    asked = {"path": "some/model", "dtype": "float32", "lora": lora} | settings
    # bf16 is for GPUs alone; what is loaded stays on the CPU.
    device = "cpu" if asked["dtype"] == "float32" else "cuda"
    return load_policy(parse_config({"name": "small", "device": device, "model": asked}, source="test"), model)


@pytest.fixture
def offline(monkeypatch):
    """Refuse every connection and name resolution, and keep what was asked for."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("there is no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]])
def test_packing_an_adapter_of_a_hub_model_asks_no_hub(model, offline, tmp_path, targets):
    policy = policy_of(model, lora={"target_modules": targets})
    adapter_files(policy)
    save_adapter(policy, tmp_path / "adapter")
    assert offline == []


def test_a_packed_adapter_is_the_policy_when_it_is_loaded_again(model, tmp_path):
    policy = policy_of(model)
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(policy, tmp_path)
    check_tensors(tmp_path, model)
    again = policy_of(model, adapter=str(tmp_path))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, policy(ids).logits)
        with policy.disable_adapter():
            assert not torch.equal(again(ids).logits, policy(ids).logits)


def test_a_packed_adapter_names_the_model_of_the_config_and_not_a_folder_of_this_machine(model, tmp_path):
    save_adapter(policy_of(model), tmp_path)
    for policy in (policy_of(model), policy_of(model, adapter=str(tmp_path))):
        settings = json.loads(adapter_files(policy)["adapter_config.json"])
        assert settings["base_model_name_or_path"] == "some/model"


def test_a_policy_in_bf16_is_published_in_bf16_and_kept_in_fp32(model, tmp_path):
    policy = policy_of(model, dtype="bfloat16")
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(policy, tmp_path)
    published, kept = load(adapter_files(policy)[WEIGHTS]), load((tmp_path / WEIGHTS).read_bytes())
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert published.keys() == kept.keys()
    assert all(torch.equal(published[name], kept[name].bfloat16()) for name in kept)
    assert any(not torch.equal(published[name].float(), kept[name]) for name in kept)


def test_the_same_policy_is_packed_into_the_same_bytes(model, tmp_path):
    policy = policy_of(model)
    save_adapter(policy, tmp_path)
    assert read_adapter(tmp_path) == adapter_files(policy)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (9, 6.0)])
def test_an_adapter_is_scaled_by_its_rank_or_by_the_root_of_it(model, rank, alpha):
    for rslora, expected in ((False, alpha / rank), (True, alpha / rank**0.5)):
        policy = policy_of(model, lora={"rank": rank, "alpha": alpha, "rslora": rslora})
        layers = [module for module in policy.modules() if getattr(module, "lora_A", None)]
        assert [layer.scaling["default"] for layer in layers] == pytest.approx([expected] * len(layers))
        assert json.loads(adapter_files(policy)[CONFIG])["use_rslora"] is rslora


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_vllm_scales_an_adapter_as_the_trainer_does(model, rslora):
    from vllm.lora.peft_helper import PEFTHelper

    policy = policy_of(model, lora={"rank": 9, "alpha": 6.0, "rslora": rslora})
    (scaling,) = {module.scaling["default"] for module in policy.modules() if getattr(module, "lora_A", None)}
    read = PEFTHelper.from_dict(json.loads(adapter_files(policy)[CONFIG]))
    assert read.vllm_lora_scaling_factor == pytest.approx(scaling)


def test_the_base_model_is_loaded_in_4_bits_where_the_config_says_so(model, monkeypatch):
    """The weights themselves take a card; here they are loaded as they are."""
    import transformers

    asked, load = [], transformers.AutoModelForCausalLM.from_pretrained

    def loaded(folder, **settings):
        asked.append(settings.pop("quantization_config", None))
        return load(folder, **settings)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    policy_of(model)
    policy_of(model, dtype="bfloat16", quantization="nf4")
    assert asked[0] is None
    assert asked[1].bnb_4bit_quant_type == "nf4"
