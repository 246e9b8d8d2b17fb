"""The optimizer that a config names: AdamW as TRL has it, AdamW in 8 bits, and Muon for matrices with AdamW for the rest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from torch.optim.lr_scheduler import LambdaLR
from trl import GRPOConfig

from agentrl.config import parse_config
from agentrl.training.checkpoints import set_rate
from agentrl.training.optimizers import MuonAndAdamW, make_muon
from agentrl.training.settings import run_optimizer, run_settings

MUON = {"rate": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def make_config(optimizer, device="cpu", **training):
    return parse_config(
        {
            "name": "t",
            "device": device,
            "model": {"path": "x/y"},
            "training": {"steps": 3, "optimizer": optimizer} | training,
        },
        source="test",
    )


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_steps(optimizer, weights, count, seed):
    """Take some steps with gradients that are drawn."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def test_the_default_optimizer_is_trls_own(tmp_path):
    found = run_settings(make_config({}), tmp_path)
    expected = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    for name in ("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"):
        assert getattr(found, name) == getattr(expected, name)
    assert run_optimizer(make_config({})) is None


def test_what_the_config_says_reaches_trl(tmp_path):
    settings = {"name": "adamw_8bit", "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}
    # TRL itself wants to see a card for device cuda.
    found = run_settings(make_config(settings, "cuda").model_copy(update={"device": "cpu"}), tmp_path)
    assert found.optim == "adamw_8bit"
    assert (found.adam_beta1, found.adam_beta2, found.adam_epsilon, found.weight_decay) == (0.8, 0.95, 1e-6, 0.1)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 99))
def test_muon_moves_a_matrix_by_its_gradient_made_orthogonal_as_far_as_adamw_would(rows, columns, seed):
    (weight,) = parameters((rows, columns), seed=seed)
    before = weight.detach().clone()
    optimizer = MuonAndAdamW([weight], [], **MUON)
    take_steps(optimizer, [weight], 1, seed + 1)
    change = before - weight.detach()
    left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
    size = MUON["rate"] * 0.2 * max(rows, columns) ** 0.5
    # Its five rounds in bfloat16 bring singular values near 1, and leave the directions.
    along = torch.diagonal(left.T @ change @ right.T) / size
    across = left.T @ change @ right.T / size - torch.diag(along)
    assert across.abs().max() < 0.1
    assert along.max() < 1.3
    kept = torch.linalg.svdvals(weight.grad / weight.grad.norm()) > 0.05
    assert along[kept].min() > 0.5
    if kept.all():
        assert change.square().mean().sqrt().item() == pytest.approx(0.2 * MUON["rate"], rel=0.5)


def test_what_is_no_inner_matrix_moves_as_under_adamw():
    model, plain = tiny_llama(50, hidden=16), tiny_llama(50, hidden=16)
    settings = {**MUON, "weight_decay": 0.1}
    optimizer = make_muon(model, **settings)
    outer = {n for n, p in model.named_parameters() if p.dim() < 2 or "embed_tokens" in n or "lm_head" in n}
    decayed = [p for n, p in plain.named_parameters() if n in outer and p.dim() > 1]
    vectors = [p for n, p in plain.named_parameters() if n in outer and p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=MUON["rate"])
    take_steps(optimizer, list(model.parameters()), 3, 5)
    take_steps(adamw, list(plain.parameters()), 3, 5)
    found, expected = dict(model.named_parameters()), dict(plain.named_parameters())
    assert len(outer) == 2 + 5
    for name in found:
        assert found[name].equal(expected[name]) == (name in outer), name


def test_both_factors_of_an_adapter_are_muons_and_nothing_else_is_trained():
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    policy = get_peft_model(tiny_llama(50, hidden=16), lora)
    muon, weights, vectors = make_muon(policy, **MUON).param_groups
    named = {id(parameter): name for name, parameter in policy.named_parameters()}
    assert {named[id(p)].rpartition("self_attn.")[2] for p in muon["params"]} == {
        "q_proj.lora_A.default.weight",
        "q_proj.lora_B.default.weight",
    }
    assert len(muon["params"]) == 4
    assert all("lora_embedding" in named[id(p)] for p in weights["params"])
    assert len(weights["params"]) == 2
    assert vectors["params"] == []


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_a_state_that_was_saved_and_loaded_goes_on_as_if_nothing_had_happened(before, after, seed):
    shapes = [(6, 4), (3, 8), (5, 2), (7,)]
    whole, first, second = (parameters(*shapes) for _ in range(3))
    unbroken = MuonAndAdamW(whole[:2], whole[2:], **MUON)
    take_steps(unbroken, whole, before, seed)
    take_steps(unbroken, whole, after, seed + 1)

    cut = MuonAndAdamW(first[:2], first[2:], **MUON)
    take_steps(cut, first, before, seed)
    resumed = MuonAndAdamW(second[:2], second[2:], **MUON)
    for to, come in zip(second, first, strict=True):
        to.data.copy_(come.data)
    resumed.load_state_dict(cut.state_dict())
    take_steps(resumed, second, after, seed + 1)
    assert all(one.equal(other) for one, other in zip(whole, second, strict=True))


def test_a_rate_that_is_set_after_a_state_was_loaded_is_that_of_both():
    changes = []
    for rate in (1e-2, 5e-3):
        weights = parameters((6, 4), (5, 2), (7,))
        optimizer = MuonAndAdamW(weights[:1], weights[1:], **MUON)
        optimizer.load_state_dict(MuonAndAdamW(weights[:1], weights[1:], **MUON).state_dict())
        set_rate(optimizer, LambdaLR(optimizer, lambda step: 1.0), rate)
        before = [weight.detach().clone() for weight in weights]
        take_steps(optimizer, weights, 1, 3)
        changes.append([weight.detach() - old for weight, old in zip(weights, before, strict=True)])
    for whole, half in zip(*changes, strict=True):
        torch.testing.assert_close(half, whole / 2, rtol=1e-3, atol=1e-6)
