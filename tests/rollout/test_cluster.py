"""A run that gets no Ray ends soon, with one message that names what to set."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import GetTimeoutError
from scripted import make_config
from tiny import tiny_llama

from agentrl.config import ConfigError
from agentrl.rollout.cluster import cluster
from agentrl.types import EnvironmentFailure


@pytest.fixture
def started(tmp_path, tokenizer):
    def start(**sections):
        with cluster(make_config(tmp_path, tokenizer, **sections)):
            raise AssertionError("it started")

    return start


@pytest.fixture
def free_port():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_an_address_where_nothing_listens_is_named_at_once(started, free_port, prefix):
    address = f"{prefix}127.0.0.1:{free_port}"
    with pytest.raises(EnvironmentFailure, match=f"ray.address {address}: nothing listens there .*`ray start --head`"):
        started(ray={"address": address})


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "no-such-host.invalid:6379"])
def test_an_address_that_cannot_be_is_named(started, address):
    with pytest.raises(EnvironmentFailure, match=f"ray.address {address}: nothing listens there"):
        started(ray={"address": address})


def test_a_cluster_that_does_not_let_us_in_is_named_with_its_token(started, monkeypatch):
    def refuse(**options):
        raise ConnectionError(f"Failed to connect to Ray cluster at {options['address']}")

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(EnvironmentFailure, match=f"ray.address {address}: cannot connect: .*RAY_AUTH_TOKEN"):
            started(ray={"address": address})


def test_a_folder_whose_name_is_too_long_for_a_socket_is_named(started, monkeypatch, tmp_path):
    folder = tmp_path / ("job_scratch_" * 8)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    with pytest.raises(EnvironmentFailure, match=f"{folder}.* too long .*set RAY_TMPDIR"):
        started()


def test_a_ray_that_does_not_start_in_time_is_one_message(started, monkeypatch, tmp_path):
    def time_out(**options):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", time_out)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(EnvironmentFailure, match=f"timed out during startup.*{tmp_path}.*set RAY_TMPDIR") as raised:
        started()
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("free", "sections", "error", "words"),
    [
        ({"CPU": 3.0}, {"rollout": {"workers": 4}}, EnvironmentFailure, r"needs 4 CPUs \(4 engine\(s\).* has 3 free"),
        (
            {"GPU": 1.0, "CPU": 9.0},
            {"device": "cuda", "rollout": {"workers": 2}},
            ConfigError,
            r"needs 2 GPUs .* 1 free",
        ),
        (
            {"GPU": 0.5, "CPU": 9.0},
            {"retriever": {"index": "i", "gpus": 0.6}},
            ConfigError,
            r"needs 0\.6 GPUs .* 0\.5 free",
        ),
    ],
)
def test_too_few_free_places_are_named(started, monkeypatch, free, sections, error, words):
    monkeypatch.setattr(ray, "init", lambda **options: SimpleNamespace(address_info={"session_dir": "/tmp/session"}))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "available_resources", lambda: free)
    monkeypatch.setattr(ray, "get", lambda references, timeout: [])
    with pytest.raises(error, match=words):
        started(**sections)


@pytest.fixture
def beginnings(monkeypatch, tmp_path, tokenizer):
    """Start a cluster of stand-ins for Ray's actors and return, in their order, what was called and waited for."""

    def begin(beside=True, store_bytes=None, cpus=8.0, **sections):
        seen = []

        class Call:
            def __init__(self, name):
                self.name = name

            def remote(self, *arguments):
                seen.append(self.name)
                return self.name

        class Actor:
            def __getattr__(self, name):
                return Call(name)

        class Class:
            def __init__(self, *arguments):
                pass

            def options(self, **options):
                seen.append(options)
                return self

            def remote(self, *arguments, **options):
                return Actor()

        def init(**options):
            seen.append(options)
            return SimpleNamespace(address_info={"session_dir": "/tmp/session"})

        def get(references, timeout):
            seen.append(("got", *references, timeout))
            return references

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": cpus, "GPU": 2.0})
        monkeypatch.setattr(ray, "remote", Class)
        monkeypatch.setattr(ray, "get", get)
        trainer = SimpleNamespace(start=lambda: seen.append("trainer"), check=lambda: None)
        config = make_config(tmp_path, tokenizer, **{"training": {"steps": 1}} | sections)
        with cluster(config, beside=trainer if beside else None, store_bytes=store_bytes):
            return seen

    return begin


def order(seen):
    return [entry for entry in seen if isinstance(entry, str)]


def got(seen, name):
    """Where the answer of a call was waited for."""
    (place,) = [n for n, entry in enumerate(seen) if isinstance(entry, tuple) and entry[1:-1] == (name,)]
    return place


def test_the_trainer_comes_up_beside_engines_that_have_other_cards(beginnings):
    assert order(beginnings(device="cuda")) == ["trainer", "fetch", "prepare", "close"]
    assert order(beginnings()) == ["trainer", "fetch", "prepare", "close"]


def test_a_trainer_on_the_engines_card_waits_until_they_have_measured_what_is_free(beginnings):
    seen = beginnings(device="cuda", engine={"gpus": 0.5})
    assert order(seen) == ["fetch", "prepare", "trainer", "close"]
    assert seen.index("trainer") > got(seen, "prepare")
    (engine,) = [entry for entry in seen if isinstance(entry, dict) and "num_gpus" in entry]
    assert engine["num_gpus"] == 0.5


def test_an_engines_time_to_start_begins_when_its_model_is_there(beginnings):
    seen = beginnings(beside=False)
    assert seen.index("prepare") > got(seen, "fetch")


def test_every_process_of_the_trainer_needs_a_place(monkeypatch, beginnings):
    settings = {"device": "cuda", "training": {"steps": 1, "workers": 2}, "rollout": {"questions_per_step": 4}}
    with pytest.raises(
        ConfigError, match=r"needs 3 GPUs \(1 engine\(s\), 0 index\(es\) and 2 trainer\(s\)\), and Ray has 2 free"
    ):
        beginnings(**settings)
    assert order(beginnings(beside=False, **settings)) == ["fetch", "prepare", "close"]


def test_a_place_for_each_engine_and_each_process_of_the_trainer_is_enough(beginnings):
    assert order(beginnings(cpus=2.0)) == ["trainer", "fetch", "prepare", "close"]
    with pytest.raises(
        EnvironmentFailure, match=r"needs 2 CPUs \(1 engine\(s\), .* and 1 trainer\(s\)\), .* has 1 free"
    ):
        beginnings(cpus=1.0)


def test_a_ray_on_this_machine_gets_the_store_that_was_planned(beginnings):
    for planned in (None, 3 << 30):
        started = next(entry for entry in beginnings(store_bytes=planned) if "object_store_memory" in entry)
        assert started["object_store_memory"] == planned


def test_what_ends_beside_the_engines_ends_their_start(monkeypatch, tmp_path, tokenizer):
    class Beside:
        looked = 0

        def start(self):
            """Nothing to start."""

        def check(self):
            self.looked += 1
            if self.looked == 3:
                raise EnvironmentFailure("the trainer died")

    def hang(references, timeout):
        raise GetTimeoutError

    class Actor:
        def __getattr__(self, name):
            return self

        def __call__(self, *arguments, **options):
            return self

    monkeypatch.setattr(ray, "init", lambda **options: SimpleNamespace(address_info={"session_dir": "/tmp/session"}))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray, "remote", Actor())
    monkeypatch.setattr(ray, "get", hang)
    beside = Beside()
    config = make_config(tmp_path, tokenizer, training={"steps": 1})
    with pytest.raises(EnvironmentFailure, match="the trainer died"), cluster(config, beside=beside):
        raise AssertionError("it started")
    assert beside.looked == 3


@pytest.mark.slow
def test_what_a_worker_refuses_is_told_in_its_own_words(started, tmp_path, tokenizer):
    folder = tmp_path / "model"
    tiny_llama(512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError) as raised:
        started(engine={"kind": "transformers"}, agent={"protocol": "chat_tools"})
    assert str(raised.value).startswith(
        "agent.protocol chat_tools, agent.prompt plain: the chat template of this model's"
    )
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.slow
def test_an_address_where_something_else_listens_ends_within_a_minute(tmp_path, tokenizer):
    config = tmp_path / "http.yaml"
    questions = tmp_path / "questions.jsonl"
    config.write_text(make_config(tmp_path, tokenizer).to_yaml())
    questions.write_text('{"id": "1", "question": "where?", "golden_answers": ["there"]}\n')
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "agentrl.cli", "eval", "--config", config, "--questions", questions]
        started = time.monotonic()
        result = subprocess.run(
            [*command, f"ray.address={address}"],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ
            | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"},
        )
    assert result.returncode == 1
    assert f"ray.address {address}: cannot connect" in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - started < 75
