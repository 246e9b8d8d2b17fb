"""A sampler over scripted episodes."""

import itertools

from fakes import ScriptedPool, make_episode

from agentrl.config import parse_config
from agentrl.training.sampling import StepSampler
from agentrl.types import End, Question

QUESTIONS = [Question(f"q{number}", f"question {number}", ("gold",)) for number in range(4)]


class Questions(list):
    """A data order that begins again after its end; its length is one pass."""

    def take(self, start, count):
        return [self[position % len(self)] for position in range(start, start + count)]


def sampler(
    make,
    *,
    size=2,
    step=3,
    order=QUESTIONS,
    most=0.5,
    staleness=9,
    history=(),
    pick=min,
    wanted=2,
    training=(),
    seed=0,
    **advantages,
):
    """A sampler over a pool whose episodes are `make(question, name, number)`, where number counts episodes as played."""
    config = parse_config(
        {
            "name": "x",
            "seed": seed,
            "model": {"path": "m"},
            "rollout": {
                "group_size": size,
                "questions_per_step": wanted,
                "max_failed_share": most,
                "max_staleness": staleness,
            },
            "agent": {"temperature": 0.9},
            "advantages": {"estimator": "grpo", **advantages},
            "training": {"steps": 9} | dict(training),
        },
        source="test",
    )
    played = itertools.count()
    pool = ScriptedPool(lambda question, names: [make(question, name, next(played)) for name in names], pick)
    batches, done = [], []
    sampler = StepSampler(
        config, pool, Questions(order), lambda *batch: batches.append(batch), done.append, history=history
    )

    def sample(episodes, step=step):
        return sampler(step, episodes)

    return sample, pool, batches, done


def failed(name, question=None, failure="index lost"):
    return make_episode(name, question, end=End.ENVIRONMENT_FAILURE, failure=failure)


NAMES = [f"q{number}" for number in range(40)]


MANY = [Question(name, name, ("gold",)) for name in NAMES]
