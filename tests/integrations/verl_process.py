"""Runs in a process of its own, with verl: the advantages that verl's trainer computes, for a batch on standard input.

It imports no plug-in of agentrl's: verl loads them by itself.
"""

import json
import sys

import numpy as np
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from verl import DataProto
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
from verl.trainer.ppo.ray_trainer import compute_advantage

from agentrl.types import AgentRLError


def advantages(batch, overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        algorithm = compose("ppo_trainer", overrides=overrides).algorithm
    tensors = {
        "token_level_rewards": torch.tensor(batch["rewards"], dtype=torch.float32),
        "response_mask": torch.tensor(batch["mask"]),
    }
    data = DataProto.from_dict(tensors, non_tensors={"uid": np.array(batch["uid"], dtype=object)})
    try:
        computed = compute_advantage(data, adv_estimator=algorithm.adv_estimator, config=algorithm)
    except AgentRLError as error:
        return f"{type(error).__name__}: {error}"
    assert torch.equal(computed.batch["advantages"], computed.batch["returns"])
    return computed.batch["advantages"].tolist()


def is_setting(config, path):
    """Whether verl's configuration has the key, set or not."""
    for name in path.split("."):
        if not isinstance(config, DictConfig) or name not in config:
            return False
        # A key without a value, or one that refers to another.
        config = config._get_node(name)
    return True


asked = json.load(sys.stdin)
answers = [advantages(asked["batch"], overrides) for overrides in asked["overrides"]]
with initialize_config_module("verl.trainer.config", version_base=None):
    everything = compose("ppo_trainer")
settings = {name: is_setting(everything, name) for name in asked["settings"]}
print(json.dumps({"registered": sorted(ADV_ESTIMATOR_REGISTRY), "answers": answers, "settings": settings}))
