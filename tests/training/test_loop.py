"""What the training loop leaves on the disk when something ends it, and that a resumed one goes on from there."""

import queue
import random

import pytest
from safetensors.torch import load
from tiny import tiny_llama

from agentrl.config import parse_config
from agentrl.data.stream import QuestionStream
from agentrl.runs import RunFolder
from agentrl.training.loop import TrainSettings, train_loop
from agentrl.types import Action, ActionKind, End, EnvironmentFailure, Question, Trajectory, Turn

pytestmark = pytest.mark.slow

STEPS = 4


class Pool:
    """Answers at random; `dies_at` is the version whose publishing fails, `stops_at` the step that cannot be sampled."""

    def __init__(self, dies_at=None, stops_at=None):
        self.counters = {}
        self.dies_at, self.stops_at = dies_at, stops_at
        self.asked, self.published = [], []

    def publish(self, version, files):
        if version == self.dies_at:
            raise EnvironmentFailure("workers died")
        self.published.append((version, load(files["adapter_model.safetensors"])))

    def sample(self, requests, temperature, on_done, on_stall):
        if len(self.published) == self.stops_at:
            raise EnvironmentFailure("the retriever stays away")
        self.asked += [question.id for question, _ in requests]
        return [[self._episode(question, name, i) for i, name in enumerate(names)] for question, names in requests]

    def _episode(self, question, name, number):
        rng = random.Random(name)
        turn = Turn(tuple(rng.randrange(10, 250) for _ in range(3)), (-5.0,) * 3, "", Action(ActionKind.ANSWER, "a"), 0)
        return Trajectory(name, question, (5, 6, 7), (turn,), End.ANSWERED, answer="a", reward=float(number % 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = str(tmp_path_factory.mktemp("model"))
    made = tiny_llama(len(tokenizer), hidden=32, max_position_embeddings=512, tie_word_embeddings=True)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(model, tmp_path, **training):
    return parse_config(
        {
            "name": "run",
            "run_dir": str(tmp_path),
            "model": {"path": model, "lora": {"rank": 4, "alpha": 8.0}},
            "rollout": {"group_size": 2, "questions_per_step": 2},
            "agent": {"max_episode_tokens": 256},
            "training": {"steps": STEPS, "checkpoint_every": 2, "micro_batch": 2, "learning_rate": 1e-2} | training,
        },
        source="test",
    )


def run(config, pool, resume=False):
    folder = RunFolder.reopen(config)[0] if resume else RunFolder.create(config)
    questions = QuestionStream([([Question(f"q{i:02}", "t", ("a",)) for i in range(40)], 1.0)], 0)
    train_loop({"settings": TrainSettings(config, folder, pool, questions, queue.Queue(), resume)})


def steps_recorded(config):
    return [line["step"] for line in RunFolder(config.folder).read_metrics()]


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_resumed_run_goes_on_with_the_weights_it_had(model, tmp_path, kl):
    config = settings(model, tmp_path, kl_coefficient=kl)
    first, second = Pool(stops_at=3), Pool()
    with pytest.raises(EnvironmentFailure, match="stays away"):
        run(config, first)
    run(config, second, resume=True)
    (version, last), (resumed, weights) = first.published[-1], second.published[0]
    assert version == resumed == 2
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert all(weights[name].equal(tensor) for name, tensor in last.items())
    assert steps_recorded(config) == [1, 2, 3, 4]


@pytest.mark.parametrize("version", [1, 3])
def test_a_step_whose_weights_cannot_be_published_is_not_taken_again(model, tmp_path, version):
    config = settings(model, tmp_path)
    whole, first, second = Pool(), Pool(dies_at=version), Pool()
    run(settings(model, tmp_path / "whole"), whole)
    with pytest.raises(EnvironmentFailure, match="workers died"):
        run(config, first)
    assert steps_recorded(config) == list(range(1, version + 1))
    run(config, second, resume=True)
    assert first.asked + second.asked == whole.asked
    assert steps_recorded(config) == [1, 2, 3, 4]


def test_a_run_that_died_after_its_last_step_writes_its_adapter_when_it_is_resumed(model, tmp_path):
    config = settings(model, tmp_path)
    first, second = Pool(dies_at=STEPS), Pool()
    with pytest.raises(EnvironmentFailure, match="workers died"):
        run(config, first)
    folder = RunFolder(config.folder)
    assert not folder.adapter.exists()
    run(config, second, resume=True)
    assert second.asked == []
    written = load((folder.adapter / "adapter_model.safetensors").read_bytes())
    assert all(second.published[0][1][name].equal(tensor) for name, tensor in written.items())


def test_a_fresh_adapter_depends_on_the_seed_alone(model, tmp_path):
    pools = [Pool(), Pool()]
    for number, pool in enumerate(pools):
        run(settings(model, tmp_path / str(number), steps=1), pool)
    one, other = (pool.published[0][1] for pool in pools)
    assert all(one[name].equal(tensor) for name, tensor in other.items())
