"""A run that ends anywhere, without a chance to save anything, and is resumed comes to the very numbers of an unbroken one.

Everything below Ray is real: the transformers engine samples with the weights that the trainer publishes.
"""

import asyncio
import dataclasses
import json
import queue
import random
import threading
from contextlib import closing, contextmanager, nullcontext

import pytest
from fakes import PassageRetriever, passage
from leavings import left_by
from test_session import model  # noqa: F401, a fixture

from agentrl.config import parse_config
from agentrl.data.stream import QuestionStream
from agentrl.engines.transformers import TransformersEngine
from agentrl.rollout.local import LocalPool
from agentrl.rollout.worker import RolloutWorker
from agentrl.runs import RunFolder
from agentrl.training import session
from agentrl.training.loop import TrainerError, TrainSettings, train_loop
from agentrl.training.proof import WeightsNotUsed
from agentrl.types import Question

pytestmark = pytest.mark.slow

STEPS = 6


class Killed(BaseException):
    """Stands for a SIGKILL: nobody answers it."""


class Worker(RolloutWorker):
    def _make_retriever(self, identity, indexes):
        return PassageRetriever(passage("A title", "a text"))


class Pool(LocalPool):
    """One engine in this process; a random model is never right, so that rewards are drawn from what it wrote."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.counters = {}
        self.used, self.closed = threading.Lock(), False

    def sample(self, *arguments, **settings):
        """A killed process samples no more; here the thread that works ahead may be about to."""
        with self.used:
            if self.closed:
                raise Killed
            return super().sample(*arguments, **settings)

    def stream(self, *, temperature, on_stall):
        return _Stream(self, temperature)


class _Stream:
    def __init__(self, pool, temperature):
        self._pool, self._temperature, self._waiting, self._given = pool, temperature, [], 0

    def add(self, requests):
        self._waiting += requests

    def __next__(self):
        (group,) = self._pool.sample([self._waiting[self._given]], self._temperature)
        self._given += 1
        scored = [dataclasses.replace(t, reward=float(sum(t.completion_ids) % 2)) for t in group]
        return self._given - 1, scored

    def close(self):
        pass


@contextmanager
def engine(config):
    with asyncio.Runner() as runner:
        worker = Worker(config, "", ())
        runner.run(worker.prepare())
        pool = Pool(worker, runner)
        try:
            yield pool
        finally:
            with pool.used:
                pool.closed = True
                runner.run(worker.close())


class Events(queue.Queue):
    """Counts what the trainer tells, and ends the run at the event of a number."""

    def __init__(self, last=None):
        super().__init__()
        self.told, self._last = 0, last

    def put(self, event):
        self.told += 1
        if self.told == self._last:
            raise Killed


LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0}


ADVANTAGES = {
    "stratum": "test_session_exact:length_class",
    "options": {"alpha": {"start": 0.9, "end": 0.3, "rule": "progress", "window": 1}},
}
# A baseline that is learnt from step to step, and strata that are drawn.
LEARNT = {
    "estimator": "value_baseline",
    "stratum": "random_like:test_session_exact:length_class",
    "options": {"ridge": {"start": 0.9, "end": 0.3, "rule": "progress", "window": 1}},
}


def make_config(model, run_dir, training, lora=LORA, advantages=ADVANTAGES):  # noqa: F811
    return parse_config(
        {
            "name": "run",
            "run_dir": str(run_dir),
            "model": {"path": model, "lora": lora},
            "retriever": {"kind": "http", "url": "http://127.0.0.1:9"},
            # One request at a time: what runs beside an episode changes its log-probabilities by rounding.
            "engine": {"kind": "transformers", "threads": 1, "max_concurrent": 1},
            "rollout": {"group_size": 4, "questions_per_step": 2},
            "agent": {"max_turns": 2, "max_turn_tokens": 8, "max_episode_tokens": 256, "instruction": ""},
            "advantages": advantages,
            "training": {
                "steps": STEPS,
                "checkpoint_every": 2,
                "learning_rate": 2e-2,
                "warmup_steps": 3,
                "threads": 1,
                "tokens_per_micro_batch": 64,
            }
            | training,
            "evaluation": {"every": 3},
        },
        source="test",
    )


def length_class(trajectory):
    """A stratum of what a random model does by chance."""
    return len(trajectory.completion_ids) % 3


def run(config, resume=False, last=None):
    events = Events(last)
    with pytest.raises(TrainerError) if last else nullcontext() as ended:
        run_to_its_end(config, resume, events)
    assert ended is None or isinstance(ended.value.error, Killed)
    return events.told


def run_to_its_end(config, resume=False, events=None):
    folder = RunFolder.reopen(config)[0] if resume else RunFolder.create(config)
    questions = QuestionStream([([Question(f"q{i:02}", f"why {i}?", ("a",)) for i in range(40)], 1.0)], 0)
    asked = [Question(f"e{i}", f"what {i}?", ("a",), "held out") for i in range(2)]
    orders = queue.Queue()
    with closing(folder), engine(config) as pool:
        orders.put(pool)
        settings = TrainSettings(config, folder, questions, events or Events(), resume, orders, asked)
        train_loop({"settings": settings})


@pytest.fixture(
    scope="module",
    params=[
        ({},),
        ({"schedule": "linear", "kl": {"coefficient": 0.1, "where": "reward"}, "optimizer": {"name": "muon"}},),
        ({"updates_per_batch": 2, "minibatches": 2},),
        ({}, None),
        ({"schedule": "linear", "kl": {"coefficient": 0.1}}, None),
        ({}, LORA | {"dora": True}),
        ({}, LORA, LEARNT),
    ],
    ids=[
        "one update",
        "linear, kl and muon",
        "four updates",
        "all weights",
        "all weights, linear and kl",
        "dora",
        "learnt baseline",
    ],
)
def unbroken(request, model, tmp_path_factory):  # noqa: F811
    config = make_config(model, tmp_path_factory.mktemp("unbroken"), *request.param)
    told = run(config)
    return request.param, told, left_by(RunFolder(config.folder))


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_cut_off_anywhere_and_resumed_leaves_what_an_unbroken_one_leaves(
    unbroken,
    model,  # noqa: F811
    tmp_path,
    monkeypatch,
    seed,
):
    settings, told, whole = unbroken
    # What a killed process does not do.
    monkeypatch.setattr(session.TrainingSession, "keep_state", lambda self: "")
    config, draw = make_config(model, tmp_path, *settings), random.Random(f"{seed} {settings}")
    run(config, last=draw.randint(1, told))
    # Twice, because a resumed run must be as good to resume. It has a step at least, which tells more than this.
    run(config, resume=True, last=draw.randint(1, 4))
    run(config, resume=True)
    found = left_by(RunFolder(config.folder))
    for what in whole:
        assert found[what] == whole[what], what


def test_the_runs_compared_have_what_a_resume_could_lose(unbroken):
    """Weights that move, a schedule of the rate, an option that was adapted, evaluations, and tokens that differ by step."""
    _, _, whole = unbroken
    assert len({line["learning_rate"] for line in whole["metrics"]}) > 1
    (option,) = (name for name in whole["metrics"][0] if name.startswith("advantages/option/"))
    assert len({line[option] for line in whole["metrics"]}) > 1
    assert all(line["grad_norm"] > 0 for line in whole["metrics"])
    assert [name for name in whole["scores"] if name.startswith("step")] == ["step-00003.json"]
    assert len({str(step) for step in whole["episodes"]}) == STEPS
    assert json.loads(whole["scores"]["step-00003.json"])["sets"][0]["n"] == 2


def test_engines_sample_with_the_weights_that_were_trained(unbroken):
    """Otherwise they would drift apart: these updates change each log-probability by far more."""
    _, _, whole = unbroken
    assert [versions for step in whole["episodes"] for _, _, _, versions, _, _ in step if set(versions) == {STEPS - 1}]
    assert max(line["logprobs/difference_max"] for line in whole["metrics"]) < 1e-3


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
def test_a_run_stops_whose_engines_ignore_the_weights_published_to_them(
    model,  # noqa: F811
    tmp_path,
    monkeypatch,
    kl_coefficient,
):
    async def ignore(self, version, folder):
        self._version = version

    monkeypatch.setattr(TransformersEngine, "load_weights", ignore)
    config = make_config(model, tmp_path, {"kl": {"coefficient": kl_coefficient}}, None)
    with pytest.raises(TrainerError) as ended:
        run_to_its_end(config)
    assert isinstance(ended.value.error.__cause__, WeightsNotUsed)
