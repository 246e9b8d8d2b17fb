"""The episodes of benchmarks/training.py, and the file of recorded ones.

    agentrl rollout --config smollm2.yaml --questions data/demo/train.jsonl --limit 2 --out episodes.jsonl.zst data.root=data
    python benchmarks/training_workloads.py episodes.jsonl.zst

The second command writes benchmarks/data/training_episodes.json: token ids, and which of them the model sampled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.runs import read_trajectories
from agentrl.types import ANSWER, Action, End, Question, Trajectory, Turn

RECORDED = Path(__file__).parent / "data" / "training_episodes.json"
MADE_BY = [line.strip() for line in (__doc__ or "").splitlines() if line.startswith("    ")]
SEED = 0
PROMPT = 250
GROUPS, GROUP_SIZE = 2, 8


@dataclass(frozen=True, slots=True)
class Workload:
    """What one optimizer step trains on.

    Attributes:
        trajectories: B episodes, group after group.
        advantages: [B], none of them 0, so that every episode has a gradient.
        group_size: episodes of a group.
    """

    trajectories: Sequence[Trajectory]
    advantages: Sequence[float]
    group_size: int

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and completions, with what they share counted each time."""
        return sum(len(t.prompt_ids) + len(t.completion_ids) for t in self.trajectories)

    @property
    def trained(self) -> int:
        return sum(t.model_tokens for t in self.trajectories)

    def first(self, number: int) -> Workload:
        """Return the first `number` episodes of each group."""
        kept = [i for i in range(len(self.trajectories)) if i % self.group_size < number]
        return Workload([self.trajectories[i] for i in kept], [self.advantages[i] for i in kept], number)

    def shortened(self, tokens: int) -> Workload:
        """Return episodes of one turn, with at most so many tokens of the prompt and of the turn."""
        short = [
            dataclasses.replace(
                t,
                prompt_ids=t.prompt_ids[-tokens:],
                turns=(_turn(t.turns[0].token_ids[:tokens], ()),),
            )
            for t in self.trajectories
        ]
        return dataclasses.replace(self, trajectories=short)

    def within(self, vocabulary: int) -> Workload:
        """Return the same shapes with ids below `vocabulary`; equal ids stay equal."""
        folded = [
            dataclasses.replace(
                t,
                prompt_ids=_folded(t.prompt_ids, vocabulary),
                turns=tuple(
                    dataclasses.replace(
                        turn,
                        token_ids=_folded(turn.token_ids, vocabulary),
                        observation_ids=_folded(turn.observation_ids, vocabulary),
                    )
                    for turn in t.turns
                ),
            )
            for t in self.trajectories
        ]
        return dataclasses.replace(self, trajectories=folded)


def synthetic() -> Workload:
    """Two groups of 8 episodes with 0 to 3 searches; the prompt of 250 tokens is all that episodes of a group share."""
    rng = random.Random(SEED)
    groups = []
    for _ in range(GROUPS):
        prompt = _ids(rng, PROMPT)
        groups.append([(prompt, _drawn_turns(rng)) for _ in range(GROUP_SIZE)])
    return _workload(groups)


def recorded() -> Workload:
    """Two groups of 8 episodes that SmolLM2-135M with the starter adapter sampled in the demo world."""
    groups = json.loads(RECORDED.read_text(encoding="utf-8"))["groups"]
    return _workload([[(e["prompt"], e["turns"]) for e in group] for group in groups])


def instructed() -> Workload:
    """Return `recorded` with 250 tokens in front that all prompts have in common, as an instruction would be."""
    plain, instruction = recorded(), tuple(_ids(random.Random(SEED), PROMPT))
    longer = [dataclasses.replace(t, prompt_ids=instruction + t.prompt_ids) for t in plain.trajectories]
    return dataclasses.replace(plain, trajectories=longer)


WORKLOADS = {"a": synthetic, "b": recorded, "c": instructed}


def record(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Return what RECORDED holds of the episodes: `groups` of prompts and turns, each of (sampled ids, observed ids)."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for t in trajectories:
        turns = [[list(turn.token_ids), list(turn.observation_ids)] for turn in t.turns]
        groups.setdefault(t.question.id, []).append({"prompt": list(t.prompt_ids), "turns": turns})
    return {"made_by": MADE_BY, "groups": list(groups.values())}


def _workload(groups: Sequence[Sequence[tuple[Sequence[int], Sequence[Sequence[Sequence[int]]]]]]) -> Workload:
    rng = random.Random(SEED)
    trajectories = [
        _trajectory(f"{number}/{index}", prompt, turns)
        for number, group in enumerate(groups)
        for index, (prompt, turns) in enumerate(group)
    ]
    return Workload(trajectories, [rng.gauss(0.0, 1.0) for _ in trajectories], len(groups[0]))


def _trajectory(name: str, prompt: Sequence[int], turns: Sequence[Sequence[Sequence[int]]]) -> Trajectory:
    made = tuple(_turn(own, observed) for own, observed in turns)
    return Trajectory(name, Question(name.split("/")[0], "", ()), tuple(prompt), made, End.ANSWERED)


def _turn(own: Sequence[int], observed: Sequence[int]) -> Turn:
    # Neither side's loss reads the sampler's log-probabilities.
    return Turn(tuple(own), (0.0,) * len(own), "", Action(ANSWER, ""), 0, (), tuple(observed))


def _drawn_turns(rng: random.Random) -> list[tuple[list[int], list[int]]]:
    searches = rng.choice((0, 1, 1, 2, 2, 3))
    turns = [(_ids(rng, rng.randint(15, 30)), _ids(rng, rng.randint(180, 260))) for _ in range(searches)]
    return [*turns, (_ids(rng, rng.randint(15, 40)), [])]


def _ids(rng: random.Random, number: int) -> list[int]:
    return [rng.randrange(100, 40_000) for _ in range(number)]


def _folded(ids: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    return tuple(i % vocabulary for i in ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("episodes", type=Path, help="what `agentrl rollout --out` wrote")
    options = parser.parse_args()
    found = record(list(read_trajectories(options.episodes)))
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{RECORDED}: {sum(map(len, found['groups']))} episodes in {len(found['groups'])} groups")


if __name__ == "__main__":
    main()
