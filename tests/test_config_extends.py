"""A config may change another one, and says so by its name where it cannot."""

import re

import pytest

from agentrl.config import ConfigError, load_config


def test_a_config_changes_the_one_that_it_extends_section_by_section(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "extends: pocket.yaml\nname: base\nrollout: {group_size: 4}\ndata: {eval: [{path: a.jsonl}, {path: b.jsonl}]}\n"
    )
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nname: own\ndata: {eval: [{path: c.jsonl}]}\n")
    own, pocket = load_config(str(tmp_path / "own.yaml")), load_config("pocket.yaml")
    assert (own.name, own.rollout.group_size) == ("own", 4)
    assert own.rollout.questions_per_step == pocket.rollout.questions_per_step
    assert [given.path for given in own.data.eval] == ["c.jsonl"]
    assert own.data.train == pocket.data.train
    assert "extends" not in own.to_yaml()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: missing.yaml", "extends: no other config 'missing.yaml' beside it"),
        ("extends: [pocket.yaml]", "extends: must be the path or the name of one config"),
        ("extends: own.yaml", "extends: no other config 'own.yaml' beside it"),
        ("extends: other.yaml", "extends this config in turn"),
    ],
)
def test_a_config_that_extends_nothing_that_can_be_read_is_refused_by_its_name(tmp_path, text, expected):
    (tmp_path / "own.yaml").write_text(f"{text}\n")
    (tmp_path / "other.yaml").write_text("extends: own.yaml\n")
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        load_config(str(tmp_path / "own.yaml"))
    assert str(tmp_path) in str(caught.value)


def test_options_are_replaced_as_a_whole(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "extends: pocket.yaml\nadvantages: {options: {alpha: {start: 1, end: 0, shape: step, at: 0.5}}}\n"
    )
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nadvantages: {options: {alpha: {start: 1, end: 0}}}\n")
    own = load_config(str(tmp_path / "own.yaml"))
    assert own.advantages.options == {"alpha": {"start": 1, "end": 0}}
    assert own.advantages.stratum == "searches"
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nadvantages: {estimator: grpo, options: {}}\n")
    assert load_config(str(tmp_path / "own.yaml")).advantages.options == {}


def test_a_config_may_have_the_name_of_the_packaged_one_that_it_extends(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pocket.yaml").write_text("extends: pocket.yaml\nname: mine\n")
    # What lies where a command is called plays no part.
    (tmp_path / "pocket.yaml").write_text("name: other\n")
    monkeypatch.chdir(tmp_path)
    mine = load_config("mine/pocket.yaml")
    assert (mine.name, mine.advantages.stratum) == ("mine", "searches")


def test_a_problem_names_all_files_that_it_may_come_from(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: pocket.yaml\nagent: {max_turn: 3}\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\n")
    with pytest.raises(ConfigError, match=r"own\.yaml, which extends .*base\.yaml and .*pocket\.yaml"):
        load_config(str(tmp_path / "own.yaml"))
