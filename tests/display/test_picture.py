"""The picture of a run is made from its metrics and evaluations alone."""

import json
import warnings

import numpy as np
import pytest
from fakes import make_episode

from agentrl.display.history import WINDOW
from agentrl.display.picture import NAME, draw_run, figure_of
from agentrl.evaluation.run import Evaluation, SetResult, score
from agentrl.runs import RunError, RunFolder
from agentrl.types import Question


def run(path, steps=(), evaluated=(), sets=("demo",)):
    folder = RunFolder(path)
    folder.evaluations.mkdir(parents=True)
    for step in steps:
        folder.append_metrics(step, {"reward/mean": step / 10, "strata/0/share": 0.25, "strata/[x]/share": 0.75})
    for step in evaluated:
        scores = [
            score(name, [make_episode("e", Question("q", "?", ("x",), dataset=name), answer="x")]) for name in sets
        ]
        folder.write_evaluation(step, Evaluation(tuple(scores), ()).to_dict())
    return folder


@pytest.mark.parametrize(
    ("steps", "evaluated", "sets"),
    [
        (range(1, 9), (0, 8), ("demo",)),
        # Continued after its end, with an evaluation there, and on two sets.
        (range(1, 9), (0, 4, 8), ("nq", "hotpot")),
        (range(1, 9), (), ()),
        ((), (0,), ("demo",)),
        ((1,), (0,), ("demo",)),
    ],
)
def test_a_picture_is_drawn_of_whatever_a_run_has(tmp_path, steps, evaluated, sets):
    folder = run(tmp_path, steps, evaluated, sets)
    path = draw_run(folder)
    assert path == tmp_path / NAME
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_picture_elsewhere(tmp_path):
    folder = run(tmp_path / "run", range(1, 9), (0, 8))
    assert draw_run(folder).read_bytes() == draw_run(folder, tmp_path / "again.png").read_bytes()


def test_a_run_without_steps_and_evaluations_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"nothing to draw: no steps in metrics\.jsonl and no evaluations"):
        draw_run(run(tmp_path))


STRATA = {"_x": 0.5, "$x$": 0.125, "$a^^$": 0.125, "无": 0.25}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def intervals(bars):
    """What error bars show: where each stands, its height, and its lower and upper bound."""
    marks, _, (lines,) = bars
    bounds = [(low, high) for (_, low), (_, high) in lines.get_segments()]
    return [(x, y, low, high) for x, y, (low, high) in zip(*marks.get_data(), bounds, strict=True)]


def result(name, em, low, high):
    return SetResult(name, 11, 0, em, low, high, em, 1.0, {"answered": 1.0})


def test_the_reward_of_each_step_and_its_moving_mean_are_drawn(tmp_path):
    above = figure_of(run(tmp_path, range(1, 9))).axes[0]
    rewards, means = above.get_lines()
    assert rewards.get_xdata().tolist() == means.get_xdata().tolist() == list(range(1, 9))
    assert rewards.get_ydata() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert means.get_ydata() == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6])
    assert legend(above) == ["reward of a step", f"mean of {WINDOW} steps"]
    assert above.get_legend().legend_handles[0].get_marker() == rewards.get_marker()
    assert above.get_legend().legend_handles[1].get_color() == means.get_color()


@pytest.mark.parametrize("n", [11, 60])
def test_exact_match_of_none_and_of_all_is_drawn_with_its_interval(tmp_path, n):
    folder = run(tmp_path)
    scores = {}
    for step, answer in ((0, "no"), (40, "x")):
        episodes = [make_episode(str(i), Question("q", "?", ("x",), dataset="demo"), answer=answer) for i in range(n)]
        scores[step] = score("demo", episodes)
        folder.write_evaluation(step, Evaluation((scores[step],), ()).to_dict())
    (bars,) = figure_of(folder).axes[0].containers
    none, every = intervals(bars)
    assert none == pytest.approx((0, 0.0, 0.0, scores[0].em_high))
    assert every == pytest.approx((40, 1.0, scores[40].em_low, 1.0))


def test_a_bound_on_the_wrong_side_by_a_rounding_error_is_drawn_at_the_mean(tmp_path):
    folder = run(tmp_path)
    rounded = (result("none", 0.0, 1e-17, 0.25), result("all", 1.0, 0.75, 1 - 1e-16))
    folder.write_evaluation(0, Evaluation(rounded, ()).to_dict())
    none, every = [intervals(bars)[0][1:] for bars in figure_of(folder).axes[0].containers]
    assert none == (0.0, 0.0, 0.25)
    assert every == (1.0, 0.75, 1.0)


def test_each_set_has_a_colour_of_its_own_and_its_ceiling_the_same(tmp_path):
    folder = run(tmp_path)
    folder.write_evaluation(4, Evaluation((result("nq", 0.5, 0.25, 0.75), result("_$a^^$", 0, 0, 0.25)), ()).to_dict())
    ceiling = Evaluation((result("nq", 0.875, 0.5, 1.0), result("_$a^^$", 1.0, 0.5, 1.0)), ()).to_dict()
    (folder.evaluations / "ceiling.json").write_text(json.dumps(ceiling))
    above = figure_of(folder).axes[0]
    (left, em, low, high), (right, *_) = [intervals(bars)[0] for bars in above.containers]
    assert (em, low, high) == (0.5, 0.25, 0.75)
    assert left < 4 < right
    ceilings = [line for line in above.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in ceilings] == [0.875, 1.0]
    colors = [bars[0].get_color() for bars in above.containers]
    assert len(set(colors)) == 2
    assert [line.get_color() for line in ceilings] == colors
    assert legend(above) == [
        "exact match on nq, 95 %",
        "ceiling of nq",
        "exact match on _$a^^$, 95 %",
        "ceiling of _$a^^$",
    ]


def test_strata_are_stacked_as_high_as_their_shares_and_named_as_they_are(tmp_path):
    folder = run(tmp_path)
    for step in (1, 2):
        folder.append_metrics(step, {"reward/mean": 0.5} | {f"strata/{name}/share": s for name, s in STRATA.items()})
    below = figure_of(folder).axes[1]
    spans = [layer.get_paths()[0].get_extents() for layer in below.collections]
    assert [span.intervalx.tolist() for span in spans] == [[1, 2]] * 4
    names = legend(below)[::-1]
    assert sorted(names) == sorted(STRATA)
    tops = np.cumsum([STRATA[name] for name in names])
    assert [span.y1 for span in spans] == pytest.approx(tops)
    assert [span.y0 for span in spans] == pytest.approx([0, *tops[:-1]])
    colors = [tuple(layer.get_facecolor()[0]) for layer in below.collections]
    assert [handle.get_facecolor() for handle in below.get_legend().legend_handles[::-1]] == colors


def test_names_that_are_no_formula_or_not_in_the_font_are_drawn_without_a_warning(tmp_path):
    folder = run(tmp_path / "a$b_$c^^", evaluated=(0,), sets=("$a^^$", "_无"))
    names = [*STRATA, "line\nbreak", "\x1b[2J", "\ud800"]
    for step in (1, 2):
        folder.append_metrics(step, {"reward/mean": 0.5} | {f"strata/{name}/share": 1 / 7 for name in names})
    figure = figure_of(folder)
    assert figure.axes[0].get_title(loc="left") == "a$b_$c^^"
    assert {"line\ufffdbreak", "\ufffd[2J", "\ufffd"} < set(legend(figure.axes[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_run(folder).read_bytes().startswith(b"\x89PNG")
