"""Seconds of a whole training step, rollouts and update: agentrl beside TRL's GRPOTrainer with its own tool loop.

    python benchmarks/training_end_to_end.py [--json FILE] [--repeats N] [--threads N] [--episodes N] [--small]

Both train LoRA adapters of rank 16 on a Llama of random weights with ten layers of SmolLM2-135M's sizes and 8192 tokens, in
fp32; with thirty, TRL's update does not fit beside an engine into 24 GB. A step of agentrl publishes the adapter to vLLM,
plays the episodes through the RolloutPool and updates with StratifiedTrainer, as `agentrl train` does with
`rollout.max_staleness: 0`. TRL generates with transformers, its only engine that takes new weights on a CPU, calls its
tools, and updates in micro-batches of four rows.

Episodes are scripted, so that the work is equal: questions, prompts, passages, and how many tokens each turn samples (see
benchmarks/rollout.py). The benchmark fails unless both sent prompts of the same lengths and sampled as many tokens, turn
for turn. Searches take no time. A step that warms up goes before; the sides take turns at being first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import in_process, in_turns, spread, written
from rich.console import Console
from rich.table import Table
from rollout_work import SEED, Played, Work, demo_world, in_calls, make_work, write_small_model

from agentrl.config import AgentConfig, EngineConfig
from agentrl.engines.vllm import environment

LAYERS = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
SMALL = LAYERS | {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 1, "num_key_value_heads": 1}
AGENT = AgentConfig(
    protocol="chat_tools",
    prompt="chat",
    max_turns=3,
    max_turn_tokens=160,
    max_observation_tokens=200,
    max_episode_tokens=2048,
)
TOKENS = (16, 48)
PLACES, ROWS = 16, 4
PARTS = ("rollout", "update", "step")

console = Console()


class Agentrl:
    """agentrl's side: a pool in front of one engine, and a StratifiedTrainer of the same adapter."""

    def __init__(self, bench: Any, policy: Any, folder: Path, tokens: int) -> None:
        from training_work import make_tokenizer

        from agentrl.training.scoring import Scorer
        from agentrl.training.settings import grpo_config
        from agentrl.training.trainer import StratifiedTrainer
        from agentrl.training.updates import Updates

        self._bench, self._batches, self._steps = bench, [], 0
        self._trainer = StratifiedTrainer(
            model=policy,
            processing_class=make_tokenizer(),
            sample=self._batches.pop,
            scorer=lambda model: Scorer(model, tokens=tokens, merge=True),
            updates=Updates(group_size=8),
            # A script's tokens are not those that the model would have sampled.
            prove_weights=False,
            args=grpo_config(
                output_dir=str(folder), max_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False
            ),
        )
        self._trainer.create_optimizer()

    def step(self, work: Work) -> tuple[float, Played]:
        """Publish, play and update; return the seconds of the rollout, and what was played."""
        from rollout_trl import update

        from agentrl.training.adapter import adapter_files
        from agentrl.training.sampling import ScoredBatch

        self._bench.pool.publish(self._steps, adapter_files(self._trainer.model))
        self._steps += 1
        groups, played = self._bench.sample(work)
        episodes = [trajectory for group in groups for trajectory in group]
        self._batches.append(ScoredBatch(episodes, [1.0 if i % 2 else -1.0 for i in range(len(episodes))], {}))
        self._trainer.training_step(self._trainer.model, {})
        update(self._trainer)
        return played.seconds, played


def measure(folder: Path, sizes: Mapping[str, int], episodes: int, repeats: int, threads: int) -> dict[str, Any]:
    """Take `repeats` steps of each side, and return their seconds."""
    passages, questions = demo_world(folder / "demo")
    model = folder / "model"
    # In a process of its own: torch's threads must not be in the one that forks engines.
    parameters = in_process(write_small_model, model, passages, sizes)
    from rollout_pool import bench as start_bench

    with start_bench(str(model), AGENT, PLACES, threads, passages, questions) as bench:
        import torch
        from rollout import check_equal
        from rollout_trl import TrlLoop
        from training_work import Setting, make_policy, run_tokens

        torch.set_num_threads(threads)
        policies = [make_policy(Setting(str(model), "cpu", threads, None)) for _ in range(2)]
        ours = Agentrl(bench, policies[0], folder / "agentrl", run_tokens(policies[0], "cpu"))
        theirs = TrlLoop(bench, str(model), folder / "trl", "transformers", episodes, policies[1], ROWS)

        def step(side: str, work: Work) -> tuple[dict[str, float], Any]:
            started = time.perf_counter()
            if side == "agentrl":
                rollout, made = ours.step(work)
            else:
                made = theirs.step(work)
                rollout = made.seconds
            whole = time.perf_counter() - started
            console.print(f"  {side}: {whole:.1f} s, of which the rollout {rollout:.1f} s", highlight=False)
            return {"rollout": rollout, "update": whole - rollout, "step": whole}, made

        found: dict[str, list[dict[str, float]]] = {"agentrl": [], "trl": []}
        tokens = []
        for number in range(-1, repeats):
            console.print("warming up" if number < 0 else f"round {number + 1} of {repeats}", highlight=False)
            work = make_work(questions, episodes, TOKENS, seed=number, write=in_calls)
            made = {}
            for side in in_turns(list(found), max(number, 0)):
                seconds, made[side] = step(side, work)
                if number >= 0:
                    found[side].append(seconds)
            check_equal(work, made["agentrl"], made["trl"])
            tokens.append(work.tokens)
    return summary(found) | {"parameters": parameters, "sizes": dict(sizes), "sampled_tokens": tokens[1:]}


def summary(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return seconds and ratios of each part of a step."""
    return {
        "seconds": {side: {part: [s[part] for s in steps] for part in PARTS} for side, steps in found.items()},
        "ratio": {
            part: spread([b[part] / a[part] for a, b in zip(found["agentrl"], found["trl"], strict=True)])
            for part in PARTS
        },
    }


def table(result: Mapping[str, Any]) -> Table:
    shown = Table("", *PARTS)
    for side, seconds in result["seconds"].items():
        shown.add_row(f"{side}, s", *(written(spread(seconds[part]), 1) for part in PARTS))
    shown.add_row("TRL's to agentrl's", *(written(result["ratio"][part]) for part in PARTS))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, one round; the numbers say nothing")
    parser.add_argument("--repeats", type=int, help="by default 5, and 1 with --small")
    parser.add_argument("--episodes", type=int, default=16, help="of a step, a multiple of 8; by default 16")
    parser.add_argument("--threads", type=int, default=1, help="of engine and trainers, by default 1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    repeats = options.repeats or (1 if options.small else 5)
    os.environ.update(environment(EngineConfig(threads=options.threads), "cpu"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    report: dict[str, Any] = {
        "small": options.small,
        "repeats": repeats,
        "episodes": options.episodes,
        "threads": options.threads,
        "seed": SEED,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    with tempfile.TemporaryDirectory() as folder:
        sizes = SMALL if options.small else LAYERS
        report |= measure(Path(folder), sizes, options.episodes, repeats, options.threads)
    report["ratios"] = {"end_to_end_trl": report["ratio"]["step"]["median"]}
    console.print(table(report))
    console.print(f"end_to_end_trl {report['ratios']['end_to_end_trl']:.2f}", highlight=False)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
