"""Whether a run loses anything when its processes are killed: SIGKILL at random moments, then a resumed run, again and again.

    python benchmarks/kills.py [--kills N] [--seed N] [--data FOLDER] [--json FILE] [KEY=VALUE...]

The run is pocket.yaml, cut small, in a folder of its own; overrides change it further. The kills take turns among driver,
trainer, engine and index; a third of them come while the run starts, the others between or within steps. What ends the run
is resumed. At the end each step must have been trained once, none left out, on the questions of a run that nobody disturbed
and in their order, and whatever is on the disk must be whole. Otherwise the script fails and says what was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from agentrl.runs import RunFolder, read_trajectories
from agentrl.runs.checkpoints import damage

# What the command line of each process shows. The driver is the process that was started.
MARKS = {"trainer": "RayTrainWorker", "engine": "ray::RolloutWorker", "index": "ray::LuceneRetriever"}
VICTIMS = ("driver", *MARKS)
SMALL = (
    "rollout.group_size=4",
    "rollout.questions_per_step=2",
    "training.checkpoint_every=2",
    "engine.kind=transformers",
    "evaluation.before=false",
    "evaluation.after=false",
    "evaluation.ceiling=false",
)
START_SECONDS, LATEST_SECONDS, GONE_SECONDS = 300.0, 6.0, 150.0


@dataclass(frozen=True, slots=True)
class Kill:
    """A process that was killed.

    Attributes:
        victim: which one.
        step: how many steps were recorded then.
        starting: whether this start of the run had not recorded one yet.
        ended: whether the run ended for it, rather than bring the process back.
        seconds: what it took until trainer, engines and indexes of a run that ended were gone.
    """

    victim: str
    step: int
    starting: bool
    ended: bool
    seconds: float


class Run:
    """A run in a process of its own, started and resumed as a user would."""

    def __init__(self, name: str, root: Path, overrides: Sequence[str]) -> None:
        self.folder = RunFolder(root / name)
        self._log = root / f"{name}.log"
        self._arguments = ["train", "--config", "pocket.yaml", f"run_dir={root}", f"name={name}", *SMALL, *overrides]
        self.process: psutil.Popen | None = None

    def start(self) -> None:
        """Start the run, or resume it if there is one."""
        more = ["--resume"] if (self.folder.path / "config.yaml").exists() else []
        command = [sys.executable, "-m", "agentrl.cli", *self._arguments, *more]
        with self._log.open("ab") as log:
            self.process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    @property
    def steps(self) -> int:
        """The number of steps that are recorded."""
        recorded = self.folder.read_metrics()
        return recorded[-1]["step"] if recorded else 0

    def find(self, victim: str) -> psutil.Process | None:
        """Return a process of the run, or None if it is not there now."""
        if victim == "driver":
            return self.process
        return next((p for p in self.process.children(recursive=True) if MARKS[victim] in _command(p)), None)

    def ended(self, seconds: float = 0.0) -> bool:
        """Tell whether the run ends within some seconds."""
        try:
            self.process.wait(seconds)
        except psutil.TimeoutExpired:
            return False
        return True

    def finish(self) -> None:
        """Wait for the end of the run. Raises RuntimeError if it failed."""
        if self.process.wait():
            raise RuntimeError(f"the run failed with {self.process.returncode}:\n{self._log.read_text()[-2000:]}")


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def disturb(run: Run, victim: str, rng: random.Random) -> Kill | None:
    """Kill one process of a run at a random moment, and see to it that the run goes on. None if the run was over before."""
    if run.process is None or run.ended():
        run.start()
    before, starting = run.steps, rng.random() < 1 / 3
    end = time.monotonic() + START_SECONDS
    while (target := run.find(victim)) is None or not (starting or run.steps != before):
        if run.ended():
            return None
        if time.monotonic() > end:
            raise RuntimeError(f"there is no {victim} or no step of the run after {START_SECONDS:.0f} s")
        time.sleep(0.05)
    time.sleep(rng.uniform(0.0, LATEST_SECONDS))
    if run.ended():
        return None
    # Those that could still write; Ray's own agents report to a dead server for a minute.
    family = [p for p in run.process.children(recursive=True) if any(mark in _command(p) for mark in MARKS.values())]
    step = run.steps
    try:
        target.kill()
    except psutil.NoSuchProcess:
        return None
    killed = time.monotonic()
    while not (ended := run.ended(0.1)) and ((found := run.find(victim)) is None or found.pid == target.pid):
        if time.monotonic() - killed > START_SECONDS:
            raise RuntimeError(
                f"{START_SECONDS:.0f} s after the {victim} was killed the run neither ended nor has another"
            )
    if ended:
        left = psutil.wait_procs(family, GONE_SECONDS)[1]
        if left:
            raise RuntimeError(
                f"{len(left)} processes outlived the kill of the {victim}: {[_command(p) for p in left]}"
            )
    return Kill(victim, step, starting, ended, time.monotonic() - killed if ended else 0.0)


def questions(folder: RunFolder, steps: int) -> list[list[str]]:
    """Return the question of each episode by step."""
    files = (folder.path / "trajectories" / f"step-{step:05d}.jsonl.zst" for step in range(1, steps + 1))
    return [[trajectory.question.id for trajectory in read_trajectories(file)] for file in files]


def losses(whole: RunFolder, broken: RunFolder, steps: int) -> list[str]:
    """Return what a run that was disturbed lacks, or has otherwise than one that was not."""
    found = []
    recorded = [line["step"] for line in broken.read_metrics()]
    if recorded != list(range(1, steps + 1)):
        found.append(f"it recorded the steps {recorded}")
    for what in ("questions/used", "episodes", "learning_rate"):
        one, other = ([line[what] for line in folder.read_metrics()] for folder in (whole, broken))
        if one != other:
            found.append(f"{what} is {other} by step, and {one} undisturbed")
    asked, wanted = questions(broken, steps), questions(whole, steps)
    found += [f"step {step}: other questions" for step in range(1, steps + 1) if asked[step - 1] != wanted[step - 1]]
    repeated = [name for name, count in Counter(name for step in asked for name in step).items() if count != 4]
    if repeated:
        found.append(f"not asked four times: {repeated}")
    found += [problem for path in broken.complete_checkpoints() if (problem := damage(path)) is not None]
    parts = [path.name for path in broken.path.rglob(".*.part")]
    return found + [f"left over: {name}" for name in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default=os.environ.get("AGENTRL_DATA", "data"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    overrides = [f"data.root={asked.data}", f"training.steps={asked.steps}", *asked.overrides]
    rng, kills, started = random.Random(asked.seed), [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        whole, broken = (Run(name, Path(scratch), overrides) for name in ("whole", "broken"))
        whole.start()
        whole.finish()
        while len(kills) < asked.kills:
            kill = disturb(broken, VICTIMS[len(kills) % len(VICTIMS)], rng)
            if kill is None and broken.steps == asked.steps:
                break
            if kill is not None:
                kills.append(kill)
                print(f"{len(kills)}  {time.monotonic() - started:.0f} s  {kill}", flush=True)
        while broken.steps < asked.steps or not broken.folder.adapter.exists():
            if broken.ended():
                broken.start()
            broken.finish()
        found = losses(whole.folder, broken.folder, asked.steps)
    counts = Counter((kill.victim, "ended the run" if kill.ended else "brought back") for kill in kills)
    print("\n".join(f"{victim:<8} {what:<14} {count}" for (victim, what), count in sorted(counts.items())))
    print(
        "\n".join(found)
        or f"{len(kills)} kills, {asked.steps} steps: each trained once, with the same questions in order"
    )
    if asked.json:
        result = {"steps": asked.steps, "kills": [asdict(kill) for kill in kills], "lost": found}
        asked.json.write_text(json.dumps(result, indent=2) + "\n")
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
