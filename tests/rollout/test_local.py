"""A policy is sampled in one process: engine, Lucene and episodes, without Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_llama

TOP = Path(__file__).parents[2]


def agentrl(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "agentrl.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def policy(tmp_path, tokenizer):
    """A config with a random model, an index of two passages and four questions."""
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    rows = [{"id": str(i), "contents": f'"Title {i}"\nPassage {i}.'} for i in range(2)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"id": str(i), "question": f"why {i}?", "golden_answers": ["so"]} for i in range(4)]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = agentrl("index", "build", "--corpus", tmp_path / "corpus.jsonl", "--out", tmp_path / "index")
    assert built.returncode == 0, built.stderr
    config = tmp_path / "small.yaml"
    config.write_text(
        f"name: small\nmodel: {{path: {tmp_path / 'model'}}}\ndata: {{root: {tmp_path}, eval: [{{path: dev.jsonl}}]}}\n"
        "retriever: {index: index, k: 1}\nagent: {max_turns: 2, max_turn_tokens: 16, max_episode_tokens: 600}\n"
    )
    return config


@pytest.mark.slow
def test_a_policy_is_shown_from_one_process(policy):
    shown = agentrl("rollout", "--config", policy, "--quick", "--samples", 2)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("question  ") == 6
    assert "episodes  6 for 3 question(s)" in shown.stdout
    assert "ray" not in shown.stdout.lower().replace("without ray", "")


@pytest.mark.slow
def test_a_damaged_index_is_one_message(policy):
    (policy.parent / "index" / "manifest.json").write_text("{")
    shown = agentrl("rollout", "--config", policy, "--quick")
    assert shown.returncode == 1
    assert "manifest.json" in shown.stderr
    assert "Traceback" not in shown.stderr
