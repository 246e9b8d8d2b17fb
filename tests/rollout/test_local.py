"""A policy is sampled in one process: engine, Lucene and episodes, without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentrl.config import load_config
from agentrl.rollout import local

TOP = Path(__file__).parents[2]


def agentrl(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "agentrl.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"},
    )


CITIES = {"Nha Trang": "Vietnam", "Da Nang": "Vietnam", "Curitiba": "Brazil", "Recife": "Brazil"}


@pytest.fixture
def policy(tmp_path):
    """A config with the pocket policy, an index of four cities and a question on each."""
    rows = [
        {"id": city, "contents": f'"{city}"\nThe city of {city} belongs to {country}.'}
        for city, country in CITIES.items()
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"id": city, "question": f"Which country does the city of {city} belong to?", "golden_answers": [country]}
        for city, country in CITIES.items()
    ]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = agentrl("index", "build", "--corpus", tmp_path / "corpus.jsonl", "--out", tmp_path / "index")
    assert built.returncode == 0, built.stderr
    config = tmp_path / "small.yaml"
    config.write_text(
        f"name: small\nmodel: {{path: pocket_policy}}\ndata: {{root: {tmp_path}, eval: [{{path: dev.jsonl}}]}}\n"
        'retriever: {index: index, k: 1}\nagent: {instruction: "", max_turns: 2, max_turn_tokens: 48, '
        "max_episode_tokens: 512}\n"
    )
    return config


@pytest.mark.slow
def test_a_policy_is_shown_from_one_process(policy):
    shown = agentrl("rollout", "--config", policy, "--quick", "--samples", 4)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("question  ") == 12
    assert "episodes  12 for 3 question(s)" in shown.stdout
    # It searches, reads what it found, and answers rightly.
    assert "belongs to Vietnam." in shown.stdout
    assert "reward      1  answered" in shown.stdout
    assert "ray" not in shown.stdout.lower().replace("without ray", "")


@pytest.mark.slow
def test_a_config_for_a_gpu_is_refused_without_one(policy):
    shown = agentrl("rollout", "--config", policy, "--quick", "device=cuda")
    assert shown.returncode == 1
    assert "asks for device cuda and this machine has no GPU" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.slow
def test_what_was_opened_is_closed(policy, monkeypatch):
    opened = []

    class Recorded:
        def __init__(self, path):
            self.closed = False
            opened.append(self)

        async def search(self, queries, k):
            return [[] for _ in queries]

        def close(self):
            self.closed = True

    monkeypatch.setattr(local, "open_index", Recorded)
    with local.local_pool(local.local_config(load_config(str(policy), []))):
        assert [index.closed for index in opened] == [False]
    assert [index.closed for index in opened] == [True]


@pytest.mark.slow
def test_a_damaged_index_is_one_message(policy):
    (policy.parent / "index" / "manifest.json").write_text("{")
    shown = agentrl("rollout", "--config", policy, "--quick")
    assert shown.returncode == 1
    assert "manifest.json" in shown.stderr
    assert "Traceback" not in shown.stderr
