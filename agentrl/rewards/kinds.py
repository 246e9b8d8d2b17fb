"""The rewards that agentrl has, by the names that a config gives them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from agentrl import scores
from agentrl.rewards.judge import Judge
from agentrl.scores import RuleName
from agentrl.types import INVALID, Trajectory, Turn

_TAG = re.compile(r"<(/?)(\w+)>")


def exact_match(trajectory: Trajectory, *, rule: RuleName = "agentrl") -> float:
    """Return 1.0 where the episode's answer is an accepted one, and 0.0 where it is another or missing.

    Source: Search-R1's outcome reward (arXiv 2503.09516, section 3.4).

    Raises:
        ValueError: if the question has no accepted answer.
    """
    return _scored(trajectory, scores.exact_match, rule)


def f1(trajectory: Trajectory, *, rule: RuleName = "agentrl") -> float:
    """Return the token F1 of the episode's answer, 0.0 where it is missing; see `agentrl.scores.f1`."""
    return _scored(trajectory, scores.f1, rule)


def sub_exact_match(trajectory: Trajectory, *, rule: RuleName = "agentrl") -> float:
    """Return 1.0 where an accepted answer stands within the episode's answer; see `agentrl.scores.sub_exact_match`."""
    return _scored(trajectory, scores.sub_exact_match, rule)


def output_format(
    trajectory: Trajectory, *, turns: Literal["share", "all"] = "share", closing_tags: bool = False
) -> float:
    """Return the share of the turns that are well formed, or with `all` 1.0 if all of them are, else 0.0.

    A turn is well formed if the protocol found an action in it, and with `closing_tags` if it also closes each tag `<name>`
    that it opens, the last one opened first. An episode without a turn earns 0.0.
    """
    formed = [turn.action.kind != INVALID and not (closing_tags and _open_tags(turn)) for turn in trajectory.turns]
    share = sum(formed) / max(1, len(formed))
    return share if turns == "share" else float(share == 1.0)


def search_cost(trajectory: Trajectory) -> float:
    """Return the number of executed searches, negative: times the weight, it is what they cost."""
    return -float(len(trajectory.searches))


def retrieval_recall(trajectory: Trajectory, *, key: str = "gold_passage_ids") -> float:
    """Return the share of the question's gold passages that the episode's searches found.

    Raises:
        ValueError: if the metadata of the question has no list of ids under `key`.
    """
    gold = trajectory.question.metadata.get(key)
    if not isinstance(gold, list | tuple) or not gold:
        raise ValueError(f"question {trajectory.question.id} has no list metadata.{key}")
    found = {passage for search in trajectory.searches for passage in search.passage_ids}
    return len(found & set(gold)) / len(set(gold))


def length(trajectory: Trajectory, *, limit: int, cache: int) -> float:
    """Return what the episode's length takes off its reward, negative: from -1 to 0.

    The length is that of the model's own tokens: how long passages are is the retriever's doing, and a limit on them all
    would punish searching. Of L tokens it is -(L - (limit - cache)) / cache within these bounds.

    Source: the soft overlong punishment of DAPO (arXiv 2503.14476, section 3.4).
    """
    over = trajectory.model_tokens - (limit - cache)
    return -min(1.0, max(0.0, over / cache))


REWARDS: Mapping[str, Callable[..., Any]] = {
    "exact_match": exact_match,
    "f1": f1,
    "sub_exact_match": sub_exact_match,
    "format": output_format,
    "search_cost": search_cost,
    "retrieval_recall": retrieval_recall,
    "length": length,
    "judge": Judge,
}


def _scored(trajectory: Trajectory, score: Callable[..., float], rule: RuleName) -> float:
    if trajectory.answer is None:
        return 0.0
    return score(trajectory.answer, trajectory.question.golden_answers, rule)


def _open_tags(turn: Turn) -> bool:
    """Tell whether a tag of the turn is not closed, or closed without being open."""
    opened: list[str] = []
    for closes, name in _TAG.findall(turn.text):
        if not closes:
            opened.append(name)
        elif not opened or opened.pop() != name:
            return True
    return bool(opened)
