"""How many trajectories a second the driver of a run takes: from the object store into memory, to the disk, and scored.

    python benchmarks/driver.py [--questions N] [--group N] [--tokens N] [--runs N] [--ray] [--json FILE]

The driver is the real `StepSampler` with the real run folder; its pool only hands out finished groups, pickled as Ray
pickles them, or with --ray from a real object store. A trajectory has three turns and two searches; three tenths of its
tokens are the model's. The rival differs in how it writes: `dataclasses.asdict`, `json.dumps` and zstandard's level 6, for
all episodes of a step at once. Both must leave the same episodes on the disk and the same batch. Rates are medians of the
runs with their range, by the clock and by the processor's time, which other programs on the machine hardly change; the
methods take turns, each first in as many runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import pickle
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from measuring import in_turns, spread, written
from rich.console import Console
from rich.table import Table

from agentrl.config import Config, parse_config
from agentrl.data.stream import QuestionStream
from agentrl.runs import append_trajectories, read_trajectories
from agentrl.training.sampling import ScoredBatch, StepSampler
from agentrl.types import ANSWER, SEARCH, Action, End, Question, ToolCall, Trajectory, Turn

METHODS = ("agentrl", "asdict and json")
CLOCKS = ("wall", "processor")
SEARCHES, PROMPT, VOCABULARY = 2, 100, 150_000


def make_trajectory(rng: random.Random, question: Question, name: str, tokens: int) -> Trajectory:
    """Make an episode of `tokens` ids after its prompt; its log-probabilities are float32 numbers, as engines give them."""
    own, observed = round(0.3 * tokens) // (SEARCHES + 1), round(0.7 * tokens) // SEARCHES

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(count))

    def turn(number: int) -> Turn:
        searches = number < SEARCHES
        return Turn(
            ids(own),
            tuple(float(np.float32(-rng.expovariate(2))) for _ in range(own)),
            "thought " * (own // 2),
            Action(SEARCH if searches else ANSWER, f"query {number}"),
            0,
            (ToolCall(SEARCH, {"query": f"query {number}"}, 0.01, ("17", "4", "99"), (9.5, 8.25, 7.0)),)
            if searches
            else (),
            ids(observed) if searches else (),
            "passage " * (observed // 2) if searches else "",
        )

    turns = tuple(map(turn, range(SEARCHES + 1)))
    return Trajectory(name, question, ids(PROMPT), turns, End.ANSWERED, "so", float(rng.random() < 0.4))


class FinishedGroups:
    """Stands in for the rollout pool: each group is done at once, and is fetched when the driver asks for it."""

    def __init__(self, fetch: Sequence[Callable[[], list[Trajectory]]]) -> None:
        self._fetch = fetch

    def stream(self, **_: Any) -> FinishedGroups:
        self._next, self._asked = 0, 0
        return self

    def add(self, requests: Iterable[Any]) -> None:
        self._asked += len(list(requests))

    def __iter__(self) -> Iterator[tuple[int, list[Trajectory]]]:
        return self

    def __next__(self) -> tuple[int, list[Trajectory]]:
        if self._next == self._asked:
            raise StopIteration
        self._next += 1
        return self._next - 1, self._fetch[self._next - 1]()

    def close(self) -> None:
        """Nothing runs."""


def write_with_asdict(path: Path, trajectories: Sequence[Trajectory]) -> None:
    text = "".join(json.dumps(dataclasses.asdict(t), ensure_ascii=False) + "\n" for t in trajectories)
    path.write_bytes(zstandard.ZstdCompressor(level=6).compress(text.encode("utf-8", "surrogatepass")))


def take_step(
    method: str, config: Config, pool: Any, questions: list[Question], path: Path
) -> tuple[float, ScoredBatch]:
    """Sample, record and score one step; return the seconds that it took, and its batch."""
    everyone: list[Trajectory] = []

    def record(step: int, trajectories: Sequence[Trajectory]) -> None:
        if method == "agentrl":
            append_trajectories(path, trajectories)
        else:
            everyone.extend(trajectories)

    sampler = StepSampler(config, pool, QuestionStream([(questions, 1.0)], 0), record, lambda done: None)
    gc.collect()
    started = time.perf_counter(), time.process_time()
    batch = sampler(1, len(questions) * config.rollout.group_size)
    if everyone:
        write_with_asdict(path, everyone)
    return (time.perf_counter() - started[0], time.process_time() - started[1]), batch


def check_equal(paths: Sequence[Path], batches: Sequence[ScoredBatch]) -> None:
    """Raise AssertionError unless all methods left the same episodes and made the same batch."""
    first, *others = [list(read_trajectories(path)) for path in paths]
    assert all(other == first for other in others), "the files hold different episodes"
    plain = [{n: v for n, v in b.metrics.items() if "second" not in n or n == "seconds/search"} for b in batches]
    for batch, metrics in zip(batches, plain, strict=True):
        assert batch.advantages == batches[0].advantages, "the batches differ"
        assert metrics == plain[0], "the metrics differ"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(0)
    config = parse_config(
        {
            "name": "driver",
            "model": {"path": "m/m"},
            "rollout": {"group_size": arguments.group, "questions_per_step": arguments.questions},
            "training": {"steps": 1},
        },
        source="benchmark",
    )
    questions = [Question(f"set:{i}", f"who was number {i}?", ("so", "thus")) for i in range(arguments.questions)]
    asked = QuestionStream([(questions, 1.0)], 0).take(0, len(questions))
    groups = [
        [make_trajectory(rng, question, f"1/{i}/{k}", arguments.tokens) for k in range(arguments.group)]
        for i, question in enumerate(asked)
    ]
    pool = FinishedGroups(list(_stored(groups, arguments.ray)))
    episodes = arguments.questions * arguments.group
    rates: dict[str, dict[str, list[float]]] = {method: {clock: [] for clock in CLOCKS} for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.runs):
            paths = {method: Path(folder) / f"{number}-{method}.jsonl.zst" for method in METHODS}
            batches = {}
            for method in in_turns(METHODS, number):
                times, batches[method] = take_step(method, config, pool, questions, paths[method])
                for clock, seconds in zip(CLOCKS, times, strict=True):
                    rates[method][clock].append(episodes / seconds)
            check_equal(list(paths.values()), list(batches.values()))
            sizes = {method: path.stat().st_size / episodes for method, path in paths.items()}
    ours, theirs = (rates[method] for method in METHODS)
    return {
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "trajectories_per_second": {m: {c: spread(values) for c, values in rates[m].items()} for m in METHODS},
        "bytes_per_trajectory": sizes,
        "ratio": {c: spread([a / b for a, b in zip(ours[c], theirs[c], strict=True)]) for c in CLOCKS},
    }


def _stored(groups: Sequence[list[Trajectory]], ray_store: bool) -> Iterator[Callable[[], list[Trajectory]]]:
    """Yield for each group a function that fetches it as the driver does."""
    if ray_store:
        import ray

        ray.init(address="local", include_dashboard=False, log_to_driver=False)
        for group in groups:
            yield partial(ray.get, ray.put(group))
    else:
        for group in groups:
            yield partial(pickle.loads, pickle.dumps(group, protocol=5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--ray", action="store_true", help="fetch from the object store of a local Ray")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    table = Table("method", "trajectories a second", "of processor time", "bytes each")
    for method in METHODS:
        wall, processor = (written(result["trajectories_per_second"][method][clock], 0) for clock in CLOCKS)
        table.add_row(method, wall, processor, f"{result['bytes_per_trajectory'][method]:,.0f}")
    table.add_row("ratio", *(written(result["ratio"][clock], 1) for clock in CLOCKS), "")
    Console().print(table)
    print("Both left the same episodes and the same batch.")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
