"""A config, questions, and a stand-in for the cluster that the commands start."""

import dataclasses
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from fakes import make_episode

from agentrl.types import End, FailureCause


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"id": str(i), "question": f"why {i}?", "golden_answers": ["so"]} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(tmp_path):
    """A config whose retriever is elsewhere, so that nothing of it has to be on this disk."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\nmodel: {path: some/model}\nretriever: {kind: http, url: 'http://127.0.0.1:9/retrieve'}\n"
        "rollout: {group_size: 4}\nagent: {temperature: 0.7}\n"
    )
    return path


@pytest.fixture
def sampled(monkeypatch):
    """Stand in for the cluster: every second episode is right. Returns what the pool was asked for."""
    asked = {}

    class Pool:
        def sample(self, requests, temperature, on_done, on_stall, rewarded=True):
            asked.update(ids=[ids for _, ids in requests], temperature=temperature)
            groups = [
                [
                    make_episode(name, question, searches=i % 2, answer="so", reward=float(i % 2))
                    for i, name in enumerate(ids)
                ]
                for question, ids in requests
            ]
            if asked.get("broken"):
                groups = [
                    [
                        dataclasses.replace(
                            t,
                            end=End.ENVIRONMENT_FAILURE,
                            cause=FailureCause.RETRIEVER,
                            reward=None,
                            failure="gone",
                        )
                        for t in group
                    ]
                    for group in groups
                ]
            on_done(sum(map(len, groups)))
            return groups

    @contextmanager
    def cluster(config, on_phase):
        asked["config"] = config
        yield SimpleNamespace(pool=Pool())

    @contextmanager
    def local_pool(config, on_phase):
        asked["config"] = config
        yield Pool()

    monkeypatch.setattr("agentrl.rollout.cluster.cluster", cluster)
    monkeypatch.setattr("agentrl.rollout.local.local_pool", local_pool)
    return asked
