"""The examples run as they are written, and do what they say."""

import asyncio
import re

import loop
import pytest
import torch

from agentrl.config import load_config
from agentrl.demo.world import write_demo


@pytest.mark.slow
def test_the_loop_takes_steps_that_change_the_adapter_and_its_seed_decides_them(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "QUESTIONS_PER_STEP", 2)
    data = write_demo(tmp_path / "demo").folder
    config = load_config("pocket.yaml", ["engine.kind=transformers"])

    def run(seed):
        lines = []
        policy = asyncio.run(loop.train(config, data, steps=2, seed=seed, report=lines.append))
        return lines, {name: p.detach() for name, p in policy.named_parameters() if "lora_B" in name}

    lines, weights = run(seed=1)
    assert [line[:8] for line in lines] == ["step 1/2", "step 2/2"]
    for line in lines:
        episodes = [int(number) for number in re.findall(r"(\d+) episodes", line)]
        assert sum(episodes) == 2 * loop.GROUP_SIZE
    # A fresh adapter has B = 0.
    assert all(bool(matrix.any()) for matrix in weights.values())
    again, same = run(seed=1)
    assert again == lines
    assert all(torch.equal(same[name], matrix) for name, matrix in weights.items())
    assert run(seed=2)[0] != lines
