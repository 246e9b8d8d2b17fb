"""Episodes are printed for a person, and what a model wrote is text whatever it looks like."""

import dataclasses
import io

import pytest
from fakes import make_episode
from rich.console import Console

from agentrl.commands.show import episode, show_change, show_episodes, show_files
from agentrl.runs import RunError, write_trajectories
from agentrl.types import ANSWER, INVALID, SEARCH, Action, End, FailureCause, Question, ToolCall, Turn

QUESTION = Question("demo:1", "Who painted [bold]The Night Watch[/]?", ("Rembrandt", "Rembrandt van Rijn"))


def turn(text, kind, argument, calls=(), observation=""):
    return Turn((1, 2, 3), (-0.1,) * 3, text, Action(kind, argument), 0, calls, (4,) * bool(observation), observation)


def looked_up(text="<think> Let me look. </think>\n<search> The  Night Watch </search>"):
    found = ToolCall(SEARCH, {"query": "The Night Watch"}, 0.0124, ("p1", "p2"), (2.0, 1.0))
    observation = (
        "\n<information>\nDoc 1(Title: The Night Watch) A painting of 1642 by Rembrandt.\n"
        f"Doc 2(Title: {'Long' * 40}) {'words ' * 100}\n</information>\n"
    )
    return turn(text, SEARCH, "The Night Watch", (found,), observation)


def make(*turns, **changes):
    made = make_episode("7/0/1", QUESTION, answer="Rembrandt", reward=1.0)
    return dataclasses.replace(made, turns=turns, seconds=2.5, **changes)


def printed(trajectory, width=100, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(episode(trajectory))
    return console.file.getvalue()


def lines(trajectory):
    return [" ".join(line.split()) for line in printed(trajectory, width=1000).splitlines() if line.strip()]


def test_an_episode_reads_from_question_to_reward():
    answered = turn("<think>It is he.</think><answer> Rembrandt </answer>", ANSWER, "Rembrandt")
    found = lines(make(looked_up(), answered))
    assert found[0].startswith("7/0/1 ")
    assert found[1:5] == [
        "question Who painted [bold]The Night Watch[/]?",
        "1 think Let me look.",
        "1 search The Night Watch 12 ms",
        "1 The Night Watch A painting of 1642 by Rembrandt.",
    ]
    title, _, text = found[5].removeprefix("2 ").partition(" ")
    assert (len(title), len(text)) == (48, 160)
    assert title.endswith("…")
    assert text.endswith("…")
    assert found[6:] == [
        "2 think It is he.",
        "answer Rembrandt",
        "gold Rembrandt | Rembrandt van Rijn",
        "reward 1 answered",
        "tokens prompt 2, model 6, environment 1, in 2.5 s",
    ]


def test_a_mistake_is_shown_as_it_was_written_with_what_was_wrong():
    wrong = turn("<serch> x", INVALID, "no tag was closed", None, "\n<information>\nInvalid action\n")
    found = lines(make(wrong, end=End.INVALID, answer=None, reward=0.0))
    assert found[2:5] == ["1 wrote <serch> x", "1 invalid no tag was closed", "answer none"]
    assert "reward 0 invalid" in found


def test_what_the_rewards_came_to_stands_beside_what_the_episode_earned():
    made = make(turn("<answer> x </answer>", ANSWER, "x"))
    mixed = made.with_reward(0.9, {"exact_match": 1.0, "search_cost": -2.0})
    assert "reward 0.9 (exact_match 1, search_cost -2) answered" in lines(mixed)
    assert "reward 1 answered" in lines(made.with_reward(1.0, {"exact_match": 1.0}))
    assert "reward 2 (f1 1) answered" in lines(made.with_reward(2.0, {"f1": 1.0}))


def test_a_search_beyond_the_limit_was_not_executed():
    asked = turn("<search> more </search>", SEARCH, "more")
    assert "1 search more not executed" in lines(make(asked, end=End.TURN_LIMIT, answer=None))


def test_a_failed_episode_says_why():
    assert "reward none environment_failure gone" in lines(
        make(end=End.ENVIRONMENT_FAILURE, cause=FailureCause.RETRIEVER, answer=None, reward=None, failure="gone")
    )


def test_the_cause_and_the_traceback_of_a_failure_stand_below_the_reward():
    failure = "ValueError: no\nTraceback:\n  File x"
    found = lines(make(end=End.ENVIRONMENT_FAILURE, cause=FailureCause.CODE, answer=None, reward=None, failure=failure))
    assert found[-5:-1] == ["reward none environment_failure ValueError: no", "cause code", "Traceback:", "File x"]


def test_a_pipe_gets_every_text_whole_and_no_line_is_padded():
    answered = turn("<think>one\ntwo</think><answer>Rembrandt</answer>", ANSWER, "Rembrandt")
    trajectory = make(looked_up(), answered)
    console = Console(file=io.StringIO(), width=100_000)
    assert show_episodes([trajectory], console) == 1
    shown = console.file.getvalue().splitlines()
    assert shown[0] == "── 7/0/1 ──"
    assert "Long" * 40 in shown[5]
    assert shown[5].endswith("words " * 99 + "words")
    assert shown[6:8] == ["2 think     one", "2 think     two"]
    assert all(line == line.rstrip() for line in shown)


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", "[link=file:///]x", ":smile:"])
def test_markup_of_the_model_is_shown_and_not_obeyed(text):
    answered = turn(f"{text}<answer>{text}</answer>", ANSWER, text)
    shown = lines(make(answered, answer=text))
    assert f"1 think {text}" in shown
    assert f"answer {text}" in shown


def test_control_characters_of_the_model_do_not_reach_the_terminal():
    text = "a\x1b[2Jb\x07c\u202ed\ud800e"
    shown = printed(make(turn(text, INVALID, "?"), answer=None), force_terminal=True, color_system=None)
    assert "a\ufffd[2Jb\ufffdc\ufffdd\ufffde" in shown
    assert "\x1b[2J" not in shown
    shown.encode("utf-8")


@pytest.mark.parametrize("width", [30, 80])
def test_it_fits_the_terminal(width):
    assert max(map(len, printed(make(looked_up()), width=width).splitlines())) <= width


def test_files_are_read_one_after_another_up_to_the_limit(tmp_path):
    files = [tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.zst"]
    for file in files:
        write_trajectories(file, [dataclasses.replace(make(), id=f"{file.name[0]}{i}") for i in range(2)])
    console = Console(file=io.StringIO())
    assert show_files(files, 3, console) == 3
    text = console.file.getvalue()
    assert [name in text for name in ("a0 ", "a1 ", "b0 ", "b1 ")] == [True, True, True, False]
    assert show_files(files, None, console) == 4


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("no")
    with pytest.raises(RunError, match="not a trajectory file"):
        show_files([tmp_path / "x"], None, Console(file=io.StringIO()))


def answered(**answers):
    """Return one evaluation: an episode for each question, with the answer given for its id."""
    return [
        make_episode(f"eval/{name}", Question(name, f"why {name}?", ("so",), dataset="demo"), answer=answer, searches=1)
        for name, answer in answers.items()
    ]


def changed(before, after, **options):
    console = Console(file=io.StringIO(), width=80, **options)
    return show_change(before, after, console), console.file.getvalue()


def test_the_first_question_wrong_before_and_right_after_is_shown_with_both_episodes():
    before = answered(a="So", b="no", c=None, d="so", e="no")
    after = answered(a="so", b="no", c="so", d="no", e="so")
    chosen, text = changed(before, after)
    assert chosen is after[2]
    lines = text.splitlines()
    assert lines[0] == (
        "of 5 questions 2 were wrong before and right after, 1 the other way round; the first of the 2:"
    )
    assert [line.split()[0] for line in lines[1:]] == [
        *("question", "gold", "before", "1", "answer", "after", "1", "answer"),
    ]
    assert [line.split()[-1] for line in lines if line.startswith("answer")] == ["none", "so"]


def test_where_no_question_was_learned_a_line_says_so():
    chosen, text = changed(answered(a="so", b="no"), answered(a="no", b="no"))
    assert chosen is None
    assert text == "of 2 questions 0 were wrong before and right after, 1 the other way round\n"


def test_questions_without_a_score_or_in_one_evaluation_alone_are_left_out():
    before = [
        *answered(a="no", b="no"),
        make_episode("f", Question("c", "?", ("so",), dataset="demo"), end=End.ENVIRONMENT_FAILURE),
    ]
    chosen, text = changed(before, answered(b="so", c="so", d="so"))
    assert chosen.question.id == "b"
    assert text.startswith("of 1 questions 1 were")


def test_both_episodes_of_three_searches_fit_a_screen():
    long = make(looked_up(), looked_up(), looked_up(), turn("", ANSWER, "Rembrandt"))
    wrong = dataclasses.replace(long, answer="Hals", reward=0.0)
    for terminal in (True, False):
        _, text = changed([wrong], [long], force_terminal=terminal, color_system=None)
        assert len(text.splitlines()) <= 40
        assert "[bold]The Night Watch[/]" in text
