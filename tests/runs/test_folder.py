"""A run folder gives back what was written, and is rewound to its last complete checkpoint before it is continued."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from fakes import make_episode

from agentrl.config import parse_config
from agentrl.runs import RunError, RunFolder, new_checkpoint, read_trajectories


def config(folder, **changes):
    tree = {"name": "run", "run_dir": str(folder), "model": {"path": "m"}, "training": {"steps": 9}}
    return parse_config(tree | changes, source="test")


def checkpoint(folder, step):
    with new_checkpoint(folder.checkpoints, step, keep=100) as aside:
        (aside / "state").mkdir()
        (aside / "state" / "adapter_model.safetensors").write_bytes(b"weights")
        (aside / "state" / "trainer_state.json").write_text("{}")


def run_of(tmp_path, steps, checkpoints):
    """Make a run that recorded `steps` steps."""
    folder = RunFolder.create(config(tmp_path))
    for step in range(1, steps + 1):
        folder.append_metrics(step, {"loss": 0.5 * step})
        folder.append_trajectories(step, [make_episode(f"{step}/0/0")])
    for step in checkpoints:
        checkpoint(folder, step)
    return folder


def recorded(folder):
    """Return the steps that metrics, trajectories and checkpoints are there of."""
    trajectories = sorted((folder.path / "trajectories").iterdir())
    return (
        [line["step"] for line in folder.read_metrics()],
        [int(path.name.split("-")[1].split(".")[0]) for path in trajectories],
        sorted(int(path.name.split("-")[1]) for path in folder.checkpoints.iterdir()),
    )


def test_a_new_run_holds_its_resolved_config_and_its_versions(tmp_path):
    made = config(tmp_path)
    folder = RunFolder.create(made)
    assert (folder.path / "config.yaml").read_text() == made.to_yaml()
    assert {"python", "agentrl", "torch"} <= json.loads((folder.path / "versions.json").read_text()).keys()
    assert folder.latest_checkpoint() is None


def test_a_run_is_never_written_over(tmp_path):
    RunFolder.create(config(tmp_path))
    with pytest.raises(RunError, match="holds a run already; continue it with --resume"):
        RunFolder.create(config(tmp_path))


def test_a_run_that_is_not_there_is_not_resumed(tmp_path):
    with pytest.raises(RunError, match="holds no run to resume"):
        RunFolder.reopen(config(tmp_path))


def test_a_resumed_run_forgets_what_came_after_its_last_checkpoint(tmp_path):
    made = run_of(tmp_path, steps=7, checkpoints=[3, 5])
    folder, step = RunFolder.reopen(config(tmp_path))
    assert (folder.path, step) == (made.path, 5)
    assert recorded(folder) == ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [3, 5])


def test_an_evaluation_of_steps_that_are_taken_again_is_forgotten_and_the_ceiling_is_kept(tmp_path):
    folder = run_of(tmp_path, steps=7, checkpoints=[5])
    for after in (0, 5, 7, "ceiling"):
        folder.write_evaluated(after, [make_episode("eval/q")])
        folder.write_evaluation(after, {"sets": []})
    folder, _ = RunFolder.reopen(config(tmp_path))
    assert [folder.read_evaluation(after) is None for after in (0, 5, 7, "ceiling")] == [False, False, True, False]
    assert len(list((folder.path / "evaluations").iterdir())) == 6


def test_checkpoints_are_ordered_by_number(tmp_path):
    folder = run_of(tmp_path, steps=0, checkpoints=[9, 10])
    # As somebody keeps one beside them.
    shutil.copytree(folder.checkpoints / "checkpoint-9", folder.checkpoints / "checkpoint-9-best")
    assert folder.latest_checkpoint().name == "checkpoint-10"


def test_a_checkpoint_that_was_cut_off_does_not_count(tmp_path):
    made = run_of(tmp_path, steps=7, checkpoints=[3])

    def killed():
        with new_checkpoint(made.checkpoints, 6, keep=9) as aside:
            (aside / "state").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    # As a program of before left one.
    (made.checkpoints / "checkpoint-5").mkdir()
    made.close()
    folder, step = RunFolder.reopen(config(tmp_path))
    assert step == 3
    assert recorded(folder) == ([1, 2, 3], [1, 2, 3], [3])


@pytest.mark.parametrize("harm", ["changed", "gone", "cut"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, harm):
    made = run_of(tmp_path, steps=7, checkpoints=[3, 6])
    weights = made.checkpoints / "checkpoint-6" / "adapter_model.safetensors"
    if harm == "gone":
        weights.unlink()
    else:
        weights.write_bytes(b"weighty" if harm == "changed" else b"weigh")
    made.close()
    folder, step = RunFolder.reopen(config(tmp_path))
    assert step == 3
    (said,) = folder.changes
    assert "an older checkpoint than checkpoint-6, which is damaged: " in said
    assert str(weights) in said
    assert recorded(folder) == ([1, 2, 3], [1, 2, 3], [3])


def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(tmp_path):
    made = run_of(tmp_path, steps=7, checkpoints=[3, 6])
    for step in (3, 6):
        (made.checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text("[]")
    made.close()
    with pytest.raises(RunError, match=r"every checkpoint is damaged, so that .*trainer_state.json is not as it was"):
        RunFolder.reopen(config(tmp_path))
    assert recorded(made) == (list(range(1, 8)), list(range(1, 8)), [3, 6])


def test_the_newest_checkpoints_stay(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    for step in (1, 2, 3, 3, 10):
        with new_checkpoint(folder.checkpoints, step, keep=2) as aside:
            (aside / "state").mkdir()
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-3"]


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    for step, best in ((1, None), (2, 1), (3, 1), (4, 3), (5, 3), (6, 3)):
        with new_checkpoint(folder.checkpoints, step, keep=2, best=best) as aside:
            (aside / "state").mkdir()
    assert recorded(folder)[2] == [3, 5, 6]


def test_a_run_that_goes_back_drops_what_it_did_since_and_says_so(tmp_path):
    made = run_of(tmp_path, steps=7, checkpoints=[3, 6])
    made.roll_back(3, 7, "the mean reward fell")
    assert recorded(made) == ([1, 2, 3], [1, 2, 3], [3])
    (note,) = made.read_roll_backs()
    assert (note["after"], note["to"], note["reason"]) == (7, 3, "the mean reward fell")
    made.roll_back(0, 3, "again")
    assert recorded(made) == ([], [], [])
    assert [note["to"] for note in made.read_roll_backs()] == [3, 0]
    made.close()
    assert RunFolder.reopen(config(tmp_path))[1] == 0


@pytest.mark.parametrize("target", [0, 3])
@pytest.mark.parametrize("calls", range(16))
def test_a_run_that_is_killed_while_it_goes_back_has_gone_back_when_it_is_resumed(tmp_path, monkeypatch, calls, target):
    made, left = run_of(tmp_path, steps=7, checkpoints=[3, 5, 6]), calls

    def counted(do):
        def step(*arguments, **options):
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return do(*arguments, **options)

        return step

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr("shutil.rmtree", counted(shutil.rmtree))
        made.roll_back(target, 7, "the mean reward fell")
    made.close()
    noted = bool(made.read_roll_backs())
    folder, step = RunFolder.reopen(config(tmp_path))
    # Before its first file is written nothing has happened.
    assert step == (target if noted else 6)
    assert noted or not calls
    assert recorded(folder) == (
        [*range(1, step + 1)],
        [*range(1, step + 1)],
        [number for number in (3, 5, 6) if number <= step],
    )


def test_without_a_checkpoint_a_run_starts_again_at_its_first_step(tmp_path):
    run_of(tmp_path, steps=2, checkpoints=[])
    folder, step = RunFolder.reopen(config(tmp_path))
    assert step == 0
    assert recorded(folder) == ([], [], [])


@pytest.mark.parametrize("steps", [7, 3])
def test_a_run_whose_checkpoints_are_gone_keeps_what_it_recorded(tmp_path, steps):
    made = run_of(tmp_path, steps=steps, checkpoints=[])
    if steps == 3:
        # Of a finished run, before its first checkpoint was due.
        made.adapter.mkdir()
    with pytest.raises(RunError, match=f"its checkpoints are gone, and without one all {steps} recorded steps"):
        RunFolder.reopen(config(tmp_path))
    assert recorded(made) == ([*range(1, steps + 1)], [*range(1, steps + 1)], [])


def test_a_run_whose_metrics_are_gone_does_not_begin_its_questions_again(tmp_path):
    made = run_of(tmp_path, steps=5, checkpoints=[5])
    made.metrics.unlink()
    with pytest.raises(RunError, match=r"metrics\.jsonl ends with step 0 and the latest checkpoint is of step 5"):
        RunFolder.reopen(config(tmp_path))


def test_a_run_belongs_to_one_process_until_it_is_closed(tmp_path):
    folder = run_of(tmp_path, steps=2, checkpoints=[2])
    code = "import sys, test_folder as t; t.RunFolder.reopen(t.config(sys.argv[1])); print('open')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "another process trains this run" in refused.stderr
    # The trainer's copy does not hold it.
    pickle.loads(pickle.dumps(folder)).close()
    folder.close()
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout == "open\n"


def test_a_run_is_not_rewound_while_a_trainer_that_outlived_its_driver_writes(tmp_path, monkeypatch):
    run_of(tmp_path, steps=5, checkpoints=[3]).close()
    code = """if True:
        import sys, test_folder as t
        folder = t.RunFolder(t.Path(sys.argv[1]) / "run")
        folder.hold_as_trainer()
        print("holds", flush=True)
        sys.stdin.readline()
        folder.append_metrics(6, {"loss": 0.5})
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    trainer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout.readline() == "holds\n"
    with monkeypatch.context() as patch:
        patch.setattr("agentrl.runs.folder._TRAINER_SECONDS", 0.0)
        with pytest.raises(RunError, match="the trainer of an earlier start of this run still writes to it"):
            RunFolder.reopen(config(tmp_path))
    assert len(RunFolder(tmp_path / "run").read_metrics()) == 5
    trainer.stdin.write("\n")
    trainer.stdin.flush()
    folder, step = RunFolder.reopen(config(tmp_path))
    assert trainer.wait(60) == 0
    assert (step, recorded(folder)[0]) == (3, [1, 2, 3])


def test_resuming_twice_changes_nothing_more(tmp_path):
    run_of(tmp_path, steps=7, checkpoints=[3, 5])
    first = recorded(RunFolder.reopen(config(tmp_path))[0])
    assert recorded(RunFolder.reopen(config(tmp_path))[0]) == first


def test_a_metrics_line_that_was_cut_off_is_left_out_and_cleared_away(tmp_path):
    made = run_of(tmp_path, steps=3, checkpoints=[3])
    with made.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in made.read_metrics()] == [1, 2, 3]
    folder, _ = RunFolder.reopen(config(tmp_path))
    folder.append_metrics(4, {"loss": 1.0})
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3, 4]


def test_a_metric_that_is_not_finite_is_null_since_json_has_no_word_for_it(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    folder.append_metrics(1, {"loss": float("nan"), "ratio": float("inf"), "episodes": 8})
    assert folder.metrics.read_text() == '{"step": 1, "loss": null, "ratio": null, "episodes": 8}\n'


def test_trajectories_of_a_step_are_added_as_they_arrive(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    for names in (["1/0/0", "1/0/1"], ["1/1/0"]):
        folder.append_trajectories(1, map(make_episode, names))
    path = folder.path / "trajectories" / "step-00001.jsonl.zst"
    assert list(read_trajectories(path)) == [make_episode(name) for name in ("1/0/0", "1/0/1", "1/1/0")]


def test_a_folder_is_shared_by_whoever_sees_what_the_driver_wrote_when_it_started(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    (tmp_path / "copy").mkdir()
    shutil.copytree(folder.path, tmp_path / "copy" / "run")
    pickle.loads(pickle.dumps(folder)).check_shared()
    again, _ = RunFolder.reopen(config(tmp_path))
    again.check_shared()
    # The folder as it was copied to another machine before the run was resumed.
    shutil.rmtree(folder.path)
    shutil.copytree(tmp_path / "copy" / "run", folder.path)
    with pytest.raises(
        RunError, match=r"node .* does not see the run folder .*/run as the driver wrote it; mount run_dir"
    ):
        again.check_shared()
    shutil.rmtree(folder.path)
    with pytest.raises(RunError, match="does not see the run folder"):
        again.check_shared()


def test_metrics_read_back_as_they_were_written(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    assert folder.read_metrics() == []
    folder.append_metrics(1, {"reward/mean": 0.1, "episodes": 8})
    assert folder.read_metrics() == [{"step": 1, "reward/mean": 0.1, "episodes": 8}]


def test_an_evaluation_is_kept_with_the_episodes_behind_it(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    assert folder.read_evaluation(0) is None
    folder.write_evaluated(0, [make_episode("eval/q")])
    # Without scores it was not finished, and is made again.
    assert folder.read_evaluation(0) is None
    folder.write_evaluation(0, {"sets": []})
    assert folder.read_evaluation(0) == {"sets": []}
    path = folder.path / "evaluations" / "step-00000.jsonl.zst"
    assert list(read_trajectories(path)) == [make_episode("eval/q")]
