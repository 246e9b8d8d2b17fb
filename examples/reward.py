"""Rewards of your own: right answers, answers that a passage states, and little writing. Called in this folder:

agentrl rollout --config pocket.yaml --quick data.root=../data 'reward=[{kind: "reward:stated"}, {kind: "reward:Brevity"}]'
"""

from agentrl.rewards import exact_match
from agentrl.types import Trajectory


def stated(trajectory: Trajectory, bonus: float = 0.5) -> dict[str, float]:
    answer, shown = trajectory.answer, [turn.observation for turn in trajectory.turns]
    return {"right": exact_match(trajectory), "stated": bonus * bool(answer and any(answer in text for text in shown))}


class Brevity:
    def __init__(self, tokens: int = 60) -> None:
        self.tokens = tokens

    async def __call__(self, trajectory: Trajectory) -> float:
        return -max(0.0, trajectory.model_tokens / self.tokens - 1.0)
