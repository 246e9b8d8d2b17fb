"""The endpoint's own ways: retries, refusals, keys, and servers that answer with text alone."""

import asyncio
import json
import traceback

import httpx
import pytest

from agentrl.config import ConfigError, EndpointConfig, EngineConfig
from agentrl.engines.base import Sampling
from agentrl.engines.openai import OpenAIEngine
from agentrl.types import EngineDied, EnvironmentFailure
from retrievers.clients import retrying


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(retrying, "_PAUSE_SECONDS", 0.0)


def ask(model, answer, sampling=None, prompt=(300, 301), **endpoint):
    """Generate once against `answer`, a function of the request; return the generation and what the server was asked."""
    requests = []

    async def handle(request):
        requests.append(request)
        return await answer(request) if asyncio.iscoroutinefunction(answer) else answer(request)

    async def generate():
        settings = EngineConfig(
            kind="openai", endpoint=EndpointConfig(**{"url": "http://server/v1/", "model": "served"} | endpoint)
        )
        engine = OpenAIEngine(model, settings, transport=httpx.MockTransport(handle))
        try:
            return await engine.generate(list(prompt), sampling or Sampling(32, 0.0, ("</search>", "</answer>"), 7))
        finally:
            await engine.close()

    return asyncio.run(generate()), requests


def text(content, finish="stop"):
    return lambda request: httpx.Response(200, json={"choices": [{"text": content, "finish_reason": finish}]})


def test_text_is_cut_after_its_first_stop_string_and_has_no_logprobs(tiny_model, codec):
    found, requests = ask(tiny_model, text("<search>a</search> then </answer>", "length"))
    assert codec.decode(found.token_ids) == "<search>a</search>"
    assert found.finish == "stop"
    assert found.logprobs == (0.0,) * len(found.token_ids)
    asked = json.loads(requests[0].content)
    assert asked == {
        "model": "served",
        "prompt": codec.decode([300, 301]),
        "max_tokens": 32,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 7,
    }
    assert requests[0].url == "http://server/v1/completions"


def test_text_that_ended_by_itself_gets_the_end_token(tiny_model, codec, tokenizer):
    found, _ = ask(tiny_model, text("a thought"))
    assert (codec.decode(found.token_ids), found.finish) == ("a thought<|im_end|>", "stop")
    found, _ = ask(tiny_model, text("a <|im_end|>", "length"))
    assert tokenizer.eos_token_id not in found.token_ids
    assert found.finish == "length"


def test_text_never_becomes_more_ids_than_were_asked_for(tiny_model):
    found, _ = ask(tiny_model, text("many words " * 20), Sampling(5))
    assert (len(found.token_ids), found.finish) == (5, "length")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_failing_server_is_asked_again(tiny_model, status):
    answers = iter([httpx.Response(status), httpx.ConnectError("refused"), text("done")(None)])

    def answer(request):
        outcome = next(answers)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    found, requests = ask(tiny_model, answer, retries=2)
    assert found.finish == "stop"
    assert len(requests) == 3
    with pytest.raises(EnvironmentFailure, match=rf"no answer in 2 attempts; the last one: status {status} busy"):
        ask(tiny_model, lambda request: httpx.Response(status, text="busy"), retries=1)


def test_a_slow_server_runs_into_the_deadline(tiny_model):
    async def never(request):
        await asyncio.Event().wait()

    with pytest.raises(EnvironmentFailure, match=r"no answer within 0\.05 s"):
        ask(tiny_model, never, retries=0, timeout_seconds=0.05)


def test_a_closed_engine_is_dead(tiny_model):
    settings = EngineConfig(kind="openai", endpoint=EndpointConfig(url="http://server/v1", model="served"))
    engine = OpenAIEngine(tiny_model, settings, transport=httpx.MockTransport(text("done")))

    async def generate():
        await engine.close()
        await engine.generate([300], Sampling(8, 0.0, (), 7))

    with pytest.raises(EngineDied, match="http://server/v1/completions is closed"):
        asyncio.run(generate())


def test_a_refusal_is_told_at_once(tiny_model):
    with pytest.raises(EnvironmentFailure, match="status 404 no such model"):
        ask(tiny_model, lambda request: httpx.Response(404, text="no such model"))


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        "[]",
        '{"choices": []}',
        '{"choices": [{"text": null, "finish_reason": "stop"}]}',
        '{"choices": [{"text": "", "finish_reason": "stop", "token_ids": [1], "logprobs": {"token_logprobs": [0, 0]}}]}',
    ],
)
def test_an_answer_of_another_form_is_named(tiny_model, body):
    with pytest.raises(EnvironmentFailure, match="does not speak OpenAI's completions"):
        ask(tiny_model, lambda request: httpx.Response(200, text=body))


def test_the_key_comes_from_the_named_variable_and_must_be_there(tiny_model, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "secret")
    _, requests = ask(tiny_model, text("x"), key_env="SERVER_KEY")
    assert requests[0].headers["authorization"] == "Bearer secret"
    _, requests = ask(tiny_model, text("x"))
    assert "authorization" not in requests[0].headers
    monkeypatch.delenv("SERVER_KEY")
    with pytest.raises(ConfigError, match=r"engine\.endpoint\.key_env: the environment has no SERVER_KEY"):
        ask(tiny_model, text("x"), key_env="SERVER_KEY")


@pytest.mark.parametrize("status", [200, 401, 500])
@pytest.mark.parametrize("before", [0, 190, 490])
def test_no_message_shows_a_key_that_the_server_repeats(tiny_model, monkeypatch, status, before):
    monkeypatch.setenv("SERVER_KEY", "sk-planted-1234567890")

    def repeat(request):
        return httpx.Response(status, text="." * before + request.headers["authorization"])

    with pytest.raises(EnvironmentFailure) as raised:
        ask(tiny_model, repeat, key_env="SERVER_KEY", retries=0)
    assert "sk-p" not in "".join(traceback.format_exception(raised.value))


def test_an_endpoint_cannot_load_adapters(tiny_model):
    settings = EngineConfig(kind="openai", endpoint=EndpointConfig(url="http://server/v1", model="served"))
    with pytest.raises(EnvironmentFailure, match="an endpoint cannot load adapters"):
        asyncio.run(OpenAIEngine(tiny_model, settings).load_adapter(1, {}))
