"""The judge's verdicts, through a real server on this machine: what is asked, kept, tried again and given up."""

import asyncio
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from agentrl.config import JUDGE_PROMPT, ConfigError, RewardConfig, parse_config
from agentrl.config.yaml12 import parse_yaml
from agentrl.plug_ins import check_plug_ins
from agentrl.rewards import Rewards
from agentrl.types import Action, End, EnvironmentFailure, Question, Trajectory, Turn
from retrievers.clients import retrying


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(retrying, "_PAUSE_SECONDS", 0.0)


class Server:
    """Answers with `reply`, a function from the prompt to (status, text); counts what is under way at once."""

    def __init__(self, reply):
        self.reply, self.requests, self.now, self.most = reply, [], 0, 0
        self.lock = threading.Lock()
        self.together = threading.Event()
        self.together.set()


@contextmanager
def serving(reply):
    server = Server(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append((self.path, dict(self.headers), body))
                server.now += 1
                server.most = max(server.most, server.now)
            server.together.wait(10)
            status, text = server.reply(body["messages"][0]["content"])
            with server.lock:
                server.now -= 1
            answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    # It looks whether to end so often, and each test waits for that.
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_port}/v1"
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def episode(answer, question="Who?", golds=("Ada",)):
    turn = Turn((1,), (0.0,), "", Action("answer", answer or ""), 0)
    return Trajectory("t", Question("q", question, golds), (0,), (turn,), End.ANSWERED, answer)


def judged(server, *answers, rewards_seconds=30.0, at_once=True, **options):
    """Return what episodes with these answers earn, asked for at once or one after another."""
    settings = {"base_url": server.url, "model": "judge-1", **options}

    async def score():
        rewards = Rewards([RewardConfig(kind="judge", options=settings)], rewards_seconds)
        try:
            if at_once:
                earned = await asyncio.gather(*(rewards.score(episode(answer)) for answer in answers))
            else:
                earned = [await rewards.score(episode(answer)) for answer in answers]
            return [trajectory.reward for trajectory in earned]
        finally:
            await rewards.close()

    return asyncio.run(score())


@pytest.mark.parametrize(
    ("reply", "earned"),
    [("CORRECT", 1.0), ("incorrect", 0.0), (" Correct\n", 1.0), ("0.25", 0.25), ("1", 1.0), ("0", 0.0), ("1.0", 1.0)],
)
def test_a_verdict_is_a_word_or_a_number(reply, earned):
    with serving(lambda prompt: (200, reply)) as server:
        assert judged(server, "Ada") == [earned]


def test_the_server_is_asked_for_this_model_with_what_the_prompt_shows():
    with serving(lambda prompt: (200, "CORRECT")) as server:
        judged(server, 'Ada, "{question}"', prompt="{question} {golden_answers} {answer}", max_tokens=None)
        ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert body == {
        "model": "judge-1",
        "messages": [{"role": "user", "content": '"Who?" ["Ada"] "Ada, \\"{question}\\""'}],
        "temperature": 0.0,
    }


def test_an_episode_without_an_answer_is_wrong_and_not_judged():
    with serving(lambda prompt: (200, "CORRECT")) as server:
        assert judged(server, None) == [0.0]
        assert server.requests == []


@pytest.mark.parametrize("at_once", [True, False])
def test_what_was_judged_is_not_asked_again(at_once):
    with serving(lambda prompt: (200, "CORRECT" if "Ada" in prompt.splitlines()[-3] else "INCORRECT")) as server:
        assert judged(server, "Ada", "Bob", "Ada", "Ada", at_once=at_once) == [1.0, 0.0, 1.0, 1.0]
        assert len(server.requests) == 2


def test_a_reply_that_is_no_verdict_is_asked_for_again():
    replies = iter(["I think so", "CORRECT."])
    with serving(lambda prompt: (200, next(replies, "INCORRECT"))) as server:
        assert judged(server, "Ada", retries=2) == [0.0]
        assert len(server.requests) == 3


@pytest.mark.parametrize("reply", ["maybe", "", None, "1.5", "-0", "nan", "CORRECT or INCORRECT"])
def test_what_is_no_verdict_in_the_end_is_a_failure_and_never_0(reply):
    with serving(lambda prompt: (200, reply)) as server:
        with pytest.raises(EnvironmentFailure, match=r"gave no verdict in 2 replies; the last one: .*not CORRECT"):
            judged(server, "Ada", retries=1)
        assert len(server.requests) == 2


def test_a_server_that_fails_is_asked_again_and_then_given_up():
    answers = iter([(503, ""), (200, "CORRECT")])
    with serving(lambda prompt: next(answers)) as server:
        assert judged(server, "Ada", retries=1) == [1.0]
    with (
        serving(lambda prompt: (500, "")) as server,
        pytest.raises(EnvironmentFailure, match="no answer in 2 attempts; the last one: status 500"),
    ):
        judged(server, "Ada", retries=1)
    with (
        serving(lambda prompt: (404, "")) as server,
        pytest.raises(EnvironmentFailure, match="refused the request: status 404"),
    ):
        judged(server, "Ada")


def test_a_failure_is_not_kept():
    answers = iter([(404, ""), (200, "CORRECT")])

    async def twice(server):
        rewards = Rewards([RewardConfig(kind="judge", options={"base_url": server.url, "model": "m"})], 30.0)
        with pytest.raises(EnvironmentFailure):
            await rewards.score(episode("Ada"))
        again = await rewards.score(episode("Ada"))
        await rewards.close()
        return again.reward

    with serving(lambda prompt: next(answers)) as server:
        assert asyncio.run(twice(server)) == 1.0


def test_a_server_that_does_not_answer_in_time_is_a_failure():
    with serving(lambda prompt: (200, "CORRECT")) as server:
        server.together.clear()
        with pytest.raises(EnvironmentFailure, match=r"no answer within 0\.2 s"):
            judged(server, "Ada", timeout_seconds=0.2, retries=0)
        server.together.set()


def test_a_judge_that_needs_longer_than_rewards_have_is_a_failure_of_what_it_asks():
    with serving(lambda prompt: (200, "CORRECT")) as server:
        server.together.clear()
        with pytest.raises(EnvironmentFailure, match=r"judge did not return within 0\.2 s.*reward_timeout_seconds"):
            judged(server, "Ada", rewards_seconds=0.2)
        server.together.set()


def test_no_more_requests_are_under_way_at_once_than_are_allowed():
    with serving(lambda prompt: (200, "CORRECT")) as server:
        judged(server, *map(str, range(20)), max_concurrent=3)
        assert len(server.requests) == 20
        assert server.most <= 3


def test_the_key_comes_from_the_environment_and_is_in_no_message(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    with serving(lambda prompt: (401, "wrong key sk-very-secret")) as server:
        with pytest.raises(EnvironmentFailure) as raised:
            judged(server, "Ada", key_env="JUDGE_KEY")
        assert server.requests[0][1]["Authorization"] == "Bearer sk-very-secret"
    assert "status 401" in str(raised.value)
    assert "sk-very-secret" not in str(raised.value)


def config(**options):
    judge = {"kind": "judge", "options": {"base_url": "http://127.0.0.1:9/v1", "model": "m", **options}}
    return parse_config({"name": "x", "model": {"path": "m"}, "reward": [judge]}, source="test")


def test_a_resolved_config_holds_the_options_that_were_left_out_and_reads_back():
    made = config()
    assert made.reward[0].options["prompt"] == JUDGE_PROMPT
    assert parse_config(parse_yaml(made.to_yaml()), source="again") == made


def test_a_key_that_is_not_set_is_named_before_anything_starts(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"reward\.0: .*JUDGE_KEY"):
        check_plug_ins(config(key_env="JUDGE_KEY"))
    monkeypatch.setenv("JUDGE_KEY", "sk-1234")
    check_plug_ins(config(key_env="JUDGE_KEY"))


def test_a_key_that_stands_in_the_config_is_refused_and_not_printed():
    with pytest.raises(ConfigError, match="holds a key") as raised:
        check_plug_ins(config(key_env="sk-1234"))
    assert "sk-1234" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "Is it right?"}, r"reward\.0\.options: prompt: must hold {answer}"),
        ({"base_url": "localhost:8000"}, r"reward\.0\.options: base_url"),
        ({"retries": -1}, r"reward\.0\.options: retries"),
        ({"modle": "m"}, r"judge has no option 'modle'.*did you mean model"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)
