"""What vLLM is told about its cards, and how it is sent to sleep, with a stand-in for the library."""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest

from agentrl.config import parse_config
from agentrl.engines import environment, make_engine
from agentrl.engines.base import Sampling
from agentrl.types import EngineDied, EnvironmentFailure


def config(model=(), **engine):
    rollout = {"workers": 1}
    model = {"path": "x/y"} | dict(model)
    return parse_config({"name": "t", "device": "cuda", "model": model, "engine": engine, "rollout": rollout}, "test")


class Llm:
    """AsyncLLM as far as it is used here; `release` lets its generations end."""

    def __init__(self, cache):
        self.calls = []
        self.asked = 0
        self.release = asyncio.Event()
        self.vllm_config = SimpleNamespace(cache_config=cache)

    async def generate(self, prompt, parameters, request_id, lora_request):
        self.asked += 1
        await self.release.wait()
        self.calls.append("generate")
        answer = SimpleNamespace(token_ids=[1], logprobs=[{1: SimpleNamespace(logprob=-1.0)}], finish_reason="stop")
        yield SimpleNamespace(outputs=[answer])

    async def sleep(self, level):
        self.calls.append(("sleep", level))

    async def wake_up(self):
        self.calls.append("wake")


@pytest.fixture
def vllm(monkeypatch):
    """Stand in for vLLM; returns what its engine was made with, under `arguments` and `llm`."""
    made = SimpleNamespace(cache=SimpleNamespace(num_gpu_blocks=64, block_size=16))

    class AsyncLLM:
        @staticmethod
        def from_engine_args(arguments):
            made.arguments, made.llm = arguments, Llm(made.cache)
            return made.llm

    modules = {
        "vllm": {"AsyncEngineArgs": lambda **named: named, "SamplingParams": SimpleNamespace},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "vllm.v1.engine.exceptions": {"EngineDeadError": type("EngineDeadError", (Exception,), {})},
        "vllm.lora.request": {"LoRARequest": lambda name, number, folder: SimpleNamespace(lora_path=folder)},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=0)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return made


def made_engine(vllm, model=(), **engine):
    asyncio.run(_make(config(model, **engine)))
    return vllm.arguments


async def _make(settings):
    return make_engine(settings, "model")


def test_an_engine_takes_its_part_of_the_cards_that_it_has(vllm):
    found = made_engine(vllm, gpus=2)
    assert (found["tensor_parallel_size"], found["gpu_memory_utilization"]) == (2, 0.85)
    assert not found["enable_sleep_mode"]
    found = made_engine(vllm, gpus=0.5, sleep=True)
    assert (found["tensor_parallel_size"], found["gpu_memory_utilization"]) == (1, 0.425)
    assert found["enable_sleep_mode"]
    assert made_engine(vllm, gpus=0.5, gpu_memory_utilization=0.6)["gpu_memory_utilization"] == 0.6


@pytest.mark.parametrize(("tokens", "at_once"), [(None, 3), (500, 2)])
def test_generations_wait_for_room_in_a_cache_as_large_as_vllm_says(vllm, tokens, at_once):
    # 1,024 tokens by its blocks, of which a hybrid model needs more than one for a token.
    vllm.cache.kv_cache_size_tokens = tokens

    async def play():
        engine = await _make(config())
        asked = [asyncio.create_task(engine.generate([5] * 200, Sampling(40))) for _ in range(3)]
        await asyncio.sleep(0.05)
        started = vllm.llm.asked
        vllm.llm.release.set()
        await asyncio.gather(*asked)
        return started

    assert asyncio.run(play()) == at_once


def test_vllm_quantises_the_model_where_the_config_says_so(vllm):
    assert made_engine(vllm)["quantization"] is None
    found = made_engine(vllm, {"dtype": "bfloat16", "quantization": "nf4"})
    assert (found["quantization"], found["dtype"]) == ("bitsandbytes", "bfloat16")


def test_only_an_engine_that_sleeps_is_kept_from_the_users_allocator_settings():
    assert environment(config(gpus=0.5, sleep=True))["PYTORCH_CUDA_ALLOC_CONF"] == ""
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment(config(gpus=0.5))


def test_an_engine_falls_asleep_after_what_is_under_way_and_answers_nothing_until_it_wakes(vllm):
    async def play():
        engine = await _make(config(gpus=0.5, sleep=True))
        llm = vllm.llm
        under_way = asyncio.create_task(engine.generate([5], Sampling(4)))
        await asyncio.sleep(0)
        falling = asyncio.create_task(engine.sleep())
        await asyncio.sleep(0.05)
        assert llm.calls == []
        llm.release.set()
        assert (await under_way).token_ids == (1,)
        await falling
        await engine.sleep()
        assert llm.calls == ["generate", ("sleep", 1)]
        for call in (engine.generate([5], Sampling(4)), engine.load_adapter(1, {})):
            with pytest.raises(EnvironmentFailure, match="sleeps; wake it first"):
                await call
        await engine.wake()
        await engine.wake()
        await engine.generate([5], Sampling(4))
        assert llm.calls == ["generate", ("sleep", 1), "wake", "generate"]

    asyncio.run(play())


def test_an_engine_that_cannot_wake_is_dead(vllm):
    async def play():
        engine = await _make(config(gpus=0.5, sleep=True))
        await engine.sleep()

        async def fail():
            raise RuntimeError("CUDA out of memory")

        vllm.llm.wake_up = fail
        with pytest.raises(EngineDied, match="cannot wake: CUDA out of memory"):
            await engine.wake()

    asyncio.run(play())
