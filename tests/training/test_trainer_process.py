"""What the driver asks Ray Train for."""

import queue
from types import SimpleNamespace

import pytest
import ray

from agentrl.config import ConfigError, parse_config
from agentrl.training.loop import TrainerError, train_loop
from agentrl.training.process import TrainerProcess


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Start the trainer of a config and return the ScalingConfig and RunConfig that Ray Train was given."""

    def start(device="cuda", dtype="bfloat16", **engine):
        found = SimpleNamespace()

        class TorchTrainer:
            def __init__(self, loop, train_loop_config, torch_config, scaling_config, run_config):
                found.scaling, found.run = scaling_config, run_config

            def fit(self):
                """Train nothing."""

        monkeypatch.setattr("ray.train.torch.TorchTrainer", TorchTrainer)
        monkeypatch.setattr("ray.util.queue.Queue", lambda maxsize=0: queue.Queue())
        for name in ("ENABLE_STATE_TRACKING", "ENABLE_PREEMPTION_WATCHER", "WORKER_GROUP_START_TIMEOUT_S"):
            monkeypatch.setenv(f"RAY_TRAIN_{name}", "0")
        tree = {"name": "t", "device": device, "model": {"path": "x/y", "dtype": dtype}, "training": {"steps": 1}}
        config = parse_config(tree | {"engine": engine}, "test")
        TrainerProcess(config, SimpleNamespace(path=tmp_path), None, [], resume=False).start()
        return found

    return start


@pytest.mark.parametrize(("gpus", "left"), [(1, 1.0), (4, 1.0), (0.5, 0.5), (0.3, 0.7)])
def test_the_trainer_asks_for_a_card_or_for_what_the_engines_leave_of_one(asked, gpus, left):
    found = asked(gpus=gpus)
    assert found.scaling.use_gpu
    assert found.scaling.resources_per_worker == {"GPU": left}
    assert found.scaling.num_workers == 1


def test_on_a_cpu_it_asks_for_no_card(asked):
    found = asked("cpu", "float32")
    assert not found.scaling.use_gpu
    assert "GPU" not in found.scaling._resources_per_worker_not_none


def test_segments_grow_in_the_trainers_process_on_a_card_alone(asked):
    name = "PYTORCH_CUDA_ALLOC_CONF"
    assert asked().run.worker_runtime_env["env_vars"][name] == "expandable_segments:True"
    assert name not in asked("cpu", "float32").run.worker_runtime_env["env_vars"]


def test_a_trainer_does_not_start_on_cards_that_are_not_its_own(monkeypatch):
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": ["1"]})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_local_world_size=lambda: 1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    config = parse_config({"name": "t", "device": "cuda", "model": {"path": "x/y"}, "training": {"steps": 1}}, "test")
    settings = SimpleNamespace(config=config, folder=SimpleNamespace(check_shared=lambda: None))
    with pytest.raises(TrainerError) as raised:
        train_loop({"settings": settings})
    assert isinstance(raised.value.error, ConfigError)
    assert "the trainer's process was given GPU 1 by Ray" in str(raised.value.error)
