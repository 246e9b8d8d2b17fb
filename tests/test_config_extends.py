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
        ("extends: missing.yaml", "extends: no config file 'missing.yaml'"),
        ("extends: [pocket.yaml]", "extends: must be the path or the name of one config"),
        ("extends: own.yaml", "extends this config in turn"),
        ("extends: other.yaml", "extends this config in turn"),
    ],
)
def test_a_config_that_extends_nothing_that_can_be_read_is_refused_by_its_name(tmp_path, text, expected):
    (tmp_path / "own.yaml").write_text(f"{text}\n")
    (tmp_path / "other.yaml").write_text("extends: own.yaml\n")
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        load_config(str(tmp_path / "own.yaml"))
    assert str(tmp_path) in str(caught.value)
