"""The judge: a language model behind an OpenAI-compatible server says whether an answer is right."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from agentrl.config import JUDGE_PROMPT, ConfigError
from agentrl.types import EnvironmentFailure, Trajectory
from retrievers.base import RetrieverError
from retrievers.secrets import from_environment, public_url, redacting

if TYPE_CHECKING:
    import httpx

_PLACEHOLDER = re.compile(r"\{(question|golden_answers|answer)\}")
_WORDS = {"correct": 1.0, "incorrect": 0.0}
_SHARE = re.compile(r"0(\.\d+)?|1(\.0+)?")

# Verdicts that are kept; the oldest go first.
_MOST_VERDICTS = 100_000


class Judge:
    """Asks a server for a verdict on each answer, and for each prompt only once. Use it on one event loop only."""

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        prompt: str = JUDGE_PROMPT,
        key_env: str | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 16,
        timeout_seconds: float = 30.0,
        retries: int = 2,
        max_concurrent: int = 8,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Send nothing yet. `agentrl.config.reward.JudgeOptions` explains the options; `transport` is for tests.

        Raises:
            ConfigError: if the environment variable with the API key is not set.
        """
        from retrievers.clients.http import HttpCaller

        try:
            keys = [] if key_env is None else [from_environment(key_env, "key_env")]
        except RetrieverError as error:
            raise ConfigError(str(error)) from error
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._model, self._prompt, self._retries = model, prompt, retries
        self._sampling = {
            name: value
            for name, value in (("temperature", temperature), ("max_tokens", max_tokens))
            if value is not None
        }
        self._name, self._error = public_url(self._url), redacting(keys, EnvironmentFailure)
        self._caller = HttpCaller(
            self._url,
            timeout_seconds,
            retries,
            headers={"Authorization": f"Bearer {keys[0]}"} if keys else {},
            secrets=keys,
            connections=max_concurrent,
            error=EnvironmentFailure,
            transport=transport,
        )
        self._verdicts: dict[bytes, float] = {}
        self._asked: dict[bytes, asyncio.Task[float]] = {}

    async def __call__(self, trajectory: Trajectory) -> float:
        """Return the verdict on the episode's answer, from 0 to 1; 0.0 where there is no answer.

        Raises:
            EnvironmentFailure: if the server gave no verdict after its retries.
        """
        if trajectory.answer is None:
            return 0.0
        prompt = self._prompt_for(trajectory)
        content = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass")).digest()
        if content in self._verdicts:
            return self._verdicts[content]
        task = self._asked.get(content)
        if task is None:
            # A task of its own: several episodes may wait for it, and each of them may be given up.
            task = self._asked[content] = asyncio.create_task(self._ask(prompt))
            task.add_done_callback(lambda done: self._keep(content, done))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Close the connections."""
        for task in self._asked.values():
            task.cancel()
        await self._caller.close()

    def _prompt_for(self, trajectory: Trajectory) -> str:
        question = trajectory.question
        texts = {"question": question.text, "golden_answers": question.golden_answers, "answer": trajectory.answer}
        # In one pass, so that an answer that holds a placeholder stays as it is. As JSON, so that it ends where it ends.
        return _PLACEHOLDER.sub(lambda found: json.dumps(texts[found[1]], ensure_ascii=False), self._prompt)

    def _keep(self, content: bytes, done: asyncio.Task[float]) -> None:
        del self._asked[content]
        if done.cancelled() or done.exception() is not None:
            return
        self._verdicts[content] = done.result()
        if len(self._verdicts) > _MOST_VERDICTS:
            del self._verdicts[next(iter(self._verdicts))]

    async def _ask(self, prompt: str) -> float:
        payload = {"model": self._model, "messages": [{"role": "user", "content": prompt}], **self._sampling}
        for _ in range(self._retries + 1):
            answer = await self._caller.call("POST", self._url, json=payload)
            if answer.status != 200:
                raise self._error(f"{self._name} refused the request: status {answer.status} {answer.text(500)}")
            try:
                reply = _reply(answer.json())
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise self._error(
                    f"{self._name} does not speak OpenAI's chat completions: {type(error).__name__} {error} in "
                    f"{answer.text(200)!r}"
                ) from error
            verdict = _verdict(reply)
            if verdict is not None:
                return verdict
        raise self._error(
            f"{self._name} gave no verdict in {self._retries + 1} replies; the last one: {reply[:200]!r}, which is not CORRECT, "
            "INCORRECT or a number from 0 to 1 alone"
        )


def _reply(completion: Any) -> str:
    reply = completion["choices"][0]["message"]["content"]
    # A reply that was cut off before it said anything has null here.
    return "" if reply is None else str(reply)


def _verdict(reply: str) -> float | None:
    """Return the verdict that a reply consists of, or None if it is none."""
    said = reply.strip().lower()
    return float(said) if _SHARE.fullmatch(said) else _WORDS.get(said)
