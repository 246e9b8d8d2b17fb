"""A run of the trainer with a tiny model and a scripted pool: what a step does, what is kept when something ends the run,
and that a resumed run goes on as if nothing had happened."""

import errno
import json
import pickle
import queue
import random
import socket
import threading

import pytest
import torch
from fakes import ScriptedPool
from ray.exceptions import RaySystemError
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_llama

from agentrl.config import parse_config
from agentrl.data.stream import QuestionStream
from agentrl.runs import RunFolder
from agentrl.training import session
from agentrl.training.loop import TrainerError, TrainSettings, train_loop
from agentrl.training.session import TrainingFailed
from agentrl.training.trainer import StratifiedTrainer
from agentrl.types import ANSWER, Action, End, EnvironmentFailure, Question, Trajectory, Turn

STEPS = 4


class Engines(ScriptedPool):
    """Engines whose episodes depend on their names alone; half of them are right, and turns have the newest version.

    `before_sampling(step)` and `before_publishing(version)` may raise.
    """

    def __init__(self, before_sampling=lambda step: None, before_publishing=lambda version: None, logprob=-5.0):
        super().__init__(self._episodes)
        self.published = []
        self._before_sampling, self._before_publishing = before_sampling, before_publishing
        self._logprob = logprob

    @property
    def asked(self):
        return [question.id for question, _ in self.requests]

    def publish(self, version, files):
        self._before_publishing(version)
        self.published.append((version, load(files["adapter_model.safetensors"])))

    def stream(self, **settings):
        self._before_sampling(len(self.published))
        return super().stream(**settings)

    def _episodes(self, question, names):
        version, made = self.published[-1][0], []
        for number, name in enumerate(names):
            rng = random.Random(name)
            ids = tuple(rng.randrange(10, 250) for _ in range(3))
            turn = Turn(ids, (self._logprob,) * 3, "", Action(ANSWER, "a"), version)
            made.append(
                Trajectory(name, question, (5, 6, 7), (turn,), End.ANSWERED, answer="a", reward=float(number % 2))
            )
        return made


def fails_at(number, error):
    def before(now):
        if now == number:
            raise error

    return before


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = str(tmp_path_factory.mktemp("model"))
    made = tiny_llama(len(tokenizer), hidden=32, max_position_embeddings=512, tie_word_embeddings=True)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_config(model, run_dir, **training):
    """Checkpoints only where a test asks for them."""
    return parse_config(
        {
            "name": "run",
            "run_dir": str(run_dir),
            "model": {"path": model, "lora": {"rank": 4, "alpha": 8.0}},
            "rollout": {"group_size": 2, "questions_per_step": 2},
            "agent": {"max_episode_tokens": 256},
            "training": {"steps": STEPS, "checkpoint_every": 50, "learning_rate": 1e-2, "threads": 1} | training,
        },
        source="test",
    )


def run(config, pool, resume=False, orders=None, events=None, evaluation=()):
    """Train on what `pool` samples; `orders` may hold orders that come after the one to begin."""
    folder = RunFolder.reopen(config)[0] if resume else RunFolder.create(config)
    questions = QuestionStream([([Question(f"q{i:02}", "t", ("a",)) for i in range(40)], 1.0)], 0)
    orders = orders or queue.Queue()
    orders.put(pool)
    settings = TrainSettings(config, folder, questions, events or queue.Queue(), resume, orders, evaluation)
    ended = None
    try:
        train_loop({"settings": settings})
    except TrainerError as error:
        ended = error
    if ended is not None:
        # The driver gets it so, and reads where it came from as text.
        assert "session.py" in str(pickle.loads(pickle.dumps(ended)))
        raise ended.error


def steps_recorded(config):
    return [line["step"] for line in RunFolder(config.folder).read_metrics()]


def final_weights(config):
    return load((RunFolder(config.folder).adapter / "adapter_model.safetensors").read_bytes())


def equal(one, other):
    return one.keys() == other.keys() and all(other[name].equal(tensor) for name, tensor in one.items())


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"kl": {"coefficient": 0.1, "estimator": "k2"}},
        {"schedule": "linear", "tokens_per_micro_batch": 1},
        {"updates_per_batch": 2, "minibatches": 2},
        {"optimizer": {"name": "muon", "weight_decay": 0.1}},
    ],
)
def unbroken(request, model, tmp_path_factory):
    """The settings, the pool and the final weights of a run that nothing interrupts."""
    config, pool = make_config(model, tmp_path_factory.mktemp("unbroken"), **request.param), Engines()
    run(config, pool)
    return request.param, pool, final_weights(config)


def test_a_step_publishes_its_weights_before_it_samples_and_records_what_it_did(model, tmp_path):
    config, pool = make_config(model, tmp_path, steps=2, tokens_per_micro_batch=1), Engines()
    events = queue.Queue()
    run(config, pool, events=events)
    assert [version for version, _ in pool.published] == [0, 1]
    assert steps_recorded(config) == [1, 2]
    for line in RunFolder(config.folder).read_metrics():
        assert line["seconds/train"] > 0
        assert line["seconds/wait"] > 0
        assert line["seconds/publish"] > 0
    shown = [(event.step, event.phase, event.done) for event in list(events.queue) if not event.notice]
    step = [("rollout", 0), ("rollout", 2), ("rollout", 4), ("train", 1), ("train", 2), ("train", 3), ("train", 4)]
    assert shown == [(0, *s) for s in step] + [(1, "step", 1)] + [(1, *s) for s in step] + [(2, "step", 2)]


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(unbroken, model, tmp_path):
    settings, whole, weights = unbroken
    config = make_config(model, tmp_path, **settings)
    first, second = Engines(before_sampling=fails_at(3, EnvironmentFailure("it stays away"))), Engines()
    with pytest.raises(TrainingFailed, match=r"it stays away; --resume continues after step 2, from .*checkpoint-2"):
        run(config, first)
    run(config, second, resume=True)
    assert second.published[0][0] == 2
    assert first.asked + second.asked == whole.asked
    assert steps_recorded(config) == [1, 2, 3, 4]
    assert equal(final_weights(config), weights)


def test_a_finished_run_that_is_given_more_steps_ends_as_a_run_that_had_them_from_the_start(model, tmp_path):
    whole, first, second = Engines(), Engines(), Engines()
    run(make_config(model, tmp_path / "whole"), whole)
    run(make_config(model, tmp_path / "grown", steps=2), first)
    run(make_config(model, tmp_path / "grown"), second, resume=True)
    assert first.asked + second.asked == whole.asked
    assert steps_recorded(make_config(model, tmp_path / "grown")) == [1, 2, 3, 4]
    assert equal(
        final_weights(make_config(model, tmp_path / "grown")), final_weights(make_config(model, tmp_path / "whole"))
    )


@pytest.mark.parametrize("trained", [1, 3])
def test_a_run_that_was_cut_off_within_a_step_takes_that_step_again_as_an_unbroken_one(model, tmp_path, trained):
    config = make_config(model, tmp_path, tokens_per_micro_batch=1)
    whole = make_config(model, tmp_path / "whole", tokens_per_micro_batch=1)
    run(whole, Engines())

    class Events(queue.Queue):
        def put(self, event):
            super().put(event)
            if (event.step, event.phase, event.done) == (2, "train", trained):
                raise ConnectionError("nobody listens")

    with pytest.raises(TrainingFailed, match="nobody listens; --resume continues after step 2"):
        run(config, Engines(), events=Events())
    run(config, Engines(), resume=True)
    assert equal(final_weights(config), final_weights(whole))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("of a user's estimator"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RaySystemError("the object store is gone"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
        SystemExit(143),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ends_the_run_the_state_of_the_last_whole_step_is_kept(model, tmp_path, error):
    config = make_config(model, tmp_path)
    with pytest.raises((TrainingFailed, type(error))) as caught:
        run(config, Engines(before_sampling=fails_at(3, error)))
    said = "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "--resume continues after step 2" in said
    assert str(error) in said
    assert caught.value is error or caught.value.__cause__ is error
    assert RunFolder(config.folder).latest_checkpoint().name == "checkpoint-2"


def test_the_message_is_one_line_however_much_an_error_says(model, tmp_path):
    error = RuntimeError("of a library\nTraceback:\n  and so on")
    with pytest.raises(TrainingFailed) as caught:
        run(make_config(model, tmp_path), Engines(before_sampling=fails_at(1, error)))
    assert str(caught.value).startswith("RuntimeError: of a library; there is no checkpoint yet")
    assert caught.value.__cause__ is error


def test_a_run_that_fails_before_its_first_step_says_that_nothing_is_kept(model, tmp_path):
    with pytest.raises(
        TrainingFailed, match="ValueError: early; there is no checkpoint yet, and --resume begins at the"
    ):
        run(make_config(model, tmp_path), Engines(before_sampling=fails_at(1, ValueError("early"))))


def test_a_state_that_cannot_be_saved_hides_neither_the_error_nor_the_older_checkpoint(model, tmp_path, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StratifiedTrainer, "save_checkpoint", full)
    config = make_config(model, tmp_path, checkpoint_every=2)
    with pytest.raises(TrainingFailed) as caught:
        run(config, Engines(before_sampling=fails_at(4, ValueError("of an estimator"))))
    assert "of an estimator" in str(caught.value)
    assert "the state after step 3 cannot be saved: OSError: [Errno 28] No space left" in str(caught.value)
    assert "--resume continues after step 2" in str(caught.value)


@pytest.mark.parametrize("version", [1, 3])
def test_a_step_whose_weights_cannot_be_published_is_not_taken_again(model, tmp_path, version):
    config = make_config(model, tmp_path)
    whole, second = Engines(), Engines()
    first = Engines(before_publishing=fails_at(version, EnvironmentFailure("workers died")))
    run(make_config(model, tmp_path / "whole"), whole)
    with pytest.raises(TrainingFailed, match="workers died"):
        run(config, first)
    assert steps_recorded(config) == list(range(1, version + 1))
    run(config, second, resume=True)
    assert first.asked + second.asked == whole.asked
    assert steps_recorded(config) == [1, 2, 3, 4]


def test_a_step_that_could_not_be_recorded_is_not_kept(model, tmp_path, monkeypatch):
    """A resumed run reads from the records which questions were used."""
    config = make_config(model, tmp_path, checkpoint_every=2)
    append = RunFolder.append_metrics

    def full_disk(self, step, values):
        if step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, step, values)

    monkeypatch.setattr(RunFolder, "append_metrics", full_disk)
    with pytest.raises(TrainingFailed, match=r"No space left on device; the step under way .* continues after step 2"):
        run(config, Engines())
    assert RunFolder(config.folder).latest_checkpoint().name == "checkpoint-2"


def test_weights_that_the_optimizer_had_begun_to_change_are_not_kept(model, tmp_path, monkeypatch):
    config = make_config(model, tmp_path)

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", out_of_memory)
    with pytest.raises(
        TrainingFailed, match=r"out of memory; the step under way had begun .* is not kept; there is no"
    ):
        run(config, Engines())
    assert RunFolder(config.folder).latest_checkpoint() is None


def test_a_run_whose_adapter_could_not_be_written_writes_it_when_it_is_resumed(model, tmp_path, monkeypatch):
    config, second = make_config(model, tmp_path), Engines()
    with monkeypatch.context() as patch:
        patch.setattr(
            session.TrainingSession, "save_policy", lambda self, reason: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(TrainingFailed, match="full; --resume continues after step 4"):
            run(config, Engines())
    assert not RunFolder(config.folder).adapter.exists()
    run(config, second, resume=True)
    assert second.asked == []
    assert final_weights(config)


def test_a_trainer_that_is_asked_to_stop_before_it_may_begin_publishes_and_samples_nothing(model, tmp_path):
    orders, pool = queue.Queue(), Engines()
    orders.put(None)
    with pytest.raises(
        TrainingFailed, match="stopped before it began; there is no checkpoint yet, and --resume begins"
    ):
        run(make_config(model, tmp_path), pool, orders=orders)
    assert (pool.published, pool.asked) == ([], [])


def test_a_trainer_that_is_asked_to_stop_while_it_waits_for_a_rollout_keeps_its_state(model, tmp_path):
    orders, sampling, never = queue.Queue(), threading.Event(), threading.Event()

    def hangs(number):
        if number == 3:
            sampling.set()
            never.wait(60)

    config = make_config(model, tmp_path)
    threading.Thread(target=lambda: sampling.wait(60) and orders.put(None), daemon=True).start()
    with pytest.raises(TrainingFailed, match="the training was stopped; --resume continues after step 2"):
        run(config, Engines(before_sampling=hangs), orders=orders)
    never.set()


def test_a_trainer_that_is_asked_to_stop_within_a_step_keeps_its_state(model, tmp_path, monkeypatch):
    """The stop comes after the second episode of the third step; the step is not finished."""
    orders = queue.Queue()
    fail = session.Prefetch.fail
    noticed = threading.Event()
    monkeypatch.setattr(session.Prefetch, "fail", lambda self, error: (fail(self, error), noticed.set()))

    class Events(queue.Queue):
        def put(self, event):
            super().put(event)
            if (event.step, event.phase, event.done) == (2, "train", 2):
                orders.put(None)
                assert noticed.wait(60)

    events = Events()
    with pytest.raises(TrainingFailed, match="the training was stopped; --resume continues after step 2"):
        run(make_config(model, tmp_path, tokens_per_micro_batch=1), Engines(), orders=orders, events=events)
    assert [(event.step, event.phase) for event in list(events.queue)][-2:] == [(2, "train"), (2, "train")]


def test_a_log_probability_that_is_not_finite_ends_the_run_before_the_update(model, tmp_path):
    config = make_config(model, tmp_path, checkpoint_every=1)
    with pytest.raises(TrainingFailed, match=r"step 1: the difference between .* is inf; the optimizer did not take"):
        run(config, Engines(logprob=float("-inf")))
    assert steps_recorded(config) == []


def test_a_metric_that_is_not_finite_is_left_out_of_the_record(model, tmp_path, monkeypatch):
    log = StratifiedTrainer.log
    monkeypatch.setattr(
        StratifiedTrainer,
        "log",
        lambda self, logs, start=None: log(
            self, logs | {"x/nan": float("nan"), "x/inf": float("inf"), "x": 1.0}, start
        ),
    )
    config = make_config(model, tmp_path, steps=1)
    run(config, Engines())

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    (line,) = RunFolder(config.folder).metrics.read_text().splitlines()
    metrics = json.loads(line, parse_constant=refuse)
    assert metrics["x"] == 1.0
    assert not {"x/nan", "x/inf"} & metrics.keys()


def test_publishing_and_saving_ask_nobody_about_a_model_from_the_hub(model, tmp_path, monkeypatch):
    load_policy = session.load_policy

    def from_hub(*arguments):
        policy = load_policy(*arguments)
        policy.get_base_model().config._name_or_path = "owner/model"
        policy.peft_config["default"].base_model_name_or_path = "owner/model"
        return policy

    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(session, "load_policy", from_hub)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = make_config(model, tmp_path, checkpoint_every=1, kl={"coefficient": 0.1})
    run(config, Engines())
    assert asked == []
    assert final_weights(config)


def test_tensorboard_shows_each_step_of_a_resumed_run_once(model, tmp_path):
    config = make_config(model, tmp_path, checkpoint_every=2)
    with pytest.raises(TrainingFailed):
        run(config, Engines(before_sampling=fails_at(4, KeyError("gone"))))
    # As after a kill: the third step was taken, and no checkpoint holds it.
    folder = RunFolder(config.folder)
    (folder.latest_checkpoint() / "sha256.json").unlink()
    run(config, Engines(), resume=True)
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]


def test_a_fresh_adapter_depends_on_the_seed_alone(model, tmp_path):
    pools = [Engines(), Engines()]
    for number, pool in enumerate(pools):
        run(make_config(model, tmp_path / str(number), steps=1), pool)
    assert equal(pools[0].published[0][1], pools[1].published[0][1])
