"""The pages for those who come from verl or TRL name settings that are there."""

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel
from trl import GRPOConfig

from agentrl.config import Config, load_config

DOCS = Path(__file__).parents[1] / "docs"


def table(page, heading):
    """The rows of the table under these headings, as pairs of cells."""
    lines = (DOCS / page).read_text(encoding="utf-8").split(f"| {heading} | agentrl |\n|---|---|\n")[1].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in lines.splitlines()]


def sections(annotation):
    """The section of the configuration that a key's type is, alone or with None."""
    return [one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, BaseModel)]


def is_setting(path):
    models = [Config]
    for name in path.split("."):
        found = [model.model_fields[name] for model in models if name in model.model_fields]
        if not found:
            return False
        models = sections(found[0].annotation)
    return True


@pytest.mark.parametrize(
    ("page", "heading"), [("from_verl.md", "verl 0.9, or Search-R1"), ("from_trl.md", "`GRPOConfig`")]
)
def test_agentrls_settings_of_the_tables_are_there(page, heading):
    named = [key for _, ours in table(page, heading) for key in re.findall(r"`([a-z_]+\.[a-z_.]+)", ours)]
    assert len(named) > 15
    assert [key for key in named if not is_setting(key)] == []
    assert not is_setting("training.stepz")


def test_trls_settings_of_the_table_are_there():
    known = {field.name for field in fields(GRPOConfig)} | {"peft_config"}
    named = [key for theirs, _ in table("from_trl.md", "`GRPOConfig`") for key in re.findall(r"`([a-z_]+)", theirs)]
    assert len(named) > 15
    assert [key for key in named if key not in known] == []


def test_the_config_for_search_r1s_files_and_server_is_one(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "from_verl.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    config = load_config(str(tmp_path / "mine.yaml"), [])
    assert config.retriever.url == yaml.safe_load(block)["retriever"]["url"]
    assert config.retriever.indexes == []
    assert [questions.path for questions in config.data.train] == ["nq_search/train.parquet"]
