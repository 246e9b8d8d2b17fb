"""Every setting is explained, and the page that explains them is the one that code makes."""

from pathlib import Path

import pytest

from agentrl.config import Config, ConfigError
from agentrl.config.reference import find, page, sections

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
SETTINGS = [setting for part in sections() for setting in part.settings]


def test_the_page_is_the_one_that_code_makes(monkeypatch):
    monkeypatch.setenv("AGENTRL_DATA", "/somewhere/else")
    assert PAGE.read_text(encoding="utf-8") == page(), "make it anew: agentrl config --markdown > docs/config.md"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_setting_has_a_meaning_and_a_type(setting):
    assert setting.meaning.endswith(".")
    assert setting.type
    assert "pydantic" not in setting.type
    assert "typing" not in setting.type


def test_every_key_of_a_config_is_among_them_once():
    keys = [setting.key for setting in SETTINGS]
    assert len(set(keys)) == len(keys)
    assert set(Config.model_fields) <= set(keys)
    assert {"training.optimizer.betas", "agent.tools.N.timeout_seconds", "reward.N.options (length).limit"} <= set(keys)


@pytest.mark.parametrize("key", ["data.train.0.weight", "data.train.N.weight"])
def test_a_setting_is_found_at_any_position(key):
    (setting,) = find(key).settings
    assert (setting.key, setting.default, setting.type) == ("data.train.N.weight", "1.0", "number, above 0")


def test_a_section_is_found_with_all_that_is_in_it():
    assert [setting.key for setting in find("training.kl").settings] == [
        f"training.kl.{name}" for name in ("coefficient", "estimator", "where")
    ]
    assert find("agent.tools").key == "agent.tools.N"


def test_an_unknown_key_is_named_with_the_nearest_known_ones():
    with pytest.raises(ConfigError, match=r"no setting 'training\.step'; did you mean .*training\.steps"):
        find("training.step")


def test_a_command_explains_one_setting(agentrl):
    status, shown, err = agentrl("config", "rollout.group_size")
    assert (status, err) == (0, "")
    assert "rollout.group_size  whole number, at least 2, by default 8" in shown
    assert "How many episodes of one question are compared with one another." in shown


def test_a_command_prints_the_page(agentrl):
    assert agentrl("config", "--markdown") == (0, page(), "")
