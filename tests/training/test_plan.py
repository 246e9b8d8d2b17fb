"""What a run will take is said before it starts, and is what it then takes."""

import pytest
import torch
from safetensors.torch import load
from test_session import Engines, make_config, model, run  # noqa: F401, a fixture

from agentrl.config import ConfigError, parse_config
from agentrl.runs import RunFolder
from agentrl.training.memory import checkpoint_bytes
from agentrl.training.plan import plan
from agentrl.training.run import Inputs, train
from agentrl.training.sizes import read_sizes

SERVER = {"kind": "http", "url": "http://127.0.0.1:9/retrieve"}


def changed(config, **settings):
    return config.model_copy(update={"model": config.model.model_copy(update=settings)})


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_the_size_of_a_fresh_adapter_is_that_of_its_weights(model, tmp_path, targets):  # noqa: F811
    config = make_config(model, tmp_path, steps=1)
    config = changed(config, lora=config.model.lora.model_copy(update={"target_modules": targets}))
    run(config, Engines())
    written = RunFolder(config.folder).adapter / "adapter_model.safetensors"
    # The file has a header beside the weights.
    for one in (config, changed(config, adapter=str(written.parent))):
        assert 0 < written.stat().st_size - 4 * read_sizes(one).trained < 10_000


def test_a_checkpoint_takes_what_is_planned_with_a_reference_as_well(model, tmp_path):  # noqa: F811
    config = make_config(model, tmp_path, steps=1, checkpoint_every=1, kl={"coefficient": 0.1})
    run(config, Engines())
    checkpoint = RunFolder(config.folder).latest_checkpoint()
    adapters = list(checkpoint.rglob("*.safetensors"))
    assert [file.name for file in adapters] == ["adapter_model.safetensors"]
    weights = sum(tensor.numel() for tensor in load(adapters[0].read_bytes()).values())
    moments = torch.load(checkpoint / "optimizer.pt")["state"].values()
    # Beside the moments of each weight stands a count of steps.
    kept = sum(tensor.numel() for moment in moments for tensor in moment.values() if tensor.dim())
    assert 4 * (weights + kept) == checkpoint_bytes(config, read_sizes(config))


def shown(table):
    """The rows of a plan by their first column."""
    names, texts = (list(column.cells) for column in table.columns)
    return dict(zip(names, texts, strict=True))


@pytest.fixture
def planned(model, tmp_path, monkeypatch):  # noqa: F811
    """Return the rows of the plan of a run on a card of so many bytes, None for a machine without one."""

    def make(card, device="cuda", **engine):
        tree = make_config(model, tmp_path, steps=1).model_dump() | {"device": device, "retriever": SERVER}
        tree["model"] |= {"dtype": "bfloat16" if device == "cuda" else "float32"}
        tree["engine"] |= engine
        monkeypatch.setattr("agentrl.training.plan.load_inputs", lambda config: Inputs([1], []))
        monkeypatch.setattr("agentrl.training.plan.card_bytes", lambda config: card)
        return shown(plan(parse_config(tree, "test")))

    return make


def test_a_plan_on_a_card_that_is_there_says_what_fits_on_it(planned):
    rows = planned(2**34)
    assert rows["GPUs"] == "2 (1 for engines, 0 for indexes, 1 for the trainer)"
    assert rows["memory of a card"] == "16.0 GiB"
    assert "for keys and values of" in rows["an engine"]
    assert rows["the trainer's room"].startswith("16.0 GiB, enough for about ")
    assert "engine.gpu_memory_utilization" not in rows


def test_a_plan_for_one_card_says_what_the_engines_may_take_of_it(planned):
    rows = planned(2**34, gpus=0.5, sleep=True)
    assert rows["GPUs"] == "1 (0.5 for engines, 0 for indexes, 0.5 for the trainer)"
    assert rows["engines"].endswith("which sleep while the trainer trains")
    assert rows["engine.gpu_memory_utilization"].startswith("0.42, and 0.9")


def test_a_plan_without_a_card_says_so_and_gives_the_rest(planned):
    rows = planned(None)
    assert rows["memory of a card"].startswith("not known")
    assert "the trainer's room" not in rows
    assert rows["the trainer"].startswith("about ")


def test_what_does_not_fit_is_refused_before_anything_starts(planned):
    with pytest.raises(ConfigError, match=r"the trainer needs about .* of a card of 300 MiB"):
        planned(300 * 2**20)


def test_a_plan_on_a_cpu_says_what_the_machine_has(planned):
    rows = planned(None, device="cpu")
    assert rows["GPUs"] == "none"
    assert rows["memory of the machine"].endswith("GiB")
    assert "at most 2.0 GiB for keys and values" in rows["an engine"]


def test_a_run_on_this_machines_cards_is_refused_where_it_does_not_fit(model, tmp_path, monkeypatch):  # noqa: F811
    tree = make_config(model, tmp_path, steps=1).model_dump() | {"device": "cuda"}
    monkeypatch.setattr("agentrl.training.run.check_device", lambda config: None)
    monkeypatch.setattr("agentrl.training.run.load_inputs", lambda config: Inputs([1], []))
    monkeypatch.setattr("agentrl.training.run.card_bytes", lambda config: 300 * 2**20)
    with pytest.raises(ConfigError, match="the trainer needs about"):
        train(parse_config(tree, "test"), resume=False, on_progress=print)
    assert not RunFolder(parse_config(tree, "test").folder).path.exists()
