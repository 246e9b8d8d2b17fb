"""What a run came to can be shown again at any time, and never fails the run that has just ended."""

import io
import json
import sys

import pytest
from fakes import make_episode
from rich.console import Console

from agentrl.commands.runs import finish
from agentrl.config import parse_config
from agentrl.evaluation.run import Evaluation, score
from agentrl.runs import RunFolder
from agentrl.types import Question


@pytest.fixture
def folder(tmp_path):
    """A run of three steps whose question was answered wrongly before and rightly after."""
    tree = {"name": "small", "run_dir": str(tmp_path), "model": {"path": "m"}, "training": {"steps": 3}}
    folder = RunFolder.create(parse_config(tree, source="test"))
    folder.close()
    for step in (1, 2, 3):
        folder.append_metrics(step, {"reward/mean": step / 3, "strata/1/share": 1.0})
    for step, answer in ((0, "no"), (3, "so")):
        question = Question("q", "why?", ("so",), dataset="demo")
        episodes = [make_episode("eval/q", question, answer=answer, reward=float(answer == "so"))]
        folder.write_evaluated(step, episodes)
        folder.write_evaluation(step, Evaluation((score("demo", episodes),), ()).to_dict())
    return folder


def ended(folder):
    console = Console(file=io.StringIO(), width=200)
    finish(folder, console)
    return console.file.getvalue()


def test_a_run_is_shown_with_its_scores_and_what_it_learned(agentrl, folder):
    status, out, err = agentrl("runs", "show", folder.path)
    assert (status, err) == (0, "")
    assert [line.split()[1:4] for line in out.splitlines() if line.startswith("demo")] == [
        ["step", "0", "1"],
        ["step", "3", "1"],
    ]
    assert "of 1 questions 1 were wrong before and right after" in out


def test_the_ceiling_of_a_run_is_shown_below_its_scores_and_drawn(agentrl, folder):
    agentrl("runs", "plot", folder.path)
    without = (folder.path / "learning.png").read_bytes()
    (folder.evaluations / "ceiling.json").write_text(json.dumps(folder.read_evaluation(3)))
    assert agentrl("runs", "plot", folder.path)[0] == 0
    assert (folder.path / "learning.png").read_bytes() != without
    _, out, _ = agentrl("runs", "show", folder.path)
    assert [line.split()[1] for line in out.splitlines() if line.startswith("demo")] == ["step", "step", "ceiling"]


def test_a_run_is_drawn_into_its_folder_or_elsewhere(agentrl, folder, tmp_path):
    for options, file in (([], folder.path / "learning.png"), (["--out", tmp_path / "x.png"], tmp_path / "x.png")):
        assert agentrl("runs", "plot", folder.path, *options) == (0, f"picture     {file}\n", "")
        assert file.stat().st_size > 10_000


@pytest.mark.parametrize("command", ["show", "plot"])
def test_a_folder_that_is_no_run_is_refused(agentrl, tmp_path, command):
    status, out, err = agentrl("runs", command, tmp_path)
    assert (status, out) == (1, "")
    assert f"error: {tmp_path}: no run: it has no config.yaml" in err


def test_the_end_of_a_run_names_question_picture_folder_and_adapter(folder):
    lines = ended(folder).splitlines()
    assert lines[0].startswith("of 1 questions")
    assert lines[-3:] == [
        f"picture     {folder.path / 'learning.png'}",
        f"run folder  {folder.path}",
        f"adapter     {folder.adapter}",
    ]


def test_without_matplotlib_a_run_ends_well_and_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    lines = ended(folder).splitlines()
    assert lines[-3] == (
        "picture     none drawn: this needs the package matplotlib, which is not installed: pip install 'agentrl[train]'; "
        f"then: agentrl runs plot {folder.path}"
    )
    assert lines[-1].startswith("adapter")


def test_damaged_episodes_and_a_folder_that_cannot_be_written_do_not_fail_the_end_of_a_run(folder):
    folder.evaluated_file(3).write_bytes(b"not zstandard")
    (folder.path / "learning.png").mkdir()
    text = ended(folder)
    assert "question    none shown: " in text
    assert "step-00003.jsonl.zst: not a trajectory file" in text
    assert "picture     none drawn: " in text
    assert text.splitlines()[-1].startswith("adapter")


def test_a_run_without_evaluations_ends_with_its_picture(folder):
    for file in folder.evaluations.iterdir():
        file.unlink()
    assert ended(folder).startswith("picture     ")
