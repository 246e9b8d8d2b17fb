"""Where there is no terminal a run leaves one line a step, and evaluations stand side by side in a table."""

import io

import pytest
from fakes import make_episode
from rich.console import Console

from agentrl.advantages import compute
from agentrl.display import RunDisplay, evaluation_table, strata_shares
from agentrl.evaluation.run import Evaluation, SetResult, score
from agentrl.progress import Progress
from agentrl.types import End, Question

METRICS = {
    "reward/mean": 0.4375,
    "searches/mean": 1.25,
    "strata/0/share": 0.125,
    "strata/0/reward": 0.5,
    "strata/1/share": 0.5,
    "strata/2/share": 0.375,
    "tokens_per_second/rollout": 812.4,
    "tokens_per_second/train": 95.2,
    "grad_norm": 0.01234,
}


def test_the_advantages_of_the_last_step_follow_where_there_is_no_terminal():
    report = compute([0.0, 1.0, 1.0, 0.0], ["q"] * 4, [0, 0, 1, 1]).report
    metrics = METRICS | {f"advantages/{name}": value for name, value in report.metrics().items()}
    console = Console(file=io.StringIO(), width=160)
    with RunDisplay(console, 2) as display:
        display.update(Progress(1, "step", 1, 2, metrics))
        display.update(Progress(2, "step", 2, 2, metrics))
    text = console.file.getvalue()
    assert text.count("advantages by stratum, step 2") == 1
    assert "advantages by stratum, step 1" not in text


def evaluation(*answers, failures=0):
    question = Question("q", "?", ("gold",), dataset="nq")
    episodes = [make_episode(str(i), question, answer=answer, searches=1) for i, answer in enumerate(answers)]
    episodes += [make_episode(f"f{i}", question, end=End.ENVIRONMENT_FAILURE) for i in range(failures)]
    return Evaluation((score("nq", episodes),), tuple(episodes))


def printed(table, width=160):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return [line for line in console.file.getvalue().splitlines() if line.strip()]


def follow(console, steps):
    """Show a run of `steps` steps."""
    with RunDisplay(console, steps) as display:
        display.update(Progress(0, "starting Ray", 0, 0))
        for step in range(steps):
            for done in range(4):
                display.update(Progress(step, "rollout", done, 4))
            for done in range(4):
                display.update(Progress(step, "train", done, 4))
            display.update(Progress(step + 1, "step", step + 1, steps, METRICS))
        display.update(Progress(steps, "evaluation", 1, 60))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_without_a_terminal_each_step_is_one_line(width):
    console = Console(file=io.StringIO(), width=width)
    follow(console, 3)
    lines = console.file.getvalue().splitlines()
    steps = [line for line in lines if "reward" in line]
    assert [line.split("  ")[0] for line in steps] == ["step 1/3", "step 2/3", "step 3/3"]
    for line in steps:
        for part in (
            "reward 0.438",
            "mean of 5 0.438",
            "searches 1.25",
            "strata 0:12 1:50 2:38",
            "grad norm 0.0123",
            "left 0 s",
        ):
            assert part in line
    # Beside the steps, one line for each phase as it begins and none for its progress.
    phases = ["starting Ray", *[f"step {n} {phase}" for n in (1, 2, 3) for phase in ("rollout", "train")], "evaluation"]
    assert [line.split("  ")[1] for line in lines if line not in steps] == phases


def test_on_a_terminal_the_steps_stand_in_one_live_table():
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    follow(console, 2)
    assert "step 1/2  reward" not in console.file.getvalue()
    assert "0.438" in console.file.getvalue()


def test_tables_fit_a_terminal_of_80_columns():
    long = METRICS | {f"strata/{n}/share": 0.2 for n in range(5)}
    console = Console(file=io.StringIO(), width=80, height=50, force_terminal=True, color_system=None)
    with RunDisplay(console, 1200) as display:
        display.update(Progress(1005, "step", 1005, 1200, long))
    console.print(evaluation_table("t", {"before": evaluation("gold", "no"), "after": evaluation("gold", failures=12)}))
    lines = [line.split("\r")[-1].rstrip() for line in console.file.getvalue().splitlines()]
    assert any(line.startswith("1005/1200 0.438") for line in lines)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_the_shares_of_strata_are_read_from_the_metrics():
    assert strata_shares(METRICS) == "0:12 1:50 2:38"
    assert strata_shares({}) == ""


def test_before_and_after_stand_under_one_another():
    table = evaluation_table(
        "x: before and after", {"before": evaluation("gold", "no"), "after": evaluation("gold", "gold")}
    )
    lines = printed(table)
    assert "before and after" in lines[0]
    before, after = (next(line for line in lines[1:] if word in line) for word in ("before", "after"))
    assert "0.500" in before
    assert "0.095 to 0.905" in before
    assert "1.000" in after
    assert "answered 100%" in after


def test_failed_questions_are_shown():
    assert any(
        "1 (+2 failed)" in line for line in printed(evaluation_table("t", {"greedy": evaluation("gold", failures=2)}))
    )


def test_failed_questions_are_shown_with_their_cause():
    lines = printed(evaluation_table("t", {"greedy": evaluation("gold", failures=2)}))
    assert lines[-1].strip() == "nq, greedy: 1 (+2 failed): retriever 2"


def test_evaluations_fit_80_columns_and_nothing_is_cut():
    ends = {"answered": 0.91, "turn_limit": 0.05, "truncated": 0.02, "timed_out": 0.02}
    result = SetResult("2wikimultihopqa-dev", 1500, 3, 0.4, 0.387, 0.437, 0.5, 1.84, ends, {"retriever": 3})
    table = evaluation_table("t", dict.fromkeys(("before", "after"), Evaluation((result, result), ())))
    lines = printed(table, width=80)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "…" not in text
    for value in (
        "0.387 to 0.437",
        "answered 91%,",
        "turn_limit 5%,",
        "timed_out 2%",
        "1500 (+3 failed): retriever 3",
    ):
        assert value in text
    assert "".join(line[:15].strip() for line in lines).count(result.dataset) == 4


def test_an_evaluation_that_was_not_made_is_left_out():
    lines = printed(evaluation_table("t", {"before": None, "after": evaluation("gold")}))
    assert not any("before" in line for line in lines)
    assert any("after" in line for line in lines)
    assert printed(evaluation_table("t", {"before": None, "after": None}))


def on_screen(width, height, steps=30, total=45, **options):
    """What a terminal of this size shows after `steps` steps, line by line."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None, **options)
    display = RunDisplay(Console(file=io.StringIO(), width=width, force_terminal=True), total)
    report = compute([0.0, 1.0, 1.0, 0.0], ["q"] * 4, [0, 0, 1, 1]).report
    metrics = METRICS | {f"advantages/{name}": value for name, value in report.metrics().items()}
    for step in range(1, steps + 1):
        display.update(Progress(step, "step", step, total, metrics | {"reward/mean": step / total}))
    console.print(display)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_a_terminal_shows_plots_steps_advantages_and_a_bar():
    lines = on_screen(80, 40)
    assert lines[0].startswith("reward: ")
    assert "mean of 5" in lines[0]
    assert lines[0].endswith("strata: 0  1  2")
    assert any(line.startswith("30/45 0.667  0.622") for line in lines)
    assert any("advantages by stratum, step 30" in line for line in lines)
    assert "0:00:0" in lines[-1]


@pytest.mark.parametrize("height", [6, 14, 24, 50])
@pytest.mark.parametrize("width", [20, 45, 60, 80, 200])
def test_the_view_fits_every_terminal_and_keeps_the_latest_step(width, height):
    lines = on_screen(width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any(line.startswith("30/45") for line in lines)


def test_the_moving_mean_goes_on_after_a_resume():
    console = Console(file=io.StringIO(), width=160)
    earlier = [{"step": step, **METRICS, "reward/mean": 0.1} for step in range(1, 9)]
    with RunDisplay(console, 10, earlier) as display:
        # Steps after the checkpoint are taken again.
        display.update(Progress(7, "step", 7, 10, METRICS | {"reward/mean": 0.6}))
    assert "reward 0.600  mean of 5 0.200" in console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_names_with_brackets_are_shown_as_they_are(terminal):
    stratum, phase = "[/search]", "continuing with data.root: '[/old]' -> '[red]'"
    report = compute([0.0, 1.0, 1.0, 0.0], ["q"] * 4, [stratum] * 4).report
    shares = {f"strata/{stratum}/share": 1.0}
    metrics = {name: value for name, value in METRICS.items() if not name.startswith("strata/")} | shares
    metrics |= {f"advantages/{name}": value for name, value in report.metrics().items()}
    console = Console(file=io.StringIO(), width=160, force_terminal=terminal, no_color=True)
    with RunDisplay(console, 1) as display:
        display.update(Progress(0, phase, 0, 0))
        display.update(Progress(1, "step", 1, 1, metrics))
    assert phase in console.file.getvalue()
    assert "[/search]:100" in console.file.getvalue()
    failed = SetResult("nq[/dev]", 1, 1, 1.0, 0.2, 1.0, 1.0, 1.0, {}, {"engine": 1})
    text = "\n".join(printed(evaluation_table("t", {"before": Evaluation((failed,), ())})))
    assert text.count("nq[/dev]") == 2


@pytest.mark.parametrize("terminal", [False, True])
def test_a_notice_stays_on_the_screen_as_it_is_and_the_phase_goes_on(terminal):
    console = Console(file=io.StringIO(), width=60, height=20, force_terminal=terminal, color_system=None)
    notice = "step 3: the mean reward fell [badly] from 0.5 to 0.1 over the last 5 steps, which is a long line"
    with RunDisplay(console, 4) as display:
        display.update(Progress(3, "rollout", 1, 2))
        display.update(Progress(3, "notice", 0, 0, notice=notice))
        display.update(Progress(3, "rollout", 2, 2))
    text = console.file.getvalue()
    assert notice in text
    assert terminal or text.count("step 4 rollout") == 1
