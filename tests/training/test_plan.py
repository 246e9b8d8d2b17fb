"""What a run will take is said before it starts, and is what it then takes."""

import pytest
import torch
from safetensors.torch import load
from test_session import Engines, make_config, model, run  # noqa: F401, a fixture

from agentrl.runs import RunFolder
from agentrl.training.plan import adapter_bytes


def changed(config, **settings):
    return config.model_copy(update={"model": config.model.model_copy(update=settings)})


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_the_size_of_a_fresh_adapter_is_that_of_its_weights(model, tmp_path, targets):  # noqa: F811
    config = make_config(model, tmp_path, steps=1)
    config = changed(config, lora=config.model.lora.model_copy(update={"target_modules": targets}))
    run(config, Engines())
    written = RunFolder(config.folder).adapter / "adapter_model.safetensors"
    # The file has a header beside the weights.
    assert 0 < written.stat().st_size - adapter_bytes(config) < 10_000
    assert 0 < written.stat().st_size - adapter_bytes(changed(config, adapter=str(written.parent))) < 10_000


def test_a_checkpoint_takes_three_times_the_adapter_with_a_reference_as_well(model, tmp_path):  # noqa: F811
    config = make_config(model, tmp_path, steps=1, checkpoint_every=1, kl_coefficient=0.1)
    run(config, Engines())
    checkpoint = RunFolder(config.folder).latest_checkpoint()
    adapters = list(checkpoint.rglob("*.safetensors"))
    assert [file.name for file in adapters] == ["adapter_model.safetensors"]
    weights = sum(tensor.numel() for tensor in load(adapters[0].read_bytes()).values())
    moments = torch.load(checkpoint / "optimizer.pt")["state"].values()
    # Beside the moments of each weight stands a count of steps.
    kept = sum(tensor.numel() for moment in moments for tensor in moment.values() if tensor.dim())
    assert 4 * (weights + kept) == 3 * adapter_bytes(config)


def test_the_size_is_unknown_while_a_model_of_the_hub_is_not_on_this_disk(model, tmp_path):  # noqa: F811
    assert adapter_bytes(changed(make_config(model, tmp_path), path="nobody/has-this-model")) is None
