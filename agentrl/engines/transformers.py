"""transformers as an engine, for machines without vLLM: one thread runs one batch of waiting requests after another.

A batch runs until its last request has ended; requests that come meanwhile wait for the next batch. Keys and values end with
their batch, so they never meet other weights than those that made them.
"""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from agentrl.config import EngineConfig
from agentrl.engines.base import NOT_FINITE, Generation, Sampling
from agentrl.types import EngineDied, EnvironmentFailure

if TYPE_CHECKING:
    import torch

# Requests of the same moment arrive one after another. A batch waits this long for those that follow its first.
_GATHER_SECONDS = 0.005


def environment(settings: EngineConfig, device: str) -> dict[str, str]:
    """Return the environment variables that an engine process needs from its start."""
    threads = {"OMP_NUM_THREADS": str(settings.threads)} if device == "cpu" else {}
    return {"TOKENIZERS_PARALLELISM": "false"} | threads


@dataclass(slots=True)
class _Request:
    """One generation, with a random generator of its own, so that its ids do not depend on the other requests."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    generator: torch.Generator
    future: Future[Generation] = field(default_factory=Future)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Load:
    """A change of weights, or of where they are. It waits until the requests before it have ended.

    Attributes:
        version: of the new weights; None where they stay the same.
    """

    version: int | None
    change: Callable[[], None]
    future: Future[None] = field(default_factory=Future)


class TransformersEngine:
    """One model in this process, driven by one thread."""

    trainable: ClassVar[bool] = True

    def __init__(
        self, model: str, settings: EngineConfig, *, device: str, dtype: str, max_tokens: int, seed: int
    ) -> None:
        """`max_tokens` bounds prompt and completion of a request together."""
        import torch
        from transformers import AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        # One for each version of the weights would fill the log.
        disable_progress_bar()
        self._device, self._dtype = device, getattr(torch, dtype)
        self._model = self._read(model)
        self._adapter: str | None = None
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._ends = _end_tokens(self._tokenizer, self._model)
        self._vocabulary = self._model.get_input_embeddings().num_embeddings
        self._limit, self._places = max_tokens, settings.max_concurrent
        self._seeds = random.Random(seed)
        self._version = self._loads = 0
        self._jobs: deque[_Request | _Load] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="transformers-engine", daemon=True)
        self._thread.start()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """See `Engine.generate`. Before anything is loaded, version 0 is the model alone."""
        import torch

        prompt = list(prompt_ids)
        room = min(sampling.max_tokens, self._limit - len(prompt))
        if not prompt or room < 1:
            raise EnvironmentFailure(
                f"a prompt of {len(prompt)} ids leaves no room within {self._limit} tokens, or is empty"
            )
        if min(prompt) < 0 or max(prompt) >= self._vocabulary:
            raise EnvironmentFailure(f"the prompt holds an id outside of the model's {self._vocabulary}")
        seed = self._seeds.getrandbits(32) if sampling.seed is None else sampling.seed
        return await self._submit(_Request(prompt, sampling, room, torch.Generator().manual_seed(seed)))

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        """See `Engine.load_adapter`."""
        await self._submit(_Load(version, lambda: self._swap_adapter(files)))

    async def load_weights(self, version: int, folder: str) -> None:
        """See `Engine.load_weights`."""
        await self._submit(_Load(version, lambda: self._swap_model(folder)))

    async def sleep(self) -> None:
        """See `Engine.sleep`. The weights move to the machine's own memory."""
        await self._submit(_Load(None, lambda: self._move("cpu")))

    async def wake(self) -> None:
        """See `Engine.wake`."""
        await self._submit(_Load(None, lambda: self._move(self._device)))

    async def close(self) -> None:
        """See `Engine.close`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    async def _submit(self, job: _Request | _Load) -> Any:
        with self._changed:
            if self._closing:
                raise EngineDied("the transformers engine is closed")
            self._jobs.append(job)
            self._changed.notify()
        # Cancelling the task cancels this future, and the thread looks at the future after each token.
        return await asyncio.wrap_future(job.future)

    def _work(self) -> None:
        while jobs := self._next():
            try:
                if isinstance(jobs[0], _Load):
                    jobs[0].change()
                    if jobs[0].version is not None:
                        self._version = jobs[0].version
                    _resolve(jobs[0].future, None)
                else:
                    self._run(jobs)
            except Exception as error:  # noqa: BLE001, whatever it was, nobody may wait for ever
                _fail(jobs, error)
        _fail(self._jobs, EngineDied("the transformers engine was closed"))

    def _next(self) -> list[_Request | _Load]:
        """Wait for jobs; return one change of weights, or the requests before the next one, or [] when the engine closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closing)
        time.sleep(_GATHER_SECONDS)
        with self._changed:
            if self._closing:
                return []
            if isinstance(self._jobs[0], _Load):
                return [self._jobs.popleft()]
            batch: list[_Request | _Load] = []
            while self._jobs and len(batch) < self._places and isinstance(self._jobs[0], _Request):
                batch.append(self._jobs.popleft())
            return batch

    def _run(self, rows: list[_Request]) -> None:
        """Decode until every row has ended or was cancelled. Padding stands on the left, so that all prompts end together."""
        import torch

        width = max(len(row.prompt) for row in rows)
        ids = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows], device=self._device)
        mask = torch.tensor(
            [[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=self._device
        )
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        with torch.inference_mode():
            while True:
                output = self._model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = output.past_key_values
                if self._closing:
                    raise EngineDied("the transformers engine was closed")
                tokens = _sample(output.logits[:, -1], rows)
                kept = [i for i, row in enumerate(rows) if not self._ended(row)]
                if not kept:
                    return
                if len(kept) < len(rows):
                    index = torch.tensor(kept, device=self._device)
                    cache.batch_select_indices(index)
                    rows = [rows[i] for i in kept]
                    tokens, mask, positions = tokens[index], mask[index], positions[index]
                ids, positions = tokens[:, None], positions[:, -1:] + 1
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)

    def _ended(self, row: _Request) -> bool:
        """Answer a row that has ended, and say whether its place is free."""
        stop = row.sampling.stop
        text = self._tokenizer.decode(row.ids, clean_up_tokenization_spaces=False) if stop else ""
        stopped = row.ids[-1] in self._ends or any(string in text for string in stop)
        if not stopped and len(row.ids) < row.max_tokens:
            return row.future.cancelled()
        finish = "stop" if stopped else "length"
        _resolve(row.future, Generation(tuple(row.ids), tuple(row.logprobs), finish, self._version))
        return True

    def _read(self, folder: str) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype).to(self._device).eval()

    def _move(self, device: str) -> None:
        import torch

        self._model.to(device)
        if self._device != "cpu":
            # PyTorch keeps what it has freed for itself.
            torch.cuda.empty_cache()

    def _swap_model(self, folder: str) -> None:
        self._model, self._adapter = self._read(folder), None

    def _swap_adapter(self, files: Mapping[str, bytes]) -> None:
        from peft import PeftModel

        self._loads += 1
        name = f"policy_{self._loads}"
        with tempfile.TemporaryDirectory(prefix="agentrl-adapter-") as folder:
            for file, content in files.items():
                (Path(folder) / file).write_bytes(content)
            if self._adapter is None:
                self._model = PeftModel.from_pretrained(self._model, folder, adapter_name=name)
            else:
                self._model.load_adapter(folder, adapter_name=name)
        self._model.set_adapter(name)
        self._model.eval()
        if self._adapter is not None:
            self._model.delete_adapter(self._adapter)
        self._adapter = name


def _sample(logits: torch.Tensor, rows: Sequence[_Request]) -> torch.Tensor:
    """Draw one id for each row of `logits` [rows, vocabulary], note it with its log-probability, and return ids [rows]."""
    import torch

    from agentrl.engines.drawing import draw

    temperatures = torch.tensor([row.sampling.temperature or 1.0 for row in rows], device=logits.device)
    logprobs = (logits.float() / temperatures[:, None]).log_softmax(-1)
    sampled = draw(logprobs.exp(), {place: row.generator for place, row in enumerate(rows)})
    greedy = torch.tensor([row.sampling.temperature == 0 for row in rows], device=logits.device)
    ids = torch.where(greedy, logprobs.argmax(-1), sampled)
    chosen = logprobs.gather(1, ids[:, None]).squeeze(1).tolist()
    if not all(map(math.isfinite, chosen)):
        raise EnvironmentFailure(NOT_FINITE)
    for row, token, logprob in zip(rows, ids.tolist(), chosen, strict=True):
        row.ids.append(token)
        row.logprobs.append(logprob)
    return ids


def _end_tokens(tokenizer: Any, model: Any) -> set[int]:
    """Return the ids that end a turn, as vLLM has them: the tokenizer's, and those of the model's generation settings."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {end for end in (tokenizer.eos_token_id, *configured) if end is not None}


def _resolve(future: Future[Any], result: Any) -> None:
    # False if the task was cancelled, even in this very moment.
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def _fail(jobs: Sequence[_Request | _Load], error: Exception) -> None:
    import torch

    if not isinstance(error, EnvironmentFailure):
        # After an error of the device itself, such as a failed assertion on a GPU, every later call fails too.
        kind = EngineDied if isinstance(error, torch.AcceleratorError) else EnvironmentFailure
        error = kind(f"the transformers engine failed: {type(error).__name__}: {error}")
    for job in jobs:
        if not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)
