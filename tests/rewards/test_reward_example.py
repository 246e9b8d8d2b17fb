"""The rewards of examples/ score the episodes of a real policy, through the command line."""

import json
from pathlib import Path

import pytest

from agentrl.runs import read_trajectories

TOP = Path(__file__).parents[2]

LIBRARY = """
from retrievers.base import Hit


class Atlas:
    async def search(self, queries, k):
        return [[Hit("recife", '"Recife"\\nThe city of Recife belongs to Brazil.', 1.0)] for _ in queries]
"""


@pytest.mark.slow
def test_the_example_rewards_the_episodes_of_a_rollout(agentrl, tmp_path, monkeypatch):
    (tmp_path / "atlas_of_mine.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    # A user's own module is found where the command is run.
    monkeypatch.chdir(TOP / "examples")
    question = {"id": "1", "question": "Which country does the city of Recife belong to?", "golden_answers": ["Brazil"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    config, out = tmp_path / "small.yaml", tmp_path / "episodes.jsonl.zst"
    config.write_text(
        "name: small\nmodel: {path: pocket_policy}\nretriever: {kind: object, target: 'atlas_of_mine:Atlas', k: 1}\n"
        'agent: {instruction: "", max_turns: 2, max_turn_tokens: 48, max_episode_tokens: 512}\n'
        "engine: {threads: 1}\n"
        "reward: [{kind: 'reward:stated', options: {bonus: 0.25}}, {kind: 'reward:Brevity', weight: 0.2, options: {tokens: 4}}]\n"
    )
    arguments = ["--quick", "--samples", 4, "--questions", tmp_path / "questions.jsonl", "--out", out]
    status, shown, err = agentrl("rollout", "--config", config, *arguments)
    assert (status, err) == (0, "")
    assert "stated/right 1, stated/stated 0.25, Brevity -" in shown
    for episode in read_trajectories(out):
        parts = episode.reward_parts
        assert set(parts) == {"stated/right", "stated/stated", "Brevity"}
        assert parts["Brevity"] == -max(0.0, episode.model_tokens / 4 - 1.0)
        assert episode.reward == pytest.approx(parts["stated/right"] + parts["stated/stated"] + 0.2 * parts["Brevity"])
