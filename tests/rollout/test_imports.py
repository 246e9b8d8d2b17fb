"""Files of the user's are found by every process of a run, whose output is kept, and stand in for no library."""

import logging
import sys
from pathlib import Path

import pytest
import ray
from ray.job_config import JobConfig

import agentrl
from agentrl.rollout.imports import LibrariesFirst
from agentrl.runs import logs


def where():
    """Import one module that is a library's name and one that only the user has."""
    import mine_alone
    import tokenizers

    return tokenizers.__file__, mine_alone.__file__


class Actor:
    def where(self):
        return where()


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    (tmp_path / "tokenizers.py").write_text("raise RuntimeError('imported in place of the library')\n")
    (tmp_path / "mine_alone.py").write_text("")
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


@pytest.mark.slow
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


def test_agentrl_itself_is_found_before_a_folder_of_its_name_in_the_working_directory(tmp_path, monkeypatch):
    # Such as the folder of a checkout whose installation is editable, where a command is run beside it.
    monkeypatch.setattr(sys, "path", ["/library", str(tmp_path)])
    set_up = LibrariesFirst().runtime_env["worker_process_setup_hook"]
    monkeypatch.setattr(sys, "path", ["/library"])
    set_up()
    assert sys.path == ["/library", str(Path(agentrl.__file__).parents[1]), str(tmp_path)]


def test_a_worker_whose_output_is_kept_finds_the_users_modules_as_well(tmp_path, monkeypatch):
    captured = []
    monkeypatch.setattr(logs, "capture_output", lambda: captured.append(list(sys.path)))
    monkeypatch.setattr(sys, "path", ["/library", str(tmp_path)])
    environment = LibrariesFirst(tmp_path / "logs").runtime_env
    monkeypatch.setattr(sys, "path", ["/library"])
    environment["worker_process_setup_hook"]()
    assert environment["env_vars"] == logs.log_folder(tmp_path / "logs")
    # The path first, since a worker may find agentrl through it alone.
    assert captured == [["/library", str(Path(agentrl.__file__).parents[1]), str(tmp_path)]]


def test_ray_still_asks_what_the_settings_answer():
    assert callable(JobConfig._runtime_env_has_working_dir)
