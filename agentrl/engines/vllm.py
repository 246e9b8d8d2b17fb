"""vLLM's AsyncLLM as an engine: continuous batching, prefix reuse and LoRA versions swapped at run time.

The process that makes a `VllmEngine` must have `environment(...)` in its environment before it imports vllm.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from agentrl.config import ConfigError, EngineConfig
from agentrl.engines.base import NOT_FINITE, Generation, Sampling
from agentrl.engines.budget import TokenBudget
from agentrl.engines.scratch import ScratchFolder
from agentrl.types import EngineDied, EnvironmentFailure

# The adapter ranks that vLLM can reserve space for.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# Tokens in a block. Prefixes are reused in whole blocks; vLLM's default on a CPU is 128, about one observation.
_CPU_BLOCK = 32

# The most prompt tokens of one step on a CPU; other prompts wait for the next step.
_CPU_BATCHED_TOKENS = 4096


def environment(settings: EngineConfig, device: str) -> dict[str, str]:
    """Return the environment variables that an engine process needs from its start."""
    variables = {
        # AsyncLLM always has its core in a process of its own. On a CPU this keeps the worker in that process, where vLLM
        # would else start one more for it.
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
            # vLLM compiles small sampling functions at the first request. That takes half a minute, and an eager engine on
            # a CPU never gains it back.
            "TORCHDYNAMO_DISABLE": "1",
        }
    elif settings.sleep:
        # A user's own setting is meant for the trainer. vLLM maps the memory of an engine that sleeps by itself, and
        # PyTorch's expandable segments do the same in another way.
        variables["PYTORCH_CUDA_ALLOC_CONF"] = ""
    return variables


def room_for_rank(rank: int) -> int:
    """Return the `max_lora_rank` that vLLM needs for adapters of this rank; it takes some numbers alone."""
    return next(known for known in _LORA_RANKS if known >= rank)


def _room_for_adapters(rank: int | None) -> dict[str, Any]:
    if rank is None:
        return {}
    return {
        "enable_lora": True,
        "max_lora_rank": room_for_rank(rank),
        "max_loras": 2,
    }


@dataclass(slots=True, eq=False)
class _Weights:
    """A version, the LoRARequest that gives it (None for the model alone), and how many generations use it."""

    version: int
    adapter: Any
    users: int = 0


class VllmEngine:
    """One AsyncLLM in this process. Must be made inside a running event loop."""

    trainable: ClassVar[bool] = True

    def __init__(
        self,
        model: str,
        settings: EngineConfig,
        *,
        device: str,
        dtype: str,
        max_tokens: int,
        lora_rank: int | None,
        seed: int,
        quantization: str | None = None,
    ) -> None:
        """`max_tokens` bounds prompt and completion of a request together; without a `lora_rank` no adapter can be loaded.

        `quantization` is a method of vLLM's.

        Raises:
            ConfigError: if vLLM refuses the settings, such as more tokens than the model has positions.
            EngineDied: if vLLM does not start.
        """
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        on_device: dict[str, Any] = (
            {
                "block_size": _CPU_BLOCK,
                "gpu_memory_utilization": 0.3,
                "enforce_eager": True,
                # vLLM 0.31 cannot rewind a CPU's random generator, which it does for a seeded prompt taken in parts.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, max_tokens),
                "worker_extension_cls": "agentrl.engines.vllm_cpu.CpuExtension",
            }
            if device == "cpu"
            else {
                "gpu_memory_utilization": settings.memory_utilization,
                "tensor_parallel_size": settings.cards,
                "enable_sleep_mode": settings.sleep,
                "worker_extension_cls": "agentrl.engines.vllm_worker.Extension",
            }
        )
        arguments = AsyncEngineArgs(
            model=model,
            dtype=dtype,
            quantization=quantization,
            max_model_len=max_tokens,
            max_num_seqs=settings.max_concurrent,
            enable_prefix_caching=True,
            **_room_for_adapters(lora_rank),
            # The trainer's ratio needs log-probabilities at the sampling temperature, not of the raw logits.
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            seed=seed,
            **on_device,
        )
        try:
            self._llm = AsyncLLM.from_engine_args(arguments)
        except ValueError as error:
            # Its errors are pydantic's, whose first line says nothing.
            reason = " ".join(str(error).split()).partition(" [type=")[0]
            raise ConfigError(
                f"vLLM refuses {model} with these settings, of which max_model_len is agent.max_episode_tokens: {reason}"
            ) from error
        except RuntimeError as error:
            # The core's process died. Its log says why: too little memory, or a setting that cannot work.
            raise EngineDied(f"the vLLM engine did not start: {error}") from error
        self._limit, self._device = max_tokens, device
        cache = self._llm.vllm_config.cache_config
        # A token of a hybrid model takes room in several groups of blocks. vLLM before 0.31 does not say what that comes to.
        capacity = getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * cache.block_size
        # Under load vLLM throws requests out of a full cache and computes them again, some of them more than once.
        self._budget = TokenBudget(min(capacity, settings.token_budget or capacity))
        self._requests, self._loads = itertools.count(), itertools.count(1)
        self._scratch = ScratchFolder()
        self._current = _Weights(0, None)
        self._old: list[_Weights] = []
        self._running: set[asyncio.Task[Any]] = set()
        self._changing, self._closed = asyncio.Lock(), False
        self._asleep = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """See `Engine.generate`. Before anything is loaded, version 0 is the model alone."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        most = max(1, min(sampling.max_tokens, self._limit - len(prompt_ids)))
        parameters = SamplingParams(
            max_tokens=most,
            temperature=sampling.temperature,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            logprobs=0,
            seed=sampling.seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with self._budget.hold(len(prompt_ids) + most), self._using() as weights:
            completion = await self._complete(list(prompt_ids), parameters, weights)
        if completion is None or completion.finish_reason not in ("stop", "length"):
            # When the core's process is gone, vLLM ends its requests first and reports the death later.
            raise EngineDied("the vLLM engine ended a request without an answer")
        ids = tuple(completion.token_ids)
        logprobs = tuple(table[token].logprob for token, table in zip(ids, completion.logprobs, strict=True))
        if not all(map(math.isfinite, logprobs)):
            raise EnvironmentFailure(NOT_FINITE)
        return Generation(ids, logprobs, completion.finish_reason, weights.version)

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        """See `Engine.load_adapter`. Generations under way keep the adapter that they began with."""
        from vllm.lora.request import LoRARequest

        number = next(self._loads)
        folder = self._scratch.path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        # vLLM keys its prefix cache by an adapter's name and path. With new ones each time, no entry meets other weights.
        request = LoRARequest(f"policy-{number}", number, str(folder))
        async with self._changing:
            with self._failures(f"cannot load adapter version {version}"), ExitStack() as refused:
                refused.callback(shutil.rmtree, folder)
                self._check_awake()
                if not await self._llm.add_lora(request):
                    raise EnvironmentFailure(f"vLLM refused adapter version {version}")
                refused.pop_all()
                self._old.append(self._current)
                self._current = _Weights(version, request)
                await self._retire()

    async def load_weights(self, version: int, folder: str) -> None:
        """See `Engine.load_weights`. Waits for the generations under way, and lets later ones wait for the new weights."""
        async with self._changing:
            self._check_awake()
            await self._await_generations()
            with self._failures(f"cannot load the weights of version {version} from {folder}"):
                if not await self._llm.reset_prefix_cache():
                    raise EnvironmentFailure("vLLM still uses its prefix cache, so the weights stay as they are")
                try:
                    await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
                    if self._device == "cpu":
                        await self._llm.collective_rpc("pack_tied_heads")
                except Exception as error:
                    # Some layers may have the new weights by now, and others not.
                    raise EngineDied(f"vLLM cannot load weights from {folder}: {error}") from error
                self._old.append(self._current)
                self._current = _Weights(version, None)
                await self._retire()

    async def sleep(self) -> None:
        """See `Engine.sleep`. The weights move to the machine's own memory, and the cache of keys and values is dropped."""
        async with self._changing:
            if self._asleep:
                return
            await self._await_generations()
            with self._failures("cannot sleep"):
                await self._llm.sleep(level=1)
            self._asleep = True

    async def wake(self) -> None:
        """See `Engine.wake`."""
        async with self._changing:
            if not self._asleep:
                return
            with self._failures("cannot wake"):
                try:
                    await self._llm.wake_up()
                except Exception as error:
                    # Some of its memory may be back by now, and other parts not.
                    raise EngineDied(f"the vLLM engine cannot wake: {error}") from error
            self._asleep = False

    async def close(self) -> None:
        """See `Engine.close`."""
        self._closed = True
        # vLLM's shutdown does not end them; they would wait for ever.
        for task in self._running:
            task.cancel()
        self._llm.shutdown()
        self._scratch.close()

    async def _complete(self, prompt: list[int], parameters: Any, weights: _Weights) -> Any:
        """Return vLLM's CompletionOutput, or None if there is none. Raises EngineDied when `close` is called meanwhile."""

        async def outputs() -> list[Any]:
            answers = self._llm.generate(
                {"prompt_token_ids": prompt},
                parameters,
                request_id=f"r{next(self._requests)}",
                lora_request=weights.adapter,
            )
            return [answer async for answer in answers]

        task = asyncio.ensure_future(outputs())
        self._running.add(task)
        try:
            answers = await task
        except asyncio.CancelledError:
            if self._closed:
                raise EngineDied("the vLLM engine was closed") from None
            raise
        finally:
            self._running.discard(task)
        return answers[-1].outputs[0] if answers else None

    async def _retire(self) -> None:
        """Remove the adapters that nothing uses any more."""
        for weights in [old for old in self._old if not old.users]:
            self._old.remove(weights)
            if weights.adapter is not None:
                await self._llm.remove_lora(weights.adapter.lora_int_id)
                shutil.rmtree(weights.adapter.lora_path)

    @asynccontextmanager
    async def _using(self) -> AsyncIterator[_Weights]:
        """Wait for a change of weights to end, then keep the current weights from being removed during the block."""
        async with self._changing:
            self._check_awake()
            weights = self._current
            weights.users += 1
        try:
            with self._failures("cannot generate"):
                yield weights
        finally:
            weights.users -= 1

    async def _await_generations(self) -> None:
        while any(weights.users for weights in (self._current, *self._old)):
            await asyncio.sleep(0.01)

    def _check_awake(self) -> None:
        # vLLM would keep a request waiting without a word.
        if self._asleep:
            raise EnvironmentFailure("the vLLM engine sleeps; wake it first")

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """Turn any exception of vLLM into an EnvironmentFailure that says what could not be done."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._closed:
            raise EngineDied("the vLLM engine is closed")
        try:
            yield
        except EnvironmentFailure:
            raise
        except EngineDeadError as error:
            raise EngineDied(f"the vLLM engine died: {error}") from error
        # A failure in the core's process arrives here as a bare Exception.
        except Exception as error:
            kind = EngineDied if self._closed else EnvironmentFailure
            raise kind(f"vLLM {what}: {type(error).__name__}: {error}") from error
