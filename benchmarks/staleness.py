"""What working ahead of the trainer gains: seconds a step with `rollout.max_staleness` 0 and 1, end to end.

    python benchmarks/staleness.py [--steps N] [--config smollm2.yaml] [--json FILE] KEY=VALUE...

Trains twice from the same start with the same questions, everything else equal: SmolLM2-135M, two engines of one thread
each and a trainer of one thread by default. A step is what its trainer waits for rollouts, trains and publishes. The first
step is left out: nothing can be made ahead of it. Data is looked up under $AGENTRL_DATA, as `agentrl train` does.

Fresh rollouts have a ratio between trainer and sampler of 1 up to numerical noise; those of older weights have not. Its
1 %, 50 % and 99 % quantiles over the tokens of advantage >= 0 are printed beside the gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measuring import spread, written
from rich.console import Console
from rich.table import Table

SETTINGS = (
    "rollout.workers=2",
    "engine.threads=1",
    "training.threads=1",
    "evaluation.before=false",
    "evaluation.after=false",
)
PARTS = ("seconds/wait", "seconds/train", "seconds/publish")
SHOWN = (*PARTS, "staleness/mean", "ratio/positive_q01", "ratio/positive_q50", "ratio/positive_q99")

console = Console()


def train(config: str, staleness: int, steps: int, more: Sequence[str], folder: Path) -> list[dict[str, float]]:
    """Run `agentrl train` and return the metrics of its steps from the second."""
    name = f"staleness-{staleness}"
    overrides = [*SETTINGS, f"training.steps={steps}", f"run_dir={folder}", f"name={name}"]
    overrides += [f"rollout.max_staleness={staleness}", *more]
    subprocess.run([sys.executable, "-m", "agentrl.cli", "train", "--config", config, *overrides], check=True)
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2.yaml")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    report: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for staleness in (0, 1):
            metrics = train(options.config, staleness, options.steps, options.overrides, Path(folder))
            own = {name: [line.get(name, float("nan")) for line in metrics] for name in SHOWN}
            own["seconds/step"] = [sum(line[part] for part in PARTS) for line in metrics]
            report[f"max_staleness_{staleness}"] = own
    table = Table("median of the steps", *report, title="Working ahead of the trainer", title_justify="left")
    for name in ("seconds/step", *SHOWN):
        values = [own[name] for own in report.values()]
        table.add_row(name, *(written(spread(value), 3) for value in values))
    console.print(table)
    fresh, ahead = (statistics.median(own["seconds/step"]) for own in report.values())
    console.print(f"max_staleness 1 is {fresh / ahead:.2f} times as fast", highlight=False)
    if options.json:
        options.json.write_text(json.dumps({"ratio": fresh / ahead, **report}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
