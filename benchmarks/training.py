"""What a training step of agentrl costs beside that of stock TRL, and beside the machine's own matrix products.

    python benchmarks/training.py [--workload a,b,c] [--groups N] [--repeats N] [--threads N] [--tokens N] [--small] [--json FILE]

A step is forward and backward of one optimizer update: LoRA of rank 16 on all linear layers of SmolLM2-135M in fp32, loss
dapo, groups of 8 episodes. The rival is TRL's GRPOTrainer, micro-batches of 4 episodes, padded, its own loss. Both sides have
the same weights, episodes and advantages; their gradients are compared, and a difference of more than 1e-4 ends the run.

a. Synthetic episodes: a prompt of 250 tokens for each group, 0 to 3 searches of 15-30 tokens each with an observation of
   180-260, an answer of 15-40. Only the prompt is shared.
b. Episodes that SmolLM2-135M with the starter adapter sampled on the demo world (benchmarks/data/smollm2_episodes.json, made
   by `agentrl rollout --config smollm2.yaml --limit 2 --samples 8 --out FILE` and `python benchmarks/training_work.py FILE`).
c. The same behind an instruction of 250 tokens, which all of them share.

Each side has a process of its own, whose peak memory is that of the whole process; steps alternate. The machine's rate is
that of bare matrix products in the shapes of the model's linear layers, 1,024 tokens at a time, forward and backward to the
input. A side's rate counts the products that a step cannot do without: linear layers forward and backward to the input and
attention over the tokens that differ, and the logits that are scored.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import in_turns, spread, written
from rich.console import Console
from rich.table import Table
from training_work import SIDES, Task, Worker, machine_rate

console = Console()
RATIOS = {"a": "trl_step", "b": "trl_step_shared", "c": "trl_step_instruct"}


def measure(workload: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turns and return seconds, memory, rates and how far their gradients are apart."""
    task = Task(workload, options.groups, options.small, options.threads, options.tokens)
    workers = {side: Worker(side, task) for side in SIDES}
    try:
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        rates: list[float] = []
        for number in range(options.repeats):
            rates.append(machine_rate(task))
            for side in in_turns(SIDES, number):
                seconds[side].append(workers[side].step())
                console.print(f"{workload}: step {number + 1} of {options.repeats}, {side}: {seconds[side][-1]:.1f} s")
        apart = difference(*(workers[side].gradients() for side in SIDES))
        console.print(f"{workload}: gradients differ by {apart:.1e} of their norm")
        if not apart < 1e-4:
            raise SystemExit("the two sides did not compute the same gradients")
        facts = workers["agentrl"].facts()
        memory = {side: workers[side].peak_bytes() for side in SIDES}
    finally:
        for worker in workers.values():
            worker.close()
    ratios = [trl / ours for trl, ours in zip(seconds["trl"], seconds["agentrl"], strict=True)]
    reached = [facts["flops"] / s / rate for s, rate in zip(seconds["agentrl"], rates, strict=True)]
    return facts | {
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "step_ratio": spread(ratios),
        "peak_bytes": memory,
        "memory_ratio": memory["agentrl"] / memory["trl"],
        "machine_flops": spread(rates),
        "machine_share": spread(reached),
        "gradient_difference": apart,
    }


def difference(one: Any, other: Any) -> float:
    return float(((one - other) ** 2).sum() ** 0.5 / (other**2).sum() ** 0.5)


def show(results: dict[str, dict[str, Any]]) -> None:
    table = Table(
        "", "tokens", "of these computed", "trl s", "agentrl s", "times as fast", "memory", "of the machine's rate"
    )
    for name, found in results.items():
        table.add_row(
            name,
            f"{found['tokens']:,}",
            f"{found['unique_tokens']:,}",
            written(found["seconds"]["trl"], 1),
            written(found["seconds"]["agentrl"], 1),
            written(found["step_ratio"]),
            f"{found['peak_bytes']['agentrl'] / 2**30:.1f} of {found['peak_bytes']['trl'] / 2**30:.1f} GiB",
            written(found["machine_share"]),
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="a,b,c", type=lambda text: text.split(","))
    parser.add_argument("--groups", type=int, default=2, help="groups of 8 episodes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=None, help="training.tokens_per_micro_batch")
    parser.add_argument("--small", action="store_true", help="a random model of two layers and short episodes: seconds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for workload in options.workload:
        results[workload] = measure(workload, options)
        if options.json:
            options.json.write_text(json.dumps(report(results, options), indent=2) + "\n", encoding="utf-8")
    show(results)


def report(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    ratios = {RATIOS[name]: found["step_ratio"]["median"] for name, found in results.items()}
    ratios["memory"] = max(found["memory_ratio"] for found in results.values())
    ratios["machine_rate"] = statistics.median(found["machine_share"]["median"] for found in results.values())
    return {
        "ratios": ratios,
        "workloads": results,
        "settings": {"groups": options.groups, "repeats": options.repeats, "threads": options.threads}
        | {"tokens": options.tokens, "small": options.small},
        "versions": {name: version(name) for name in ("torch", "trl", "transformers", "peft")},
        "machine": platform.platform(),
    }


if __name__ == "__main__":
    main()
