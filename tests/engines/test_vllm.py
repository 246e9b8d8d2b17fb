"""What only vLLM can get wrong."""

import pytest
from test_contract import Elsewhere, config, generate_all

from agentrl.engines.base import Sampling

pytestmark = pytest.mark.slow


def test_seeded_prompts_of_more_tokens_than_a_step_takes_are_all_answered(tiny_model):
    """vLLM would take such prompts in parts, and die of that on a CPU."""
    settings = config("vllm")
    settings = settings.model_copy(update={"engine": settings.engine.model_copy(update={"max_concurrent": 32})})
    engine = Elsewhere(settings, tiny_model)
    try:
        prompts = [[(7 * n + i) % 200 + 5 for i in range(220)] for n in range(32)]
        found = engine(generate_all, prompts, [Sampling(8, 1.0, seed=n) for n in range(32)])
    finally:
        engine.shut_down()
    assert len(found) == 32
    assert all(generation.token_ids for generation in found)
