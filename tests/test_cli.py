"""The commands answer fast, and what a user got wrong comes back as one message that names it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from agentrl.config import load_config, packaged_configs


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("name: small\nmodel: {path: some/model}\nretriever: {index: none}\ntraining: {steps: 4}\n")
    return path


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from agentrl.cli import app\n"
        "for arguments in (['--help'], ['train', '--help'], ['data', '--help']):\n"
        "    result = CliRunner().invoke(app, arguments)\n"
        "    assert result.exit_code == 0 and 'Usage' in result.output, result.output\n"
        "heavy = ('torch', 'ray', 'vllm', 'transformers', 'jnius', 'datasets', 'pyarrow', 'pyserini', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_every_command_is_explained(agentrl):
    status, out, _ = agentrl("--help")
    assert status == 0
    for command in ("train", "eval", "warmstart", "data", "index", "serve-retriever"):
        assert command in out


@pytest.mark.parametrize("command", ["train", "eval", "warmstart"])
def test_a_typo_in_a_setting_is_one_message_with_the_nearest_key(agentrl, small, command):
    status, out, err = agentrl(command, "--config", small, "training.stepz=8")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("training.stepz: unknown key; did you mean steps?") == 1
    assert "Traceback" not in err


def test_a_config_that_is_not_there_is_named_with_the_packaged_ones(agentrl):
    status, _, err = agentrl("train", "--config", "smollm.yaml")
    assert status == 1
    assert "no config file 'smollm.yaml'" in err
    assert "did you mean smollm2.yaml?" in err
    assert all(name in err for name in packaged_configs())


def test_a_missing_section_is_named(agentrl, small):
    status, _, err = agentrl("warmstart", "--config", small)
    assert status == 1
    assert "needs the section `warmstart`" in err


def test_what_cannot_be_trained_on_is_said_before_anything_starts(agentrl, small):
    status, _, err = agentrl("train", "--config", small, "--dry-run")
    assert status == 1
    assert "data.train names no question set" in err
    asks_nothing = ["data.train=[{path: x.jsonl}]", "evaluation.every=2"]
    status, _, err = agentrl("train", "--config", small, "--dry-run", *asks_nothing)
    assert status == 1
    assert "evaluation.every 2 has no question to ask; set data.eval" in " ".join(err.split())


def test_an_unknown_command_is_refused(agentrl):
    status, _, err = agentrl("trian")
    assert status == 2
    assert "trian" in err


def test_bad_lines_of_a_question_file_are_named_one_by_one(agentrl, tmp_path):
    path = tmp_path / "questions.jsonl"
    good = json.dumps({"id": "1", "question": "why?", "golden_answers": ["so"]})
    path.write_text(f'{good}\n{{"id": "2", "golden_answers": ["x"]}}\n{good}\nno [red]json[/]\n')
    status, out, err = agentrl("data", "validate", path)
    assert (status, out) == (1, "")
    problems = err.splitlines()
    assert [line.split(": ")[0] for line in problems] == [f"{path}:{number}" for number in (2, 3, 4)]
    assert "`question` is missing" in problems[0]
    assert "id '1' is already in line 1" in problems[1]
    assert "not JSON" in problems[2]


def test_a_sound_question_file_passes(agentrl, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"id": "1", "question": "why?", "golden_answers": ["so"]}) + "\n")
    assert agentrl("data", "validate", path)[0] == 0


def test_a_question_file_that_is_not_there_is_named(agentrl, tmp_path):
    status, _, err = agentrl("data", "validate", tmp_path / "nowhere.jsonl")
    assert status == 1
    assert "nowhere.jsonl: no such file" in err


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_can_be_read_and_knows_its_own_name(name):
    config = load_config(name)
    assert name in (config.name, f"{config.name}.yaml")
    assert config.cpu_config is None or load_config(config.cpu_config).device == "cpu"


@pytest.mark.parametrize(
    ("overrides", "trains", "gpus"), [([], False, 1), ([], True, 2), (["retriever.gpus=0.5"], True, 2.5)]
)
def test_a_config_for_gpus_is_refused_without_them_and_names_the_one_for_cpus(monkeypatch, overrides, trains, gpus):
    import ray

    from agentrl.config import ConfigError
    from agentrl.rollout.cluster import cluster

    monkeypatch.setattr(ray, "init", lambda **_: SimpleNamespace(address_info={"session_dir": "/tmp/session"}))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0})
    wanted = rf"config 'nq_hotpot' needs {gpus} GPUs .*, and Ray has 0 free; on a machine without GPUs use nq_hotpot_mini\.yaml"
    config = load_config("nq_hotpot.yaml", overrides)
    with pytest.raises(ConfigError, match=wanted) as caught, cluster(config, beside=object() if trains else None):
        pass
    # Without a run folder Ray keeps what its processes print.
    assert caught.value.__notes__ == ["what its processes printed: /tmp/session/logs"]


def test_caches_mean_the_same_folder_in_every_process(agentrl, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("AGENTRL_CACHE", "RETRIEVERS_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, "cache")
    agentrl("--help")
    assert {os.environ[name] for name in ("AGENTRL_CACHE", "RETRIEVERS_CACHE", "HF_HOME")} == {str(tmp_path / "cache")}
