"""The tools of examples/ are called in the episodes of a real policy, through the command line."""

import json
from pathlib import Path

import pytest

from agentrl.runs import read_trajectories

TOP = Path(__file__).parents[2]

MINE = """
from agentrl.agent.protocols import SearchTags
from agentrl.types import Action


class Nothing:
    async def search(self, queries, k):
        return [[] for _ in queries]


class ForSearches(SearchTags):
    \"\"\"Calls the tool of the example wherever the policy would search.\"\"\"

    def parse(self, text):
        action = super().parse(text)
        if action.kind != "search":
            return action
        if "calculator" in self.tools:
            return Action("calculator", "", {"a": 6, "sign": "*", "b": 7})
        return Action("note", "", {"key": "found", "value": action.argument})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "told"), [("calculator:Calculator", "calculator", "42"), ("notebook:Notebook", "note", None)]
)
def test_an_example_is_called_in_a_rollout(agentrl, tmp_path, monkeypatch, kind, name, told):
    (tmp_path / "tools_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    # A user's own module is found where the command is run.
    monkeypatch.chdir(TOP / "examples")
    question = {"id": "1", "question": "Which country does the city of Recife belong to?", "golden_answers": ["Brazil"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    config, out = tmp_path / "small.yaml", tmp_path / "episodes.jsonl.zst"
    config.write_text(
        "name: small\nmodel: {path: pocket_policy}\nretriever: {kind: object, target: 'tools_of_mine:Nothing', k: 1}\n"
        "agent: {protocol: 'tools_of_mine:ForSearches', instruction: '', max_turns: 2, max_turn_tokens: 48, "
        f"max_episode_tokens: 512, tools: [search, '{kind}']}}\n"
        "engine: {threads: 1}\n"
    )
    arguments = ["--quick", "--samples", 4, "--questions", tmp_path / "questions.jsonl", "--out", out]
    status, _, err = agentrl("rollout", "--config", config, *arguments)
    assert (status, err) == (0, "")
    turns = [turn for episode in read_trajectories(out) for turn in episode.turns if turn.calls]
    assert turns
    for turn in turns:
        (call,) = turn.calls
        assert call.tool == name
        assert turn.observation == f"\n<information>\n{told or call.arguments['value']}\n</information>\n"
