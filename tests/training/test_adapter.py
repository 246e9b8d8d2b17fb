"""The adapter that training starts from is what the config describes."""

import json

import pytest

from agentrl.config import ConfigError, parse_config
from agentrl.models import ModelError
from agentrl.training.adapter import adapter_folder

MADE = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["v_proj", "q_proj"]}


def folder_of(tmp_path, made=MADE, **lora):
    (tmp_path / "adapter_config.json").write_text(json.dumps(made))
    model = {"path": "some/model", "adapter": str(tmp_path), "lora": {"rank": 4, "alpha": 8.0} | lora}
    return adapter_folder(parse_config({"name": "small", "model": model}, source="test"))


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "v_proj"]}])
def test_an_adapter_that_is_what_the_config_says_is_taken(tmp_path, lora):
    assert folder_of(tmp_path, **lora) == tmp_path


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "model.lora.rank 8 differs from the rank 4 of .*; set it to 4"),
        ({"alpha": 16.0}, "model.lora.alpha 16.0 differs from the alpha 8"),
        ({"dropout": 0.5}, "model.lora.dropout 0.5 differs from the dropout 0.0"),
        ({"target_modules": ["q_proj"]}, r"model.lora.target_modules \['q_proj'\] differs"),
    ],
)
def test_settings_that_the_adapter_does_not_have_are_refused(tmp_path, lora, message):
    with pytest.raises(ConfigError, match=message):
        folder_of(tmp_path, **lora)


def test_an_adapter_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ModelError, match="an adapter of type IA3; give one of type LORA"):
        folder_of(tmp_path, {"peft_type": "IA3"})
