"""What the driver of a run does: it shows what the trainer tells, stops it in good order, and keeps what went wrong."""

import json
import pickle
import queue
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import make_episode
from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import WorkerGroupError

from agentrl.config import ConfigError, parse_config
from agentrl.evaluation.run import Evaluation
from agentrl.progress import Progress
from agentrl.runs import RunFolder, new_checkpoint
from agentrl.training.loop import TrainerError
from agentrl.training.run import train
from agentrl.training.watch import RollBack
from agentrl.types import AgentRLError, EnvironmentFailure

SECRET = "hunter2-swordfish"


def write_questions(folder, count=6):
    rows = [{"id": str(i), "question": f"why {i}?", "golden_answers": ["so"]} for i in range(count)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(tmp_path):
    def make(**sections):
        tree = {
            "name": "run",
            "run_dir": str(tmp_path / "runs"),
            "model": {"path": "some/model"},
            "data": {"root": str(tmp_path), "train": [{"path": "questions.jsonl"}]},
            "retriever": {"kind": "http", "url": "http://127.0.0.1:9/retrieve", "token_env": "RETRIEVER_TOKEN"},
            "training": {"steps": 3},
            "evaluation": {"before": False, "after": False},
        }
        return parse_config(tree | sections, source="test")

    write_questions(tmp_path)
    return make


def checkpoint(folder, step):
    with new_checkpoint(folder.checkpoints, step, keep=100) as aside:
        (aside / "state").mkdir()


class Trainer:
    """A training loop that takes each step in no time and keeps a checkpoint of it; `load()`, `before(step)` may raise."""

    def __init__(self):
        self.load = lambda: None
        self.loaded = threading.Event()
        self.begun = False
        self.before = lambda step: None
        self.resumed = []
        self.asked = []

    def __call__(self, loop_config):
        settings = loop_config["settings"]
        self.asked = [question.id.rpartition(":")[2] for question in settings.evaluation]
        folder = settings.folder
        folder.check_shared()
        self.load()
        self.loaded.set()
        assert settings.orders.get() == "pool"
        self.begun = True
        newest = folder.latest_checkpoint()
        self.resumed.append(newest.name if settings.resume and newest else None)
        done = int(newest.name.split("-")[1]) if settings.resume and newest else 0
        for step in range(done + 1, settings.config.training.steps + 1):
            self.before(step)
            folder.append_trajectories(step, [make_episode(f"{step}/0/0")])
            folder.append_metrics(step, {"loss": 0.5})
            checkpoint(folder, step)
            settings.events.put(Progress(step, "step", step, settings.config.training.steps))
            if not settings.orders.empty():
                raise AgentRLError(f"the training was stopped; --resume continues after step {step}")
        folder.adapter.mkdir()


@pytest.fixture
def trainer(monkeypatch):
    """Stand in for the cluster, and run the training loop of Ray Train in a thread. Returns the loop."""
    loop = Trainer()

    @contextmanager
    def cluster(config, on_phase, *, beside, logs, store_bytes):
        assert logs.is_dir()
        on_phase("engines")
        if beside is not None:
            beside.start()
            beside.check()
        yield SimpleNamespace(pool="pool", indexes=())

    class TorchTrainer:
        def __init__(self, loop, train_loop_config, torch_config, scaling_config, run_config):
            self._loop, self._config = loop, train_loop_config

        def fit(self):
            assert threading.current_thread() is not threading.main_thread()
            try:
                self._loop(self._config)
            except Exception as error:  # noqa: BLE001, as train_loop does
                told = TrainerError(error, traceback.format_exc())
                # As Ray Train sends it.
                raise WorkerGroupError("of a worker", {0: pickle.loads(pickle.dumps(told))}) from None

    monkeypatch.setattr("agentrl.training.run.cluster", cluster)
    monkeypatch.setattr("agentrl.training.process.train_loop", loop)
    monkeypatch.setattr("ray.train.torch.TorchTrainer", TorchTrainer)
    monkeypatch.setattr("ray.util.queue.Queue", queue.Queue)
    return loop


def steps(config):
    return [line["step"] for line in RunFolder(config.folder).read_metrics()]


def test_everything_that_the_trainer_tells_is_shown_in_its_order(config, trainer):
    seen = []
    folder, before, after = train(config(), resume=False, on_progress=seen.append)
    assert (before, after) == (None, None)
    assert [(p.phase, p.step) for p in seen] == [
        ("starting engines", 0),
        ("starting trainer", 0),
        ("step", 1),
        ("step", 2),
        ("step", 3),
    ]
    assert not (folder.path / "error.txt").exists()
    assert "starting engines" in (folder.logs / "driver.log").read_text()


def test_a_run_that_collapses_goes_back_and_on_at_a_lower_rate(config, trainer):
    seen, left = [], [1]

    def before(step):
        if step == 3 and left:
            left.pop()
            raise RollBack("the mean reward fell", 2, 1)

    trainer.before = before
    folder, *_ = train(config(training={"steps": 3, "learning_rate": 0.5}), resume=False, on_progress=seen.append)
    assert trainer.resumed == [None, "checkpoint-1"]
    assert steps(config()) == [1, 2, 3]
    (notice,) = [progress.notice for progress in seen if progress.notice]
    assert notice == "step 2: the mean reward fell; the run goes back to step 1, at a learning rate of 0.25"
    assert [progress.step for progress in seen if progress.phase == "step"] == [1, 2, 2, 3]
    assert notice in (folder.logs / "driver.log").read_text()
    assert [note["to"] for note in folder.read_roll_backs()] == [1]


@pytest.fixture
def evaluates(config, trainer, monkeypatch):
    """A config that evaluates before training; while it does, `during()` is called, which an attribute says."""
    answer = SimpleNamespace(during=lambda: None)

    def evaluate(pool, questions, *, on_done, **settings):
        assert pool == "pool"
        answer.during()
        on_done(1)
        return Evaluation((), ())

    monkeypatch.setattr("agentrl.training.evaluating.evaluate", evaluate)
    answer.config = config(
        data={
            "root": config().data.root,
            "train": [{"path": "questions.jsonl"}],
            "eval": [{"path": "questions.jsonl"}],
        },
        evaluation={"before": True, "after": False},
    )
    return answer


def test_a_trainer_comes_up_while_engines_evaluate_and_begins_after_that(evaluates, trainer):
    begun = []
    evaluates.during = lambda: (trainer.loaded.wait(10), begun.append((trainer.loaded.is_set(), trainer.begun)))
    train(evaluates.config, resume=False, on_progress=lambda progress: None)
    assert begun == [(True, False)]
    assert steps(evaluates.config) == [1, 2, 3]


def test_a_trainer_that_dies_while_engines_evaluate_ends_the_run_in_its_own_words(evaluates, trainer):
    def fail():
        raise EnvironmentFailure("the trainer has no memory")

    trainer.load = fail
    evaluates.during = lambda: time.sleep(0.2)
    with pytest.raises(EnvironmentFailure, match="the trainer has no memory"):
        train(evaluates.config, resume=False, on_progress=lambda progress: None)
    folder = RunFolder(evaluates.config.folder)
    assert "in fail" in (folder.path / "error.txt").read_text()
    assert folder.read_evaluation(0) is None
    trainer.load = lambda: None
    train(evaluates.config, resume=True, on_progress=lambda progress: None)
    assert steps(evaluates.config) == [1, 2, 3]


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), ValueError("an engine does not answer")])
def test_what_ends_the_driver_before_training_waits_for_no_trainer(evaluates, trainer, ending):
    never = threading.Event()

    def fail():
        raise ending

    trainer.load, evaluates.during = never.wait, fail
    with pytest.raises(type(ending)):
        train(evaluates.config, resume=False, on_progress=lambda progress: None)
    never.set()
    assert not trainer.begun


def test_a_ceiling_is_measured_after_training_and_what_it_refuses_is_told_before(evaluates, trainer, monkeypatch):
    tree = evaluates.config.model_dump(mode="json")
    file = Path(tree["data"]["root"], "questions.jsonl")
    gold = {"metadata": {"supporting_titles": ["a"], "gold_passage_ids": ["1"]}}
    rows = [json.loads(line) | gold for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse_config(tree | {"evaluation": tree["evaluation"] | {"ceiling": True}}, source="test")
    taken = []

    def measure(config, indexes, questions, on_done):
        taken.append(steps(config))
        return Evaluation((), ())

    def refuse(config):
        raise ConfigError("no such search")

    monkeypatch.setattr("agentrl.training.run.measure_ceiling", measure)
    monkeypatch.setattr("agentrl.training.run.searcher_codec", refuse)
    with pytest.raises(ConfigError, match="no such search"):
        train(config, resume=False, on_progress=lambda progress: None)
    assert not trainer.begun
    monkeypatch.setattr("agentrl.training.run.searcher_codec", lambda config: None)
    train(config, resume=True, on_progress=lambda progress: None)
    assert taken == [[1, 2, 3]]


def test_a_run_that_has_taken_its_steps_starts_no_trainer(config, trainer):
    train(config(), resume=False, on_progress=lambda progress: None)
    trainer.loaded.clear()
    train(config(), resume=True, on_progress=lambda progress: None)
    assert not trainer.loaded.is_set()


def test_a_trainer_that_is_far_ahead_of_the_driver_waits_and_loses_nothing(config, trainer, monkeypatch):
    monkeypatch.setattr("agentrl.training.process._EVENTS", 2)
    seen = []
    train(config(training={"steps": 40}), resume=False, on_progress=seen.append)
    assert [p.step for p in seen if p.phase == "step"] == list(range(1, 41))


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(143), ValueError("the terminal is gone")])
def test_whatever_ends_the_driver_lets_the_trainer_save_its_state_first(config, trainer, ending):
    seen, told = [], threading.Event()

    def on_progress(progress):
        seen.append(progress.phase)
        if progress.step == 1 and progress.phase == "step":
            told.set()
            raise ending

    # The trainer goes on with its second step until the driver asks it to stop.
    trainer.before = lambda step: step == 1 or told.wait(10)
    with pytest.raises(type(ending)):
        train(config(), resume=False, on_progress=on_progress)
    assert steps(config()) in ([1, 2], [1, 2, 3])
    log = (RunFolder(config().folder).logs / "driver.log").read_text()
    assert "--resume continues after step" in log or "the training had ended" in log
    trainer.before = lambda step: None
    train(config(), resume=True, on_progress=lambda progress: None)
    assert steps(config()) == [1, 2, 3]


def test_a_trainer_that_waits_for_the_driver_to_listen_can_be_stopped(config, trainer, monkeypatch):
    monkeypatch.setattr("agentrl.training.process._EVENTS", 1)
    monkeypatch.setattr("agentrl.training.process._SAVE_SECONDS", 30.0)

    def on_progress(progress):
        if progress.phase == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(training={"steps": 40}), resume=False, on_progress=on_progress)
    assert "the trainer does not answer" not in (RunFolder(config().folder).logs / "driver.log").read_text()


def test_a_failed_run_says_in_one_line_what_failed_and_keeps_the_traceback(config, trainer):
    def fail(step):
        raise EnvironmentFailure("no engine answers") from KeyError("the cause")

    trainer.before = fail
    with pytest.raises(EnvironmentFailure, match="no engine answers") as caught:
        train(config(), resume=False, on_progress=lambda progress: None)
    folder = RunFolder(config().folder)
    assert caught.value.__notes__ == [f"traceback: {folder.path / 'error.txt'}; logs: {folder.logs}"]
    text = (folder.path / "error.txt").read_text()
    assert "KeyError: 'the cause'" in text
    assert "in fail" in text
    trainer.before = lambda step: None
    train(config(), resume=True, on_progress=lambda progress: None)
    assert not (folder.path / "error.txt").exists()


def test_an_error_of_many_lines_becomes_one_line_on_the_screen(config, trainer, agentrl, tmp_path):
    def fail(step):
        raise RuntimeError("CUDA out of memory\nTried to allocate\n20 GiB")

    trainer.before = fail
    file = tmp_path / "config.yaml"
    file.write_text(config().to_yaml())
    status, _, err = agentrl("train", "--config", file)
    assert status == 1
    assert err.count("\n") == 1
    assert "training failed: RuntimeError: CUDA out of memory; traceback: " in err
    assert "20 GiB" in (RunFolder(config().folder).path / "error.txt").read_text()


def test_a_cluster_that_dies_under_the_driver_ends_the_run(config, trainer, monkeypatch):
    class Dead(queue.Queue):
        def empty(self):
            raise RayActorError

        def get(self, timeout=None):
            raise RayActorError

    def fail(step):
        raise RayActorError

    trainer.before = fail
    monkeypatch.setattr("ray.util.queue.Queue", Dead)
    with pytest.raises(AgentRLError, match="training failed: RayActorError"):
        train(config(), resume=False, on_progress=lambda progress: None)
