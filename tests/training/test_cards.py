"""Trainer processes on one machine compute on cards of their own."""

import os

import pytest


@pytest.mark.slow
def test_each_trainer_process_is_shown_its_own_card_and_no_other(tmp_path, monkeypatch):
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from agentrl.training.cards import OwnCards

    def loop(config):
        from ray.train import get_context

        (config["folder"] / str(get_context().get_world_rank())).write_text(os.environ["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    # Cards that Ray deals out like any others; nothing computes on them.
    ray.init(address="local", num_cpus=3, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        TorchTrainer(
            loop,
            train_loop_config={"folder": tmp_path},
            torch_config=OwnCards(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2, use_gpu=True),
            run_config=RunConfig(storage_path=str(tmp_path / "storage")),
        ).fit()
    finally:
        ray.shutdown()
    assert sorted((tmp_path / rank).read_text() for rank in "01") == ["0", "1"]
