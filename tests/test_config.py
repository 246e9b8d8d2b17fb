"""Settings that cannot be meant are refused by name, and what is accepted survives a round trip."""

import os
import subprocess
import sys
from typing import get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from agentrl.config import Config, ConfigError, load_config, packaged_configs, parse_config
from agentrl.config.yaml12 import parse_yaml, write_yaml

SMALL = """
name: small
model: {path: some/model}
data:
  train: [{path: nq/train.jsonl}]
retriever: {index: indexes/demo}
training: {steps: 4}
"""


ON_A_CARD = ["device=cuda", "model.dtype=bfloat16", "model.quantization=nf4"]


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
        ("name=..", "name"),
        ("rollout=3", "rollout"),
        ("data.eval=[3]", "data.eval.0"),
        ("retriever.url=localhost:8000", "retriever.url"),
        ("device=tpu", "device"),
        ("data.train=nq.jsonl", "data.train"),
        ("retriever.cache_mib=much", "retriever.cache_mib"),
        ("agent.temperature=0", "agent.temperature"),
        ("agent.temperature=0.005", "agent.temperature"),
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
        (["training.minibatches=3"], "minibatches 3 must be at most rollout.questions_per_step 2"),
        (["evaluation.patience=3"], "evaluation: patience 3 is about evaluations during training.*set every"),
        (["evaluation.keep=best"], "evaluation: keep best is about evaluations during training"),
        (["evaluation.limit=50"], "evaluation: limit 50 is about evaluations during training"),
        (["evaluation.samples=4"], "samples 4 at temperature 0 would all be the same episode"),
        (["evaluation.temperature=0.001"], "temperature must be 0 or at least 0.01"),
        (["training.shard=true", "model.lora=null"], "shard deals weights out to several trainer processes"),
        (["training.shard=true", "training.workers=2"], "needs model.lora null"),
        (
            ["device=cuda", "training.shard=true", "training.workers=2", "training.optimizer.name=adamw_8bit"],
            "adamw_8bit keeps scales that training.shard cannot put together",
        ),
        (["training.llds.weight=0.1"], "llds acts only where a batch has several updates"),
        (["training.kl.estimator=k1"], "k1 in the loss has a gradient whose mean is 0.*k2 or k3, or where to reward"),
        (["training.kl_coefficient=0.1"], "training.kl_coefficient: unknown key"),
        (["training.optimizer.name=adamw_8bit"], "adamw_8bit needs device cuda, and device is cpu; set it to adamw"),
        (["training.optimizer.betas=[0.9]"], "training.optimizer.betas: .*at least 2 items"),
        (["training.optimizer.betas=[0.9, 1.0]"], "training.optimizer.betas.1: .*less than 1"),
        (["model.quantization=nf4"], "model.quantization nf4 needs device cuda, and device is cpu; leave it out"),
        ([*ON_A_CARD, "model.lora=null"], "nf4 is for adapters that engines load beside the model"),
        ([*ON_A_CARD, "model.lora.dora=true"], "nf4 is for adapters that engines load beside the model"),
        ([*ON_A_CARD, "model.dtype=float32"], "nf4 computes in bfloat16, and model.dtype is float32"),
        ([*ON_A_CARD, "engine.kind=transformers"], "nf4 needs engine.kind vllm, and it is transformers"),
        ([*ON_A_CARD, "engine.gpus=2"], "nf4 needs an engine on one card.*engine.gpus 2.*set engine.gpus to 1"),
        ([*ON_A_CARD, "warmstart.sources=[{questions: q, index: w, count: 1}]"], "nf4 is for training by rewards"),
        (
            ["reward=[{kind: length, options: {limit: 64, cache: 65}}]"],
            "reward.0.options: cache 65 must be at most limit 64",
        ),
        (
            ["reward=[{kind: f1}, {kind: length, options: {limit: 2048, cache: 64}}]"],
            "reward.1.options: length takes nothing off up to limit - cache = 1984 tokens.*at most 480; lower",
        ),
        (
            ["reward={kind: f1, length: {limit: 64, cache: 8}}"],
            r"must be a list .* \[\{kind: f1\}, \{kind: length, options: \{limit: 64, cache: 8\}\}\]",
        ),
        (["reward.kind=f1"], r"must be a list of rewards; write it as reward: \[\{kind: f1\}\]"),
        (["reward.0.weight=2"], r"write it as reward: \[\{kind: exact_match, weight: 2\}\]"),
        (["reward=[]"], "reward: .*at least 1 item"),
        (["reward=[{kind: exakt_match}]"], "reward.0.kind: unknown reward .*did you mean exact_match"),
        (["reward=[{kind: f1, options: {rul: squad}}]"], "f1 has no option 'rul'.*did you mean rule"),
        (["reward=[{kind: f1, options: {rule: search_r1}}]"], "reward.0.options: rule: .*'triviaqa'"),
        (["reward=[{kind: search_cost, options: {price: 1}}]"], "search_cost has no option 'price' .it has none"),
        (["reward=[{kind: judge, options: {model: m}}]"], "judge needs the option 'base_url'"),
        (["reward=[{kind: f1}, {kind: f1}]"], "2 rewards are called 'f1'; give each a `name`"),
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
        (
            ["advantages.selection.enabled=true", "advantages.estimator=value_baseline"],
            "compares these with past steps",
        ),
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
    assert parse_config(parse_yaml(config.to_yaml()), source="again") == config


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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("+3", 3),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-11-27", "2026-11-27"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        (".5", 0.5),
        ("1e-5", 1e-5),
        ("1e5x", "1e5x"),
    ],
)
def test_plain_values_mean_what_they_mean_in_yaml_1_2(text, value):
    found = parse_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.slow
@given(st.dictionaries(st.text(), TREES))
def test_what_is_written_as_yaml_is_read_back_as_the_same(tree):
    assert parse_yaml(write_yaml(tree)) == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollout: {group_size: 4}\n# later\nrollout: {workers: 2}", "`rollout` is set in line 3 and again in line 5"),
        ("model: {path: a/b, path: c/d}", "`path` is set in line 3 and again in line 3"),
        ("training:\n  steps: 4\n  'steps': 5", "`steps` is set in line 4 and again in line 5"),
    ],
)
def test_a_key_that_is_set_twice_is_refused_with_both_lines(tmp_path, text, message):
    path = tmp_path / "twice.yaml"
    path.write_text(f"name: twice\nseed: 0\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_a_key_may_replace_one_that_is_merged_in(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("name: a\nmodel: &model {path: a/b, adapter: null}\nevaluation: {before: true}\n")
    assert load_config(str(path)).model.path == "a/b"
    assert parse_yaml("base: &b {x: 1, y: 2}\nown: {<<: *b, x: 3}")["own"] == {"x": 3, "y": 2}


def test_a_file_in_another_encoding_is_named_with_the_byte(tmp_path):
    path = tmp_path / "latin1.yaml"
    path.write_bytes('name: latin\nmodel: {path: "mod\xe8le"}\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin1\.yaml: line 2: byte 0xe8 is not UTF-8 \(byte 31 of the file\)"):
        load_config(str(path))


FULL = [
    "data.eval=[{path: nq/dev.jsonl}]",
    "retriever.fuse=[{index: others}]",
    "reward=[{kind: f1}]",
    "agent.tools=[{kind: search}]",
    "warmstart.sources=[{questions: q.jsonl, index: words, count: 1}]",
]


def numbers(model=Config, path=""):
    """Yield the key of every number of the config; a list has one entry."""
    for name, field in model.model_fields.items():
        annotations = [field.annotation, *get_args(field.annotation)]
        key = f"{path}{name}"
        if float in annotations or int in annotations:
            yield key
        for inner in annotations:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from numbers(inner, f"{key}.0." if get_origin(field.annotation) is list else f"{key}.")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "key", [*numbers(), "advantages.options.alpha", "retriever.options.k1", "retriever.fuse.0.options.b"]
)
def test_every_number_is_finite(small, key, value):
    with pytest.raises(ConfigError) as raised:
        load_config(small, [*FULL, f"{key}={value}"])
    section, _, option = key.partition(".options.")
    assert f"  {section}{'.options' if option else ''}" in str(raised.value)
    assert "finite number" in str(raised.value) or "valid integer" in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("agent.instruction", "Use # for numbers", "Use # for numbers"),
        ("agent.instruction", "Answer: briefly", "Answer: briefly"),
        ("agent.instruction", "- be brief", "- be brief"),
        ("agent.instruction", "{question} [now]", "{question} [now]"),
        ("agent.instruction", '"Be brief.\\n"', "Be brief.\n"),
        ("agent.instruction", "", None),
        ("agent.instruction", '""', ""),
        ("name", "1127", "1127"),
        ("name", "2026-11-27", "2026-11-27"),
        ("name", "on", "on"),
        ("name", "010", "010"),
        ("name", "1e5", "1e5"),
        ("model.adapter", "null", None),
        ("advantages.stratum", "[searches, end]", ["searches", "end"]),
        ("advantages.stratum", "mine:stratifier", "mine:stratifier"),
        ("advantages.options.anything", '"Use # for numbers"', "Use # for numbers"),
        ("advantages.options.alpha", "{start: 1, end: 0}", {"start": 1, "end": 0}),
        ("seed", "010", 10),
        ("data.train.0.weight", "3.5", 3.5),
    ],
)
def test_text_on_the_command_line_arrives_whole_and_numbers_are_decimal(small, key, value, expected):
    config = load_config(small, [f"{key}={value}"])
    found = config.model_dump()
    for part in key.split("."):
        found = found[int(part) if isinstance(found, list) else part]
    assert (found, type(found)) == (expected, type(expected))
    assert parse_config(parse_yaml(config.to_yaml()), source="again") == config


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
def test_any_text_on_the_command_line_arrives_whole_unless_it_is_quoted_or_null(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(SMALL)
    if text.lstrip().startswith(("'", '"')) or text in ("null", "~"):
        return
    assert load_config(str(path), [f"agent.instruction={text}"]).agent.instruction == text


@pytest.mark.parametrize(
    "override",
    [
        "retriever.options.header=Use # for numbers",
        "retriever.options.header=# all of it",
        "retriever.options.header=key: value",
        "retriever.options.header=- item",
        "seed=1 # one",
        "seed=0x10",
        "training.gradient_checkpointing=on",
    ],
)
def test_what_yaml_would_drop_or_read_otherwise_is_refused(small, override):
    with pytest.raises(ConfigError, match=r"in quotes|valid integer|must be true or false"):
        load_config(small, [override])


def test_text_in_a_file_that_yaml_takes_for_something_else_is_to_be_quoted(tmp_path):
    path = tmp_path / "number.yaml"
    path.write_text("name: 1127\nmodel: {path: true}\n")
    with pytest.raises(ConfigError, match=r"name: must be text; put 1127 in quotes\n.*put true in quotes"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (
            {"engine": {"kind": "openai", "endpoint": {"url": "x.test/v1?key=731731", "model": "m"}}},
            "engine.endpoint.url",
        ),
        ({"retriever": {"kind": "http", "url": "http://x.test", "token_env": 731731}}, "retriever.token_env"),
        ({"retriever": {"kind": "http", "url": "http://x.test", "token": "731731"}}, "retriever.token: unknown key"),
    ],
)
def test_a_message_does_not_show_a_key_that_stands_in_a_config(section, key):
    with pytest.raises(ConfigError, match=key) as raised:
        parse_config({"name": "small", "model": {"path": "some/model"}} | section, source="test")
    assert "731731" not in str(raised.value)
