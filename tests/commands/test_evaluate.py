"""`agentrl eval` checks what it was given before it loads anything heavy, and scores the first questions of each file."""

import json
import os
import subprocess
import sys

import pytest

from agentrl.runs import read_trajectories


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{here}"], "exists already"),
        (["--questions", "missing.jsonl"], "missing.jsonl: no such file"),
        (["data.eval=[]"], "nothing to evaluate: give --questions FILE, or set data.eval in the config"),
    ],
)
def test_what_is_wrong_is_one_message(agentrl, tmp_path, arguments, message):
    arguments = [argument.format(here=tmp_path) for argument in arguments]
    status, out, err = agentrl("eval", "--config", "smollm2.yaml", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert "data.root" not in err


@pytest.mark.parametrize("command", [["eval"], ["rollout", "--show"]])
def test_mistakes_are_found_without_ray_and_torch(settings, questions, command):
    arguments = [*command, "--config", str(settings), "--questions", str(questions), "--adapter", "none"]
    code = (
        "import sys\n"
        "from agentrl import cli\n"
        f"sys.argv = ['agentrl', *{arguments!r}]\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as left:\n"
        "    print(left.code, [name for name in ('torch', 'ray', 'vllm', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "1 []"
    assert "model.adapter: no folder" in done.stderr


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_sampled(
    agentrl, sampled, settings, questions, tmp_path
):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "scores"
    status, _, err = agentrl("eval", "--config", settings, "--questions", questions, "--out", out)
    assert status == 1
    assert str(tmp_path / "file") in err
    assert sampled == {}


def test_the_first_questions_of_each_file_are_scored_and_written(agentrl, sampled, settings, questions, tmp_path):
    other = tmp_path / "other" / "more.jsonl"
    other.parent.mkdir()
    other.write_bytes(questions.read_bytes())
    files = ["--questions", questions, "--questions", other]
    out = tmp_path / "scores"
    status, text, err = agentrl("eval", "--config", settings, *files, "--limit", 2, "--out", out)
    assert (status, err) == (0, "")
    assert "other-more" in text
    assert sampled["temperature"] == 0.0
    assert [result["n"] for result in json.loads((out / "scores.json").read_text())["sets"]] == [2, 2]
    assert len(list(read_trajectories(out / "trajectories.jsonl.zst"))) == 4


def test_the_episodes_are_kept_where_too_many_failed_for_scores(agentrl, sampled, settings, questions, tmp_path):
    sampled["broken"] = True
    out = tmp_path / "scores"
    status, _, err = agentrl("eval", "--config", settings, "--questions", questions, "--out", out)
    assert status == 1
    assert "episodes failed (retriever" in err
    assert not (out / "scores.json").exists()
    assert {episode.failure for episode in read_trajectories(out / "trajectories.jsonl.zst")} == {"gone"}


def test_the_sets_of_the_config_are_limited_by_the_smaller_of_both_limits(agentrl, sampled, settings, questions):
    sets = f"data.eval=[{{path: {questions}, name: a, limit: 1}}, {{path: {questions}, name: b}}]"
    assert agentrl("eval", "--config", settings, "--limit", 2, sets)[0] == 0
    assert sampled["ids"] == [["eval/a:0"], ["eval/b:0"], ["eval/b:1"]]


def test_a_pipe_gets_the_table_with_every_name_whole(agentrl, settings, questions, sampled):
    folder = questions.parent / ("long" * 40)
    folder.mkdir()
    questions.rename(folder / questions.name)
    status, out, _ = agentrl("eval", "--config", settings, "--questions", folder / questions.name)
    assert status == 0
    assert f"{'long' * 40}-questions" in out
