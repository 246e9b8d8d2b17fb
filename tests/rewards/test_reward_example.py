"""The rewards of examples/ score the episodes of a real policy, through the command line."""

import pytest

LIBRARY = """
from retrievers.base import Hit


class Atlas:
    async def search(self, queries, k):
        return [[Hit("recife", '"Recife"\\nThe city of Recife belongs to Brazil.', 1.0)] for _ in queries]
"""

REWARD = "reward=[{kind: 'reward:stated', options: {bonus: 0.25}}, {kind: 'reward:Brevity', weight: 0.2, options: {tokens: 4}}]"


@pytest.mark.slow
def test_the_example_rewards_the_episodes_of_a_rollout(rollout_in_examples):
    episodes, shown = rollout_in_examples(LIBRARY, REWARD)
    assert "stated/right 1, stated/stated 0.25, Brevity -" in shown
    for episode in episodes:
        parts = episode.reward_parts
        assert set(parts) == {"stated/right", "stated/stated", "Brevity"}
        assert parts["Brevity"] == -max(0.0, episode.model_tokens / 4 - 1.0)
        assert episode.reward == pytest.approx(parts["stated/right"] + parts["stated/stated"] + 0.2 * parts["Brevity"])
