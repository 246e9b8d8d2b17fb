"""Ray for the tests of this folder: a real one, and one in virtual time."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from scripted import Script, make_config
from virtual_ray import Actor, ProcessExit, VirtualRay

from agentrl.rollout import pool, supervisor, worker
from agentrl.rollout.pool import RolloutPool
from agentrl.rollout.supervisor import Limits


@pytest.fixture(scope="module")
def started_ray():
    import ray

    here = Path(__file__).parent
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": f"{here}:{here.parent}"}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def rollouts(monkeypatch, tmp_path, tokenizer):
    """Make a pool on real rollout workers with a scripted engine, in virtual time."""
    ray = VirtualRay()
    for module in (pool, supervisor):
        monkeypatch.setattr(module, "ray", ray)
        monkeypatch.setattr(module, "time", ray)

    def end(status):
        raise ProcessExit

    monkeypatch.setattr(worker.os, "_exit", end)

    def make(workers=2, places=4, **limits):
        script = Script(ray, make_config(tmp_path, tokenizer, engine={"max_concurrent": places}))
        actors = [Actor(ray, script.make_worker) for _ in range(workers)]
        processes = [ray.get(actor.prepare.remote()) for actor in actors]
        settings = {"places": places, "episode_seconds": 30.0, "start_seconds": 300.0, **limits}
        return SimpleNamespace(
            pool=RolloutPool(actors, processes, Limits(**settings)), script=script, actors=actors, ray=ray
        )

    yield make
    ray.close()
