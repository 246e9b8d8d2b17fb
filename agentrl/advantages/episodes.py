"""What estimators with lengths or turns need to know of an episode."""

from __future__ import annotations

from agentrl.metrics import normalize_answer
from agentrl.types import Trajectory


def length(trajectory: Trajectory) -> int:
    """The number of tokens that the model sampled, or 1 if there is none: a length is a weight, which cannot be 0."""
    return max(1, sum(len(turn.token_ids) for turn in trajectory.turns))


def anchors(trajectory: Trajectory) -> list[str]:
    """What the model had been shown last before each turn: the observation of the turn before, nothing before the first.

    Turns of one question that follow the same observation are GiGPO's steps from one anchor state (arXiv 2505.10978).
    """
    return ["", *(turn.observation for turn in trajectory.turns[:-1])]


def turn_rewards(trajectory: Trajectory) -> list[float]:
    """1 for each turn whose observation holds an accepted answer, else 0 (MT-GRPO's presence reward, arXiv 2505.11821)."""
    accepted = [words for answer in trajectory.question.golden_answers if (words := normalize_answer(answer))]
    shown = [f" {normalize_answer(turn.observation)} " for turn in trajectory.turns]
    return [float(any(f" {answer} " in text for answer in accepted)) for text in shown]
