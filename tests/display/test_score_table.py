"""The table of scores shows whole numbers in any width."""

import io

import pytest
from rich.console import Console

from agentrl.display import evaluation_table
from agentrl.evaluation.run import Evaluation, SetResult

ENDS = {"answered": 0.91, "turn_limit": 0.05, "truncated": 0.04}


def printed(table, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(table)
    return console.file.getvalue().splitlines()


def table(title="t", dataset="2wikimultihopqa-dev", failed=0):
    result = SetResult(dataset, 731, failed, 0.465, 0.397, 0.534, 0.512, 1.84, ENDS, {"engine": failed})
    return evaluation_table(title, dict.fromkeys(("step 0", "step 1200"), Evaluation((result, result), ())))


def test_every_number_of_a_column_is_whole_in_every_width():
    for width in range(5, 121):
        heading, *rows = printed(table(), width)[1:]
        assert max(map(len, rows)) <= width
        text = "\n".join(rows)
        assert text.count("0.465") == 4, width
        for column, values in {
            "n": ["731"],
            "interval": ["0.397 to 0.534"],
            "F1": ["0.512"],
            "searches": ["1.84"],
            "ends": ["answered", "91%", "turn_limit", "5%", "truncated", "4%"],
        }.items():
            shown = 4 if column in heading.split() else 0
            assert [text.count(value) for value in values] == [shown] * len(values), width


def test_columns_go_by_what_they_matter_least():
    shown = [printed(table(), width)[1].split() for width in (80, 60, 50, 40, 30, 16, 8)]
    everything = ["set", "when", "n", "EM", "95", "%", "interval", "F1", "searches", "ends"]
    assert shown == [*(everything[:last] for last in (10, 9, 8, 7, 4)), ["when", "EM"], ["EM"]]


def test_a_folded_name_is_shown_whole():
    lines = printed(table(), 40)
    assert "".join(line[:7].strip() for line in lines[3:]).count("2wikimultihopqa-dev") == 4


@pytest.mark.parametrize("name", ["run[lr1]", "[/b]", ":cat:", "a\\"])
def test_names_are_shown_as_they_are(name):
    lines = printed(table(name, name, failed=3), 120)
    assert lines[0].strip() == name
    assert [line.split(" ")[0] for line in lines[3:7]] == [name] * 4
    assert lines[7].strip() == f"{name}, step 0: 731 (+3 failed): engine 3"


def test_a_character_in_a_name_that_would_disturb_the_terminal_is_replaced():
    lines = printed(table("a\x1b[2Jb", "c\nd"), 120)
    assert lines[0].strip() == "a\ufffd[2Jb"
    assert [line.split(" ")[0] for line in lines[3:]] == ["c\ufffdd"] * 4
