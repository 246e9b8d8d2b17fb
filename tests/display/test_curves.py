"""Reward and strata by step are read out of metrics and drawn with characters."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from agentrl.display.curves import HEIGHT, Curves
from agentrl.display.history import WINDOW, History


def history(rewards, shares=None):
    lines = [{"step": step, "reward/mean": reward} for step, reward in enumerate(rewards, start=1)]
    for name, values in (shares or {}).items():
        for line, value in zip(lines, values, strict=True):
            line |= {} if value is None else {f"strata/{name}/share": value}
    return History.of(lines)


def drawn(curves, width=80, encoding="utf-8"):
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=width)
    console.print(curves)
    console.file.seek(0)
    return [line.rstrip() for line in console.file.read().splitlines()]


def test_the_moving_mean_is_that_of_the_last_steps():
    seen = history([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    assert WINDOW == 5
    assert seen.means == (0.0, 1 / 2, 1 / 3, 2 / 4, 2 / 5, 3 / 5, 3 / 5)


def test_a_step_without_a_reward_is_left_out_and_a_stratum_without_episodes_has_the_share_0():
    seen = history(
        [0.5, None, 1.0], {"10": [None, 0.5, 1.0], "2": [1.0, 0.5, None], "3+": [None, None, None], "x": [0, 0, 0]}
    )
    assert seen.steps == (1, 3)
    assert seen.means == (0.5, 0.75)
    assert seen.shares == {"2": (1.0, 0.0), "10": (0.0, 1.0), "x": (0.0, 0.0)}


def test_steps_to_come_are_left_free():
    lines = drawn(Curves(history([1.0] * 10, {"0": [1.0] * 10}), 40), width=80)
    assert len(lines) == HEIGHT + 2
    assert max(map(len, lines[1:-1])) == 39 + 3 + 10
    assert lines[-1].endswith("step 40")


def test_each_step_stands_as_many_rows_high_in_a_stratum_as_its_share():
    lines = drawn(Curves(history([0.0] * 2, {"0": [0.5, 0.0], "1": [0.5, 1 / 3], "2": [0.0, 2 / 3]}), 2))
    right = [line[42:] for line in lines[1:-1]]
    assert ["".join(sorted(set(row))) for row in right] == ["12", "12", "12", "02", "01", "01"]
    assert len(right[0]) == 38


def test_a_rising_reward_rises_in_the_plot_also_in_ascii():
    for encoding in ("utf-8", "ascii"):
        rows = [line[5:] for line in drawn(Curves(history([step / 40 for step in range(40)]), 40), 59, encoding)][1:-1]
        starts = [len(row) - len(row.lstrip()) for row in rows if row.strip()]
        assert len(starts) >= HEIGHT - 1
        assert starts == sorted(starts, reverse=True)
    assert "*" in "".join(rows)


def test_rewards_beyond_0_and_1_widen_the_axis():
    lines = drawn(Curves(history([-2.0, 12.5]), 2))
    assert lines[1].startswith("12.50 ")
    assert lines[HEIGHT].startswith("-2.00 ")


def test_strata_whose_names_begin_alike_get_letters():
    names = {"search,answer": [0.5], "search,search": [0.5]}
    assert "a=search,answer" in drawn(Curves(history([0.0], names), 1), 120)[0]


def test_strata_whose_names_begin_with_a_wide_character_get_letters_and_every_line_is_as_wide_as_the_screen():
    names = {"搜": [0.5, 0.5], "答": [0.5, 0.5]}
    heading, *rows, axis = drawn(Curves(history([0.0] * 2, names), 2))
    assert heading.endswith("strata: a=搜  b=答")
    assert [set(row[42:]) for row in rows] == [{"b"}] * 3 + [{"a"}] * 3
    assert {cell_len(line) for line in (*rows, axis)} == {80}


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x1b[2Jb", "a\x9bb", "a\u202eb", "a\ud800b"])
def test_a_character_in_the_name_of_a_stratum_that_would_disturb_the_terminal_is_replaced(name):
    lines = drawn(Curves(history([0.0], {name: [0.5], "x": [0.5]}), 1), 120)
    assert len(lines) == HEIGHT + 2
    assert "a=a\ufffd" in lines[0]
    assert lines[0].endswith("b  x=x") or lines[0].endswith("b  x")
    assert name[1] not in "".join(lines)


@pytest.mark.parametrize(("count", "rest"), [(26, []), (27, ["#=s26"]), (28, ["#=other"]), (40, ["#=other"])])
def test_each_stratum_has_a_letter_and_those_beyond_the_letters_stand_together_as_other(count, rest):
    names = [f"s{place:02}" for place in range(count)]
    heading, *rows, _ = drawn(Curves(history([0.0], {name: [1 / count] for name in names}), 1), 900)
    letters = [f"{chr(ord('a') + place)}={name}" for place, name in enumerate(names[:26])]
    assert heading.partition("strata: ")[2].split("  ") == letters + rest
    # They lie on top, the other 14 of 40 strata being two of six rows.
    assert ["#" in row for row in rows].count(True) == (2 if count == 40 else 0)


def test_nothing_is_drawn_before_the_first_step_or_where_there_is_no_room():
    assert drawn(Curves(History.of([]), 5)) == []
    assert drawn(Curves(history([0.5]), 5), width=10) == []
