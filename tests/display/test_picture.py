"""The picture of a run is made from its metrics and evaluations alone."""

import pytest
from fakes import make_episode

from agentrl.display.picture import NAME, draw_run
from agentrl.evaluation.run import Evaluation, score
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
