"""What a config wants of bitsandbytes: how it is asked for, and that it is refused where the package is missing."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from agentrl.config import ConfigError, parse_config
from agentrl.quantization import check_quantization, for_transformers, for_vllm


def make_config(quantization=None, optimizer="adamw"):
    return parse_config(
        {
            "name": "t",
            "device": "cuda",
            "model": {"path": "x/y", "dtype": "bfloat16", "quantization": quantization},
            "training": {"steps": 1, "optimizer": {"name": optimizer}},
        },
        source="test",
    )


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Have these packages installed and no other; vllm may have a bitsandbytes of its own."""

    def install(*names, of_vllm=False):
        methods = tmp_path / "vllm" / "model_executor" / "layers" / "quantization"
        methods.mkdir(parents=True)
        if of_vllm:
            (methods / "bitsandbytes.py").touch()
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "vllm")])
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name in names else None)

    return install


def test_both_sides_are_asked_for_nf4_where_the_config_says_so():
    assert for_transformers(make_config()) is for_vllm(make_config()) is None
    found = for_transformers(make_config("nf4"))
    assert (found.load_in_4bit, found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16
    assert for_vllm(make_config("nf4")) == "bitsandbytes"


@pytest.mark.parametrize(
    ("quantization", "optimizer", "wanted"),
    [
        ("nf4", "adamw", "model.quantization nf4"),
        (None, "adamw_8bit", "training.optimizer.name adamw_8bit"),
        ("nf4", "adamw_8bit", "model.quantization nf4"),
    ],
)
def test_what_bitsandbytes_does_is_refused_where_it_is_missing(installed, quantization, optimizer, wanted):
    installed("vllm", of_vllm=True)
    with pytest.raises(ConfigError, match=rf"{wanted} needs the package bitsandbytes.*: pip install bitsandbytes"):
        check_quantization(make_config(quantization, optimizer), trains=True)


def test_a_vllm_without_bitsandbytes_needs_its_plug_in(installed):
    installed("bitsandbytes", "vllm")
    check_quantization(make_config(optimizer="adamw_8bit"), trains=True)
    with pytest.raises(ConfigError, match=r"bitsandbytes in vLLM.*: pip install vllm-bnb-plugin"):
        check_quantization(make_config("nf4"), trains=False)


@pytest.mark.parametrize(("others", "of_vllm"), [(["vllm_bnb_plugin"], False), ([], True)])
def test_nf4_is_taken_where_all_of_it_is_installed(installed, others, of_vllm):
    installed("bitsandbytes", "vllm", *others, of_vllm=of_vllm)
    check_quantization(make_config("nf4", "adamw_8bit"), trains=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nothing_is_needed_for_what_does_without(installed, optimizer):
    installed()
    check_quantization(make_config(optimizer=optimizer), trains=True)


def test_engines_alone_need_no_optimizer(installed):
    installed()
    check_quantization(make_config(optimizer="adamw_8bit"), trains=False)
