"""The tools of examples/ are called in the episodes of a real policy, through the command line."""

import pytest

MINE = """
from agentrl.agent.protocols import SearchTags
from agentrl.types import Action


class Atlas:
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
def test_an_example_is_called_in_a_rollout(rollout_in_examples, kind, name, told):
    settings = ["agent.protocol=of_mine:ForSearches", f"agent.tools=[search, '{kind}']"]
    episodes, _ = rollout_in_examples(MINE, *settings)
    turns = [turn for episode in episodes for turn in episode.turns if turn.calls]
    assert turns
    for turn in turns:
        (call,) = turn.calls
        assert call.tool == name
        assert turn.observation == f"\n<information>\n{told or call.arguments['value']}\n</information>\n"
