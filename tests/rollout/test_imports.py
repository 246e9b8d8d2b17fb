"""Files of the user's are found by every process of a run, and stand in for no library."""

import logging
import sys

import pytest
import ray
from ray.job_config import JobConfig

from agentrl.rollout.imports import LibrariesFirst

pytestmark = pytest.mark.slow


def where():
    """Import one module that is a library's name and one that only the user has."""
    import mine_alone
    import tokenizers

    import agentrl.rollout.imports  # noqa: F401

    return tokenizers.__file__, mine_alone.__file__


class Actor:
    def where(self):
        return where()


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    (tmp_path / "tokenizers.py").write_text("raise RuntimeError('imported in place of the library')\n")
    (tmp_path / "mine_alone.py").write_text("")
    # The checkout itself, where a command is run beside it.
    (tmp_path / "agentrl").mkdir()
    monkeypatch.chdir(tmp_path)
    # As the command line does.
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        job_config=LibrariesFirst(),
    )
    yield tmp_path
    ray.shutdown()


def test_every_kind_of_worker_imports_libraries_first_and_finds_the_users_modules(working_directory, monkeypatch):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    task = ray.remote(where).remote()
    actor = ray.remote(Actor).options(runtime_env={"env_vars": {"OF_ITS_OWN": "1"}}).remote()
    found = ray.get([task, actor.where.remote()])
    queue = Queue()
    TorchTrainer(
        lambda settings: settings["queue"].put(where()),
        train_loop_config={"queue": queue},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="run", storage_path=str(working_directory / "storage")),
    ).fit()
    found.append(queue.get(timeout=10))
    import tokenizers

    assert found == [(tokenizers.__file__, str(working_directory / "mine_alone.py"))] * 3


def test_ray_still_asks_what_the_settings_answer():
    assert callable(JobConfig._runtime_env_has_working_dir)
