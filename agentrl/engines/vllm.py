"""vLLM's AsyncLLM as an engine: continuous batching, prefix reuse and LoRA versions swapped at run time.

The process that makes a `VllmEngine` must have `environment(...)` in its environment before it imports vllm.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentrl.config import EngineConfig
from agentrl.engines.base import Generation, Sampling
from agentrl.types import EnvironmentFailure

# The adapter ranks that vLLM can reserve space for.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# Prefixes are reused in whole blocks. vLLM's default on a CPU is 128 tokens, about the length of one observation.
_CPU_BLOCK = 32


def environment(settings: EngineConfig, device: str) -> dict[str, str]:
    """Return the environment variables that an engine process needs from its start."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "OMP_NUM_THREADS": str(settings.threads),
            # vLLM compiles small sampling functions at the first request, half a minute that an eager CPU engine never regains.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return variables


class VllmEngine:
    """One AsyncLLM in this process. Must be made inside a running event loop."""

    def __init__(
        self, model: str, settings: EngineConfig, *, device: str, dtype: str, max_tokens: int, lora_rank: int, seed: int
    ) -> None:
        """`max_tokens` bounds prompt and completion of a request together."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        on_device: dict[str, Any] = (
            {
                "block_size": _CPU_BLOCK,
                "gpu_memory_utilization": 0.3,
                "enforce_eager": True,
                "worker_extension_cls": "agentrl.engines.vllm_cpu_lora.CpuLoraExtension",
            }
            if device == "cpu"
            else {"gpu_memory_utilization": settings.gpu_memory_utilization, "tensor_parallel_size": settings.gpus}
        )
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=model,
                dtype=dtype,
                max_model_len=max_tokens,
                max_num_seqs=settings.max_concurrent,
                enable_prefix_caching=True,
                enable_lora=True,
                max_lora_rank=next(rank for rank in _LORA_RANKS if rank >= lora_rank),
                max_loras=2,
                # The trainer's ratio needs log-probabilities at the sampling temperature, not of the raw logits.
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                seed=seed,
                **on_device,
            )
        )
        self._requests = itertools.count()
        self._adapters: dict[int, Any] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="agentrl-adapters-"))
        self._version = 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """See `Engine.generate`. Before the first adapter is loaded, version 0 is the model alone."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        version = self._version
        parameters = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            logprobs=0,
            seed=sampling.seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        last = None
        try:
            async for output in self._llm.generate(
                {"prompt_token_ids": list(prompt_ids)},
                parameters,
                request_id=f"r{next(self._requests)}",
                lora_request=self._adapters.get(version),
            ):
                last = output
        except (EngineDeadError, EngineGenerateError) as error:
            raise EnvironmentFailure(f"the vLLM engine failed: {error}") from error
        if last is None:
            raise EnvironmentFailure("the vLLM engine ended a request without an answer")
        completion = last.outputs[0]
        ids = tuple(completion.token_ids)
        logprobs = tuple(table[token].logprob for token, table in zip(ids, completion.logprobs, strict=True))
        finish = "length" if completion.finish_reason == "length" else "stop"
        return Generation(ids, logprobs, finish, version)

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        """See `Engine.load_adapter`. The version before stays loaded for the requests that still use it."""
        from vllm.lora.request import LoRARequest

        folder = self._folder / f"v{version}"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        request = LoRARequest(f"policy-v{version}", version + 1, str(folder))
        if version in self._adapters:
            await self._llm.remove_lora(version + 1)
            await self._llm.reset_prefix_cache()
        if not await self._llm.add_lora(request):
            raise EnvironmentFailure(f"vLLM refused adapter version {version} in {folder}")
        self._adapters[version] = request
        self._version = version
        for old in [v for v in self._adapters if v < version - 1]:
            await self._llm.remove_lora(old + 1)
            del self._adapters[old]
            shutil.rmtree(self._folder / f"v{old}")

    def close(self) -> None:
        self._llm.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
