"""`agentrl rollout` checks what it was given before it starts anything, and sums up what it sampled."""

import io

import pytest
from fakes import make_episode
from rich.console import Console

from agentrl.commands.rollout import summary
from agentrl.config import load_config
from agentrl.runs import read_trajectories, write_trajectories
from agentrl.types import End


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --config X to sample episodes, or --show FILE"),
        (["--show"], "give --config X to sample episodes, or --show FILE"),
        (["some.jsonl.zst"], "give --config X to sample episodes, or --show FILE"),
        (["--show", "x.jsonl.zst", "--samples", "2"], "--show FILE only reads"),
        (["--show", "x.jsonl.zst", "--quick"], "--show FILE only reads"),
        (["--quick"], "give --config X to sample episodes, or --show FILE"),
        (["--show", "missing.jsonl.zst"], "missing.jsonl.zst"),
        (["--config", "smollm2.yaml"], "give --out FILE.jsonl.zst to keep the episodes, --show to read them"),
        (["--config", "smollm2.yaml", "--out", "x", "rollout.workerz=2"], "did you mean workers?"),
        (["--config", "smollm2.yaml", "--out", "{here}"], "exists already"),
        (["--config", "smollm2.yaml", "--out", "x", "--questions", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--config", "smollm2.yaml", "--out", "x", "data.eval=[]"], "nothing to sample for"),
    ],
)
def test_what_is_wrong_is_one_message(agentrl, tmp_path, arguments, message):
    status, out, err = agentrl("rollout", *(argument.format(here=tmp_path) for argument in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--samples", "0"], ["--temperature", "-1"], ["--limit", "0"]])
def test_impossible_numbers_are_refused(agentrl, arguments):
    status, _, err = agentrl("rollout", "--config", "smollm2.yaml", *arguments)
    assert status == 2
    assert arguments[0] in err


def test_recorded_episodes_are_read_without_a_config(agentrl, tmp_path):
    file = tmp_path / "episodes.jsonl.zst"
    write_trajectories(file, [make_episode(f"e{i}", answer="x") for i in range(3)])
    status, out, _ = agentrl("rollout", "--show", file, "--limit", 2)
    assert status == 0
    assert [name in out for name in ("e0 ", "e1 ", "e2 ")] == [True, True, False]


def test_groups_are_sampled_written_and_summed_up(agentrl, sampled, settings, questions, tmp_path):
    out = tmp_path / "new" / "episodes.jsonl.zst"
    arguments = ["rollout", "--config", settings, "--questions", questions, "--limit", 2, "--out", out]
    status, text, err = agentrl(*arguments)
    assert (status, err) == (0, "")
    ids = [episode.id for episode in read_trajectories(out)]
    assert ids == [name for group in sampled["ids"] for name in group]
    assert len(set(ids)) == 8
    assert sampled["temperature"] == 0.7
    assert "8 for 2 question(s)" in text
    assert "0.500, 95 % interval 0.215 to 0.785" in text
    assert "answered 100%" in text
    assert "8 rollouts (0 more excluded), 2 groups, 4 strata" in text
    status, _, err = agentrl(*arguments)
    assert status == 1
    assert "exists already" in err


def test_the_command_line_changes_samples_temperature_and_adapter(agentrl, sampled, settings, questions):
    arguments = ["--samples", 1, "--temperature", 0, "--show"]
    status, text, _ = agentrl("rollout", "--config", settings, "--questions", questions, *arguments, "seed=5")
    assert status == 0
    assert [len(group) for group in sampled["ids"]] == [1, 1, 1]
    assert sampled["temperature"] == 0.0
    assert sampled["config"].seed == 5
    assert all(f"why {i}?" in text for i in range(3))
    status, _, err = agentrl("rollout", "--config", settings, "--questions", questions, "--show", "--adapter", "none")
    assert status == 1
    assert "model.adapter: no folder" in err


def test_a_quick_look_samples_three_questions_once_with_an_engine_of_this_process(agentrl, sampled, settings, tmp_path):
    path = tmp_path / "five.jsonl"
    path.write_text("".join(f'{{"id": "{i}", "question": "why {i}?", "golden_answers": ["so"]}}\n' for i in range(5)))
    arguments = ["rollout", "--config", settings, "--questions", path, "--quick"]
    status, text, err = agentrl(*arguments)
    assert (status, err) == (0, "")
    assert [len(group) for group in sampled["ids"]] == [1, 1, 1]
    assert sampled["config"].engine.kind == "transformers"
    assert [f"why {i}?" in text for i in range(4)] == [True, True, True, False]
    assert "sampled in this process, without Ray" in text
    assert "stratum" not in text
    assert agentrl(*arguments, "--limit", 5, "--samples", 2)[0] == 0
    assert [len(group) for group in sampled["ids"]] == [2] * 5


def test_failed_episodes_are_kept_and_reported(agentrl, sampled, settings, questions, tmp_path):
    sampled["broken"] = True
    out = tmp_path / "episodes.jsonl.zst"
    status, _, err = agentrl("rollout", "--config", settings, "--questions", questions, "--out", out)
    assert status == 1
    assert "12 of 12 episodes failed" in err
    assert "gone" in err
    assert len(list(read_trajectories(out))) == 12


def test_the_summary_caps_strata_among_the_episodes_that_training_would_compare(settings):
    ends = [[End.ANSWERED, End.ANSWERED, End.TURN_LIMIT], [End.TRUNCATED, End.TRUNCATED, End.INVALID]]
    groups = [
        [make_episode(f"{end}{i}", end=end, reward=float(i)) for i, end in enumerate(members)] for members in ends
    ]
    overrides = ["advantages.stratum=end", "advantages.max_strata=2"]
    shown = {scope: io.StringIO() for scope in ("prompt", "batch")}
    for scope, file in shown.items():
        config = load_config(str(settings), [*overrides, f"advantages.scope={scope}"])
        Console(file=file, width=160).print(summary(config, groups))
    assert "turn_limit  " in shown["prompt"].getvalue()
    assert "6 rollouts (0 more excluded), 2 groups, 4 strata" in shown["prompt"].getvalue()
    assert "2 strata" in shown["batch"].getvalue()


def test_failures_and_graded_rewards_in_the_summary(settings):
    groups = [
        [make_episode("a", reward=0.5), make_episode("b", reward=1.0), make_episode("c", end=End.ENVIRONMENT_FAILURE)]
    ]
    console = Console(file=io.StringIO(), width=160)
    console.print(summary(load_config(str(settings)), groups))
    text = console.file.getvalue()
    assert "3 for 1 question(s), 1 failed" in text
    assert "failures  retriever 1" in text
    assert "0.750\n" in text.replace(" ", "").replace("reward", "")
    assert "interval" not in text
    assert "2 rollouts (1 more excluded)" in text
    console.print(summary(load_config(str(settings)), [[make_episode("c", end=End.ENVIRONMENT_FAILURE)]]))
