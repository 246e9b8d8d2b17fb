"""Any server with OpenAI's /v1/completions as an engine, for evaluation: vLLM's, llama.cpp's or a hosted one.

With `prompt: ids` the server must be vLLM or know vLLM's extensions: it takes ids, gives ids and log-probabilities, and keeps
the stop string in its answer. With `prompt: text` the request has only OpenAI's own fields, and no stop strings, since a
server leaves the stop string out of its answer and does not say which one ended it. Such a server samples up to
`max_tokens`; the engine then cuts the text after the first stop string and encodes it with the local tokenizer.
Log-probabilities are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import httpx

from agentrl.config import ConfigError, EngineConfig
from agentrl.engines.base import Generation, Sampling
from agentrl.types import EngineDied, EnvironmentFailure
from retrievers.base import RetrieverError
from retrievers.clients.http import Answer, HttpCaller
from retrievers.secrets import from_environment, public_url, redacting


def environment(settings: EngineConfig, device: str) -> dict[str, str]:
    """Return the environment variables that an engine's process needs. The API key is not copied into them."""
    return {"TOKENIZERS_PARALLELISM": "false"}


class OpenAIEngine:
    """A client of one server. Use it on one event loop only, to which its connections belong. Its version is always 0."""

    trainable: ClassVar[bool] = False

    def __init__(
        self, model: str, settings: EngineConfig, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """Load the tokenizer and send nothing yet.

        Args:
            model: folder with the tokenizer of the model that the server has.
            transport: takes the place of the network in tests.

        Raises:
            ConfigError: if the environment variable with the API key is not set.
        """
        from transformers import AutoTokenizer

        endpoint = settings.endpoint
        if endpoint is None:
            raise ConfigError("engine.kind openai needs the section engine.endpoint")
        keys: list[str] = []
        if endpoint.key_env is not None:
            try:
                keys.append(from_environment(endpoint.key_env, "engine.endpoint.key_env"))
            except RetrieverError as error:
                raise ConfigError(str(error)) from error
        self._endpoint = endpoint
        self._url = f"{endpoint.url.rstrip('/')}/completions"
        self._name, self._error = public_url(self._url), redacting(keys, self._failure)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._closed = False
        self._caller = HttpCaller(
            self._url,
            endpoint.timeout_seconds,
            endpoint.retries,
            headers={"Authorization": f"Bearer {keys[0]}"} if keys else {},
            secrets=keys,
            connections=settings.max_concurrent,
            error=self._failure,
            transport=transport,
        )

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """See `Engine.generate`. Log-probabilities are zeros unless the server answers with ids."""
        answer = await self._caller.call("POST", self._url, json=self._payload(list(prompt_ids), sampling))
        if answer.status != 200:
            raise self._error(f"{self._name} refused the request: status {answer.status} {answer.text(500)}")
        return self._parse(answer, sampling)

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        """Raise EnvironmentFailure: the server decides what it serves."""
        raise EnvironmentFailure(f"{self._name}: an endpoint cannot load adapters; serve the merged model instead")

    async def load_weights(self, version: int, folder: str) -> None:
        """Raise EnvironmentFailure: the server decides what it serves."""
        raise EnvironmentFailure(f"{self._name}: an endpoint cannot load weights; serve that model instead")

    async def sleep(self) -> None:
        """See `Engine.sleep`."""

    async def wake(self) -> None:
        """See `Engine.wake`."""

    async def close(self) -> None:
        """See `Engine.close`."""
        self._closed = True
        await self._caller.close()

    def _failure(self, message: str) -> Exception:
        return EngineDied(f"the engine of {self._name} is closed") if self._closed else EnvironmentFailure(message)

    def _payload(self, prompt: list[int], sampling: Sampling) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "model": self._endpoint.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
        }
        if sampling.seed is not None:
            payload["seed"] = sampling.seed
        if self._endpoint.prompt == "text":
            return payload | {"prompt": self._tokenizer.decode(prompt, clean_up_tokenization_spaces=False)}
        # Without these neutral values a server may take the model's own generation settings.
        return payload | {
            "prompt": prompt,
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "return_token_ids": True,
            "logprobs": 0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }

    def _parse(self, answer: Answer, sampling: Sampling) -> Generation:
        try:
            choice = answer.json()["choices"][0]
            ids, text, finish = choice.get("token_ids"), choice["text"], choice["finish_reason"]
            if ids is None:
                return self._from_text(text, finish, sampling)
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or [0.0] * len(ids)
            if len(logprobs) != len(ids):
                raise ValueError(f"{len(ids)} ids and {len(logprobs)} log-probabilities")
            return Generation(tuple(ids), tuple(map(float, logprobs)), "length" if finish == "length" else "stop", 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise self._error(
                f"{self._name} does not speak OpenAI's completions: {type(error).__name__} {error} in {answer.text(200)!r}"
            ) from error

    def _from_text(self, text: str, finish: str, sampling: Sampling) -> Generation:
        """Cut `text` after the stop string that ends first; without one, append the end token that servers leave out."""
        ends = [text.find(stop) + len(stop) for stop in sampling.stop if stop in text]
        if ends:
            text = text[: min(ends)]
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        stopped, end = bool(ends) or finish != "length", self._tokenizer.eos_token_id
        if stopped and not ends and end is not None:
            ids.append(end)
        # The local encoding of a text can have more tokens than the server sampled, and an episode relies on the bound.
        stopped, ids = stopped and len(ids) <= sampling.max_tokens, ids[: sampling.max_tokens]
        return Generation(tuple(ids), (0.0,) * len(ids), "stop" if stopped else "length", 0)
