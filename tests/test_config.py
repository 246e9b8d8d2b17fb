"""Settings that cannot be meant are refused by name, and what is accepted survives a round trip."""

import os
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agentrl.config import ConfigError, load_config, packaged_configs, parse_config

SMALL = """
name: small
model: {path: some/model}
data:
  train: [{path: nq/train.jsonl}]
retriever: {index: indexes/demo}
training: {steps: 4}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return str(path)


def test_defaults_fill_what_is_not_said(small):
    config = load_config(small)
    assert (config.rollout.group_size, config.training.steps, config.rollout.workers) == (8, 4, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=8", "training.stepz: unknown key; did you mean steps?"),
        ("trainign.steps=8", "trainign: unknown key; did you mean training?"),
        ("data.train.0.wieght=2", "data.train.0.wieght: unknown key; did you mean weight?"),
        ("model.lora.ranks=8", "model.lora.ranks: unknown key; did you mean rank?"),
        ("retriever.kk=8", "retriever.kk: unknown key"),
        ("zzzz=8", "zzzz: unknown key"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(small, override, message):
    with pytest.raises(ConfigError) as raised:
        load_config(small, [override])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.steps=eight", "training.steps"),
        ("training.steps=2.5", "training.steps"),
        ('training.steps="8"', "training.steps"),
        ("training.steps=0", "training.steps"),
        ("seed=true", "seed"),
        ("name=a/b", "name"),
        ("device=tpu", "device"),
        ("data.train=nq.jsonl", "data.train"),
        ("retriever.cache_mib=much", "retriever.cache_mib"),
        ("agent.temperature=0", "agent.temperature"),
    ],
)
def test_a_wrong_type_or_value_is_named_with_what_was_given(small, override, key):
    with pytest.raises(ConfigError, match="1 problem") as raised:
        load_config(small, [override])
    assert f"  {key}: " in str(raised.value)
    assert "(got " in str(raised.value)


def test_every_problem_is_reported_at_once(small):
    with pytest.raises(ConfigError, match="3 problem"):
        load_config(small, ["training.steps=0", "sede=1", "device=tpu"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.micro_batch=3"], "must divide the 16 episodes"),
        (["model.dtype=bfloat16"], "must be float32 on device cpu"),
        (["agent.max_turn_tokens=1024"], "max_turn_tokens 1024 must be below max_episode_tokens"),
        (["agent.max_observation_tokens=2000"], "max_observation_tokens 2000 must be below max_episode_tokens"),
        (["retriever.index=null"], "needs `index`"),
        (["retriever.kind=http"], "needs `url`"),
        (["retriever.kind=object"], "needs `target`"),
        (["retriever.record=a", "retriever.replay=b"], "not both"),
        (["retriever.url=http://127.0.0.1:8000/retrieve"], "`url` belongs to kind http, and kind is index"),
        (["training.schedule=constant", "training.warmup_steps=3"], "schedule constant has no warm-up"),
        (["advantages.selection.enabled=true", "advantages.scope=batch"], "judges each question by itself"),
        (["advantages.selection.enabled=true", "advantages.estimator=reinforce_pp"], "baseline to group"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(small, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(small, overrides)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", "+1e-5"])
def test_a_power_of_ten_is_a_number_in_any_spelling(small, text):
    assert load_config(small, [f"training.learning_rate={text}"]).training.learning_rate == 1e-5


def test_a_word_that_begins_like_a_number_stays_text(small):
    assert load_config(small, ["name=1e5x"]).name == "1e5x"


def test_an_override_makes_the_section_that_is_missing(small):
    assert load_config(small, ["ray.address=auto"]).ray.address == "auto"
    assert load_config(small, ["model.lora.rank=4"]).model.lora.rank == 4


def test_an_override_reaches_into_a_list(small):
    assert load_config(small, ["data.train.0.weight=2.5"]).data.train[0].weight == 2.5


def test_an_override_of_a_section_that_was_null_sets_it(small):
    assert load_config(small, ["training=null", "training.steps=2"]).training.steps == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("training.steps=[1", "not valid YAML"),
        ("seed.x=1", "unknown key|not a section|Input should be"),
        ("name.x=1", "`name` is a single value, not a section"),
        ("data.train.3.weight=1", "must be an index from 0 to 0"),
        ("data.train.first.weight=1", "must be an index from 0 to 0"),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(small, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(small, [override])


def test_a_missing_section_is_named_when_a_command_needs_it(small):
    config = load_config(small, ["training=null"])
    with pytest.raises(ConfigError, match="needs the section `training`"):
        config.require("retriever", "training")


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(ConfigError, match="model: missing; set it"):
        parse_config({"name": "x"}, source="here")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1", "not valid YAML"), ("- a", "expected a mapping"), ("", "mapping")]
)
def test_a_file_that_is_no_config_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(str(path))
    assert str(path) in str(raised.value)


def test_a_config_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="no config file 'nowhere'"):
        load_config("nowhere")


def test_the_written_config_reads_back_as_the_same(small):
    config = load_config(small, ["training.learning_rate=3e-7", "seed=3", "data.root=/d"])
    assert parse_config(yaml.safe_load(config.to_yaml()), source="again") == config


@given(st.floats(1e-12, 1.0, exclude_min=True), st.floats(0, 1))
def test_numbers_survive_the_round_trip_through_a_file(tmp_path_factory, rate, alpha):
    config = parse_config(
        {
            "name": "x",
            "model": {"path": "some/model"},
            "training": {"steps": 1, "learning_rate": rate},
            "advantages": {"options": {"alpha": alpha}},
        },
        source="here",
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(str(path)) == config


def test_relative_paths_are_under_the_root_and_absolute_ones_are_not(small, tmp_path):
    data = load_config(small, [f"data.root={tmp_path}"]).data
    assert data.resolve("nq/train.jsonl") == tmp_path / "nq" / "train.jsonl"
    assert str(data.resolve("/else/where")) == "/else/where"


def test_packaged_configs_are_valid():
    for name in packaged_configs():
        load_config(name)


def test_reading_a_config_loads_neither_torch_nor_ray():
    code = "import sys, agentrl.config; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_a_server_can_replace_the_index_of_a_config_on_the_command_line(small):
    changed = load_config(small, ["retriever.kind=http", "retriever.url=http://127.0.0.1:8000/retrieve"])
    assert changed.retriever.indexes == []
