"""What every engine promises, checked against forward passes of transformers and PEFT on a tiny random model."""

import asyncio
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import httpx
import pytest

from agentrl.config import parse_config
from agentrl.engines import environment, make_engine
from agentrl.engines.base import Generation, Sampling
from agentrl.types import EnvironmentFailure

LIMIT = 256
PLACES = 8
# As many prompts as go beyond what vLLM computes in one step must be able to start together.
VLLM_PLACES = 32


@pytest.fixture(
    scope="module", params=["transformers", "openai", pytest.param("vllm", marks=[pytest.mark.slow])], ids=str
)
def engine(request, tiny_model):
    handle = {"transformers": Here, "openai": Served, "vllm": Elsewhere}[request.param](
        config(request.param), tiny_model
    )
    yield handle
    handle.shut_down()


@pytest.fixture
def adaptable(engine):
    if isinstance(engine, Served):
        pytest.skip("an endpoint decides what it serves")
    return engine


@pytest.fixture(scope="module")
def reference(tiny_model):
    return Reference(tiny_model)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Eight prompts of different lengths, the longest of which fill several cache blocks with the same start."""
    start = tokenizer("Question: who wrote the book about the engine? " * 3)["input_ids"]
    return [[*start[: 12 * (n + 1)], 40 + n] for n in range(8)]


def test_ids_have_one_logprob_each_and_end_at_max_tokens(engine, prompts):
    for limit in (1, 7):
        found = engine(generate, prompts[0], Sampling(limit, 1.0, seed=1))
        assert len(found.token_ids) == len(found.logprobs) == limit
        assert found.finish == "length"
        assert all(logprob <= 0 for logprob in found.logprobs)


def test_logprobs_are_those_of_the_full_softmax_at_the_sampling_temperature(engine, reference, prompts):
    for temperature in (0.7, 1.0, 1.3):
        found = engine(generate_all, prompts, [Sampling(24, temperature, seed=n) for n in range(len(prompts))])
        for prompt, generation in zip(prompts, found, strict=True):
            expected = reference.logprobs(engine.weights, prompt, generation.token_ids, temperature)
            assert generation.logprobs == pytest.approx(expected.tolist(), abs=1e-3)


def test_ids_are_drawn_from_the_full_softmax(engine, reference, prompts):
    """The mean log-probability of what was drawn lies within four standard errors of minus the entropy."""
    temperature, count = 1.5, 400
    found = engine(generate_all, [prompts[0]] * count, [Sampling(1, temperature, seed=n) for n in range(count)])
    logprobs = reference.softmax(engine.weights, prompts[0], temperature).log()
    expected = (logprobs.exp() * logprobs).sum()
    spread = (logprobs.exp() * (logprobs - expected) ** 2).sum().sqrt()
    drawn = sum(generation.logprobs[0] for generation in found) / count
    assert abs(drawn - expected) <= 4 * spread / count**0.5


def test_temperature_zero_takes_the_likeliest_id_with_logprobs_at_temperature_one(engine, reference, prompts):
    for prompt, found in zip(prompts, engine(generate_all, prompts, [Sampling(16, 0.0)] * len(prompts)), strict=True):
        assert found.token_ids == reference.likeliest(engine.weights, prompt, found.token_ids)
        expected = reference.logprobs(engine.weights, prompt, found.token_ids, 1.0)
        assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-3)


def test_a_seed_gives_the_same_ids_alone_and_among_others(engine, prompts):
    alone = [engine(generate, prompts[n], Sampling(24, 1.0, seed=n)) for n in (0, 5)]
    among = engine(generate_all, prompts, [Sampling(24, 1.0, seed=n) for n in range(len(prompts))])
    for n, generation in zip((0, 5), alone, strict=True):
        assert among[n].token_ids == generation.token_ids
        assert among[n].logprobs == pytest.approx(generation.logprobs, abs=1e-4)
    assert len({generation.token_ids for generation in among}) == len(prompts)


def test_stop_strings_end_a_generation_and_stay_in_it(engine, codec, prompts):
    stop = ("e", "</search>")
    found = engine(generate_all, prompts * 2, [Sampling(48, 1.0, stop, seed=n) for n in range(16)])
    ended = [g for g in found if "e" in codec.decode(g.token_ids)]
    assert ended
    for generation in ended:
        assert generation.finish == "stop"
        assert "e" not in codec.decode(generation.token_ids[:-1])


def test_the_end_token_is_the_last_of_the_ids(engine, tokenizer, prompts):
    found = engine(generate_all, prompts * 6, [Sampling(64, 1.0, seed=n) for n in range(48)])
    ended = [g for g in found if tokenizer.eos_token_id in g.token_ids]
    assert ended
    for generation in ended:
        assert generation.finish == "stop"
        assert generation.token_ids.index(tokenizer.eos_token_id) == len(generation.token_ids) - 1
    assert all(len(g.token_ids) == 64 for g in found if g.finish == "length")


def test_more_requests_than_places_are_all_answered(engine, prompts):
    count = 5 * VLLM_PLACES
    found = engine(
        generate_all, prompts * (count // len(prompts)), [Sampling(1 + n % 9, 1.0, seed=n) for n in range(count)]
    )
    assert [len(g.token_ids) <= 1 + n % 9 for n, g in enumerate(found)] == [True] * count


def test_seeded_prompts_of_more_tokens_than_a_step_takes_are_all_answered(engine):
    """vLLM would take such prompts in parts, and die of that on a CPU: 32 times 220 tokens, and 4,096 a step."""
    prompts = [[(7 * n + i) % 200 + 5 for i in range(220)] for n in range(32)]
    found = engine(generate_all, prompts, [Sampling(8, 1.0, seed=n) for n in range(32)])
    assert all(generation.token_ids for generation in found)


def test_cancelled_requests_leave_the_engine_to_the_others(engine, prompts):
    outcomes, found = engine(generate_after_cancelling, prompts)
    assert all(isinstance(outcome, (asyncio.CancelledError, Generation)) for outcome in outcomes)
    assert [len(generation.token_ids) for generation in found] == [8] * PLACES


def test_what_the_model_cannot_continue_is_an_environment_failure_and_nothing_more(engine, prompts):
    for bad in ([], prompts[0] * 40, [3, 100_000]):
        with pytest.raises(EnvironmentFailure):
            engine(generate, bad, Sampling(8))
    assert len(engine(generate, prompts[0], Sampling(8, seed=1)).token_ids) == 8


def test_each_version_gives_what_a_fresh_model_with_its_weights_gives(adaptable, adapters, reference, prompts):
    """The prompts are the same for every version, so an entry of another version's cache would be found and show."""
    seen = set()
    for version, files in ((1, adapters[0]), (2, adapters[1]), (2, adapters[2]), (3, adapters[0])):
        adaptable.load(version, files)
        found = adaptable(generate_all, prompts, [Sampling(16, 0.0)] * len(prompts))
        for prompt, generation in zip(prompts, found, strict=True):
            assert generation.adapter_version == version
            assert generation.token_ids == reference.likeliest(files, prompt, generation.token_ids)
            expected = reference.logprobs(files, prompt, generation.token_ids, 1.0)
            assert generation.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
        seen.add(found[-1].token_ids)
    assert len(seen) == 3


def test_a_generation_under_way_keeps_its_weights_through_three_changes(adaptable, adapters, reference, prompts):
    versions = {11: adapters[0], 12: adapters[1], 13: adapters[2]}
    adaptable.load(10, adapters[1])
    found = adaptable(generate_while_loading, prompts[1:], versions)
    adaptable.weights = versions[13]
    versions[10] = adapters[1]
    began = [version for version in (10, 11, 12, 13) for _ in prompts[1:]]
    for prompt, version, generation in zip(prompts[1:] * 4, began, found, strict=True):
        assert generation.adapter_version == version
        expected = reference.logprobs(versions[generation.adapter_version], prompt, generation.token_ids, 1.0)
        assert generation.logprobs == pytest.approx(expected.tolist(), abs=1e-3)


def test_an_engine_that_slept_gives_what_it_gave_before(engine, prompts):
    before = engine(generate_all, prompts, [Sampling(8, 0.0)] * len(prompts))
    engine(sleep)
    engine(wake)
    after = engine(generate_all, prompts, [Sampling(8, 0.0)] * len(prompts))
    assert [g.token_ids for g in after] == [g.token_ids for g in before]
    assert [g.adapter_version for g in after] == [g.adapter_version for g in before]


def test_a_damaged_adapter_is_an_environment_failure_and_the_weights_stay(adaptable, adapters, reference, prompts):
    adaptable.load(20, adapters[0])
    with pytest.raises(EnvironmentFailure):
        adaptable(load, 21, {"adapter_config.json": b"{", "adapter_model.safetensors": b""})
    found = adaptable(generate, prompts[0], Sampling(8, seed=1))
    assert found.adapter_version == 20
    expected = reference.logprobs(adapters[0], prompts[0], found.token_ids, 1.0)
    assert found.logprobs == pytest.approx(expected.tolist(), abs=1e-3)


def test_whole_weights_replace_model_and_adapter(adaptable, adapters, reference, prompts, other_model):
    """Afterwards an adapter works on the new weights, and nothing of the old ones' cache is found."""
    other = Reference(other_model)
    adaptable(generate_all, prompts, [Sampling(4, 0.0)] * len(prompts))
    adaptable(load_weights, 30, other_model)
    for version, files in ((30, None), (31, adapters[0])):
        if files is not None:
            adaptable.load(version, files)
        found = adaptable(generate_all, prompts, [Sampling(16, 0.0)] * len(prompts))
        for prompt, generation in zip(prompts, found, strict=True):
            assert generation.adapter_version == version
            expected = other.logprobs(files, prompt, generation.token_ids, 1.0)
            assert generation.logprobs == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("kind", ["transformers", pytest.param("vllm", marks=[pytest.mark.slow])])
def test_an_adapter_without_numbers_is_an_environment_failure(kind, tiny_model, adapters, prompts):
    """Of an engine of its own, since what such weights leave in vLLM's cache on a CPU spoils later generations."""
    import torch
    from safetensors.torch import load as read
    from safetensors.torch import save

    weights = read(adapters[0]["adapter_model.safetensors"])
    spoiled = save({name: torch.full_like(value, torch.nan) for name, value in weights.items()})
    engine = {"transformers": Here, "vllm": Elsewhere}[kind](config(kind), tiny_model)
    engine.load(1, adapters[0] | {"adapter_model.safetensors": spoiled})
    for temperature in (1.0, 0.0):
        with pytest.raises(EnvironmentFailure, match="not finite"):
            engine(generate, prompts[0], Sampling(4, temperature, seed=1))
    engine.shut_down()


def test_close_ends_what_is_under_way_and_nothing_is_answered_after_it(engine, prompts):
    outcomes = engine(generate_while_closing, prompts)
    assert all(isinstance(outcome, (Generation, EnvironmentFailure)) for outcome in outcomes)
    with pytest.raises(EnvironmentFailure):
        engine(generate, prompts[0], Sampling(8))
    engine(close)


async def generate(engine, prompt, sampling):
    return await engine.generate(prompt, sampling)


async def generate_all(engine, prompts, samplings):
    return await asyncio.gather(*(engine.generate(p, s) for p, s in zip(prompts, samplings, strict=True)))


async def under_way(engine, prompts, sampling):
    """Return one task for each prompt once the engine has taken them up: it has answered a short request that came last."""
    tasks = [asyncio.create_task(engine.generate(prompt, sampling)) for prompt in prompts]
    await asyncio.create_task(engine.generate(prompts[0], Sampling(1, seed=1)))
    return tasks


async def generate_after_cancelling(engine, prompts):
    tasks = await under_way(engine, prompts[1:], Sampling(LIMIT, 1.0, seed=3))
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes, await generate_all(engine, prompts, [Sampling(8, seed=1)] * PLACES)


async def generate_while_loading(engine, prompts, versions):
    tasks = []
    for version, files in versions.items():
        tasks += await under_way(engine, prompts, Sampling(32, 1.0, seed=version))
        await engine.load_adapter(version, files)
    return [*await asyncio.gather(*tasks), *await generate_all(engine, prompts, [Sampling(8, seed=5)] * len(prompts))]


async def load_weights(engine, version, folder):
    await engine.load_weights(version, folder)


async def generate_while_closing(engine, prompts):
    tasks = await under_way(engine, prompts[1:], Sampling(LIMIT, 1.0, seed=3))
    await engine.close()
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)


async def load(engine, version, files):
    await engine.load_adapter(version, files)


async def sleep(engine):
    await engine.sleep()
    await engine.sleep()


async def wake(engine):
    await engine.wake()
    await engine.wake()


async def close(engine):
    await engine.close()


def config(kind, **endpoint):
    places = VLLM_PLACES if kind == "vllm" else PLACES
    engine = {"kind": kind, "kv_cache_gib": 1, "threads": 1, "max_concurrent": places}
    if kind == "openai":
        engine["endpoint"] = {"url": "http://server/v1", "model": "tiny", "prompt": "ids", "retries": 0} | endpoint
    return parse_config(
        {"name": "t", "model": {"path": "."}, "agent": {"max_episode_tokens": LIMIT}, "engine": engine}, "test"
    )


class Here:
    """An engine on an event loop of this process. `weights` are the adapter that it holds, None for the model alone."""

    def __init__(self, settings, model):
        self.weights = None
        self._loop = asyncio.new_event_loop()
        self._engine = self._loop.run_until_complete(self._make(settings, model))

    async def _make(self, settings, model):
        return make_engine(settings, model)

    def __call__(self, function, *args):
        return self._loop.run_until_complete(function(self._engine, *args))

    def load(self, version, files):
        self(load, version, files)
        self.weights = files

    def shut_down(self):
        self(close)
        self._loop.close()


class Served(Here):
    """An OpenAIEngine before a server that answers, like vLLM's, with ids: the transformers engine behind a transport."""

    async def _make(self, settings, model):
        from agentrl.engines.openai import OpenAIEngine

        self._backend = make_engine(config("transformers"), model)
        return OpenAIEngine(model, settings.engine, transport=httpx.MockTransport(self._answer))

    async def _answer(self, request):
        asked = json.loads(request.content)
        assert (request.url.path, asked["model"], asked["top_p"]) == ("/v1/completions", "tiny", 1.0)
        assert asked["include_stop_str_in_output"]
        assert asked["return_token_ids"]
        sampling = Sampling(asked["max_tokens"], asked["temperature"], tuple(asked["stop"]), asked.get("seed"))
        try:
            found = await self._backend.generate(asked["prompt"], sampling)
        except EnvironmentFailure as error:
            return httpx.Response(400, json={"error": str(error)})
        choice = {
            "text": "",
            "finish_reason": found.finish,
            "token_ids": found.token_ids,
            "logprobs": {"token_logprobs": found.logprobs},
        }
        return httpx.Response(200, json={"choices": [choice]})

    def shut_down(self):
        self._loop.run_until_complete(self._backend.close())
        super().shut_down()


class Elsewhere(Here):
    """An engine in a process of its own, with the environment that it needs and nothing imported before it."""

    def __init__(self, settings, model):
        self.weights = None
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._process.submit(_make_there, settings, model).result(timeout=200)

    def __call__(self, function, *args):
        return self._process.submit(_call_there, function, args).result(timeout=120)

    def shut_down(self):
        self(close)
        self._process.shutdown()


_there = None


def _make_there(settings, model):
    global _there
    os.environ.update(environment(settings))
    _there = Here(settings, model)


def _call_there(function, args):
    return _there(function, *args)


class Reference:
    """Forward passes of transformers over a prompt and what followed, with an adapter's files or with none."""

    def __init__(self, model):
        self._folder = model
        self._alone = self._load()
        self._adapted = self._files = None

    def _load(self):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self._folder).eval()

    def _logits(self, files, prompt, ids):
        import torch

        model = self._alone if files is None else self._with(files)
        with torch.no_grad():
            return model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]

    def _with(self, files):
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from safetensors.torch import load

        if self._adapted is None:
            settings = json.loads(files["adapter_config.json"])
            names = ("r", "lora_alpha", "target_modules")
            self._adapted = get_peft_model(self._load(), LoraConfig(**{name: settings[name] for name in names})).eval()
        if files is not self._files:
            set_peft_model_state_dict(self._adapted, load(files["adapter_model.safetensors"]))
            self._files = files
        return self._adapted

    def logprobs(self, files, prompt, ids, temperature):
        import torch

        logprobs = (self._logits(files, prompt, ids) / temperature).log_softmax(-1)
        return logprobs.gather(1, torch.tensor(ids)[:, None]).squeeze(1)

    def softmax(self, files, prompt, temperature):
        return (self._logits(files, prompt, [0])[0] / temperature).softmax(-1)

    def likeliest(self, files, prompt, ids):
        return tuple(self._logits(files, prompt, ids).argmax(-1).tolist())
