"""What a run came to can be shown again at any time, and never fails the run that has just ended."""

import io
import json
import os
import subprocess
import sys

import pytest
from fakes import make_episode
from rich.console import Console

from agentrl.commands.runs import finish
from agentrl.config import parse_config
from agentrl.evaluation.run import Evaluation, score
from agentrl.runs import RunFolder, new_checkpoint, read_trajectories
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


def test_the_best_checkpoint_and_what_a_run_went_back_for_are_shown(agentrl, folder):
    for step in (2, 3):
        with new_checkpoint(folder.checkpoints, step, keep=9) as aside:
            (aside / "state").mkdir()
    _, out, _ = agentrl("runs", "show", folder.path)
    assert f"best        {folder.checkpoints / 'checkpoint-3'}\n" in out
    assert "rolled back" not in out
    folder.roll_back(2, 3, "the mean reward fell from 0.9 to 0.1")
    _, out, _ = agentrl("runs", "show", folder.path)
    assert "best" not in out
    assert "rolled back  from step 3 to 2: the mean reward fell from 0.9 to 0.1\n" in out


def test_where_a_run_ended_and_what_it_left_are_shown(agentrl, folder):
    assert "ended" not in agentrl("runs", "show", folder.path)[1]
    folder.write_ending(3, 2, "2 evaluations in a row were not better than the one after step 2")
    folder.write_evaluation("after", folder.read_evaluation(0))
    folder.write_evaluated("after", list(read_trajectories(folder.evaluated_file(0))))
    _, out, _ = agentrl("runs", "show", folder.path)
    assert (
        "ended       after step 3: 2 evaluations in a row were not better than the one after step 2; it left the weights of "
        "step 2\n"
    ) in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("demo")] == ["step", "step", "after"]
    assert "of 1 questions 0 were wrong before and right after" in out


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


def test_a_run_without_evaluations_is_shown_with_its_steps_and_where_its_error_lies(agentrl, folder):
    for file in folder.evaluations.iterdir():
        file.unlink()
    (folder.path / "error.txt").write_text("Traceback")
    status, out, _ = agentrl("runs", "show", folder.path)
    assert status == 0
    assert out.splitlines() == [
        "steps       3, reward 0.667 over the last 5",
        "scores      no evaluation",
        f"failed      the traceback is in {folder.path / 'error.txt'}",
    ]


@pytest.mark.parametrize("command", ["show", "plot"])
@pytest.mark.parametrize(
    ("file", "text", "place"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "loss": -\n{"step": 3}\n', "metrics.jsonl:2"),
        ("metrics.jsonl", "17\n", "metrics.jsonl:1"),
        ("evaluations/step-00003.json", "", "step-00003.json"),
        ("evaluations/step-00003.json", "{}", "step-00003.json"),
        ("evaluations/ceiling.json", '{"sets": [{"n": 1}]}', "ceiling"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(agentrl, folder, command, file, text, place):
    (folder.path / file).write_text(text)
    status, _, err = agentrl("runs", command, folder.path)
    assert status == 1
    assert place in err
    assert "damaged" in err


def test_a_picture_is_not_written_over_a_folder(agentrl, folder, tmp_path):
    status, _, err = agentrl("runs", "plot", folder.path, "--out", tmp_path)
    assert (status, err) == (1, f"error: {tmp_path}: a folder; give the name of a file with --out\n")


def test_a_file_that_cannot_be_written_is_named_as_it_was_given(agentrl, folder, tmp_path):
    status, _, err = agentrl("runs", "plot", folder.path, "--out", tmp_path / "none" / "x.png")
    assert status == 1
    assert f"{tmp_path / 'none' / 'x.png'}'" in err


def test_colours_that_are_asked_for_do_not_make_a_terminal_of_a_pipe(folder):
    command = [sys.executable, "-m", "agentrl.cli", "runs", "show", folder.path]
    plain, coloured = (
        subprocess.run(command, capture_output=True, env=os.environ | more, check=True).stdout
        for more in ({}, {"FORCE_COLOR": "1"})
    )
    assert len(coloured) < 2 * len(plain)


def test_what_the_output_cannot_write_is_replaced(folder):
    question = Question("q", "why?" * 100, ("so",), dataset="demo")
    for step, answer in ((0, "no"), (3, "so")):
        episodes = [make_episode("eval/q", question, answer=answer + " é" * 200, reward=float(answer == "so"))]
        folder.evaluated_file(step).unlink()
        folder.write_evaluated(step, episodes)
    command = [sys.executable, "-m", "agentrl.cli", "runs", "show", folder.path]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
