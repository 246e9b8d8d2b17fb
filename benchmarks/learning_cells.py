"""The cells of a study of learning: a config, overrides and a seed, trained in a run folder of their own, once.

A cell's run stands in OUT/VARIANT/seed-N, in a study of several mixes of questions in OUT/MIX/VARIANT/seed-N. Beside it,
`seed-N.log` holds what `agentrl train` prints, and `seed-N.times.jsonl` when it was started and on what machine, when its steps
were done, and when it ended, so that a run in several parts has its hours of work too.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import yaml

from agentrl.config import Config, ConfigError, load_config
from agentrl.config.yaml12 import parse_yaml
from agentrl.data.inputs import describe_inputs, file_sha256
from agentrl.runs import RunFolder
from agentrl.runs.files import RunError, append, replace_text
from agentrl.runs.resume import changed_settings, check_inputs

# Where a run stands says nothing about it.
_PLACES = ("name", "run_dir", "data.root")
# What the study sets in each run, and what sets it in the study.
_OF_THE_STUDY = {
    "seed": "say how many seeds with --seeds, or `seeds` in the study's file",
    "name": "runs are named by their seeds; choose their folder with --out",
    "run_dir": "choose the folder of the runs with --out",
}
_POLL_SECONDS = 0.5
# What trains a cell, before `--config` and the overrides.
TRAIN = [sys.executable, "-m", "agentrl.cli", "train"]
# Runs find the estimators of `learning_rules` beside this file.
_PYTHONPATH = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).parent))))
_NOT_IN_A_NAME = str.maketrans(dict.fromkeys('/\\:*?"<>| ', "_"))


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared: `variants`, each by its overrides, on each mix of questions with the same `seeds`.

    Attributes:
        mixes: a path or the name of a packaged config by the name of the mix, which is "" where there is only one.
        overrides: `key=value`, of all variants.
        variants: overrides by the variant's name; one without any is the config itself.
        first: the variants that are trained with all seeds before the others are.
    """

    name: str
    mixes: Mapping[str, str]
    seeds: Sequence[int]
    overrides: Sequence[str]
    variants: Mapping[str, Sequence[str]]
    first: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: `config` is what `source` is with `overrides`."""

    mix: str
    variant: str
    seed: int
    source: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.folder)

    @property
    def log(self) -> Path:
        return self._beside(".log")

    @property
    def times(self) -> Path:
        return self._beside(".times.jsonl")

    def _beside(self, suffix: str) -> Path:
        return self.config.folder.with_name(self.config.name + suffix)


def make_cells(study: Study, out: Path) -> list[Cell]:
    """Return the cells of a study: first its `first` variants, and each part seed by seed, so that one that is cut off has
    compared something.

    Raises:
        ConfigError: if a variant's config is unsound, two runs would share a folder, an override is of what the study sets in
            each run, or there is no variant of a name in `first`.
    """
    for override in chain(study.overrides, *study.variants.values()):
        if hint := _OF_THE_STUDY.get(key := override.partition("=")[0]):
            raise ConfigError(f"study {study.name}: override {override!r}: the study sets {key} in each run; {hint}")
    for what, names in (("variants", study.variants), ("mixes", study.mixes)):
        if len({name.translate(_NOT_IN_A_NAME) for name in names}) < len(names):
            raise ConfigError(f"study {study.name}: two {what} would share a folder: {', '.join(names)}; rename one")
    if len(set(study.first)) < len(study.first):
        raise ConfigError(f"study {study.name}: first: names a variant twice: {', '.join(study.first)}")
    for name in study.first:
        if name not in study.variants:
            raise ConfigError(
                f"study {study.name}: first: no variant {name!r} (there are: {', '.join(study.variants)})"
            )
    parts = study.first, [name for name in study.variants if name not in study.first]
    return [
        _make_cell(study, out, mix, variant, seed)
        for part in parts
        for seed, mix, variant in product(study.seeds, study.mixes, part)
    ]


def _make_cell(study: Study, out: Path, mix: str, variant: str, seed: int) -> Cell:
    folder = out.joinpath(*(name.translate(_NOT_IN_A_NAME) for name in (mix, variant) if name)).absolute()
    source = study.mixes[mix]
    overrides = (
        *study.overrides,
        *study.variants[variant],
        f"seed={seed}",
        f"run_dir={folder}",
        f"name=seed-{seed}",
    )
    config = load_config(source, overrides)
    config.require("training", "retriever")
    return Cell(mix, variant, seed, source, overrides, config)


def vary(axes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return a variant for each combination of the values of `axes`, named by what differs, such as "learning_rate=1e-3".

    A key is named by its last part, or in full where two keys end alike.
    """
    last = [key.rpartition(".")[2] for key in axes]
    names = [short if last.count(short) == 1 else key for key, short in zip(axes, last, strict=True)]
    variants = {}
    for values in product(*axes.values()):
        name = ",".join(f"{short}={value}" for short, value in zip(names, values, strict=True))
        variants[name] = [f"{key}={value}" for key, value in zip(axes, values, strict=True)]
    return variants


def read_study(path: Path) -> dict[str, Any]:
    """Read a study from a YAML file: `config` or `mixes`, `seeds`, `set` (key: value), `first`, and `vary` (key: [values]) or
    `variants`.

    `mixes` has a config by the mix's name, `variants` key: value by the variant's name, and `first` is a list of such names.
    Returns `mixes`, `seeds`, `overrides`, `variants` and `first`, those that the file has.

    Raises:
        ConfigError: if the file is not YAML in UTF-8, or has another key, or a section that is empty or of another kind.
        OSError: if it cannot be read.
    """
    try:
        tree = parse_yaml(path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save the file as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    known = {
        "config": str,
        "mixes": dict,
        "seeds": int,
        "set": dict,
        "vary": dict,
        "variants": dict,
        "first": list,
    }
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of {', '.join(known)}")
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r} (there are: {', '.join(known)})")
        # To Python, true is a whole number.
        if not isinstance(value, known[key]) or isinstance(value, bool):
            kind = {str: "text", int: "a whole number", dict: "a mapping", list: "a list"}[known[key]]
            raise ConfigError(f"{path}: {key} must be {kind}, got {value!r}")
        if key in ("mixes", "vary", "variants") and not value:
            raise ConfigError(f"{path}: {key} is empty; name what to compare, or leave {key} out")
    if tree.get("seeds", 1) < 1:
        raise ConfigError(f"{path}: seeds must be at least 1, got {tree['seeds']}")
    for one, other in (("vary", "variants"), ("config", "mixes")):
        if {one, other} <= tree.keys():
            raise ConfigError(f"{path}: give `{one}` or `{other}`, not both")
    for name, config in tree.get("mixes", {}).items():
        if not isinstance(name, str) or not name or not isinstance(config, str):
            raise ConfigError(f"{path}: mixes must hold a config by the name of each mix, got {name!r}: {config!r}")
    for key, values in tree.get("vary", {}).items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: vary.{key} must be a list of values, got {values!r}")
    for name, settings in tree.get("variants", {}).items():
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: variants.{name} must hold settings, each as `key: value`, got {settings!r}")
    study = {key: tree[key] for key in ("mixes", "seeds") if key in tree}
    if "config" in tree:
        study["mixes"] = {"": tree["config"]}
    if "first" in tree:
        study["first"] = [str(name) for name in tree["first"]]
    study["overrides"] = _overrides(tree.get("set", {}))
    if "vary" in tree:
        axes = {key: [_value(value) for value in values] for key, values in tree["vary"].items()}
        study["variants"] = vary(axes)
    elif "variants" in tree:
        study["variants"] = {str(name): _overrides(settings) for name, settings in tree["variants"].items()}
    return study


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_value(value)}" for key, value in settings.items()]


def _value(value: Any) -> str:
    # JSON is YAML too; text stands as it is, which an override takes it for.
    return value if isinstance(value, str) else json.dumps(value)


def run_cell(cell: Cell, on_step: Callable[[Mapping[str, Any]], None]) -> bool:
    """Train a cell unless it is finished, going on where it was cut off, and tell whether there was anything to do.

    `on_step` receives the metrics of each step as it is recorded. What ends this process, Ctrl-C and an exception of `on_step`
    among it, ends the run as SIGTERM does: it saves its state first, unless a second Ctrl-C or SIGTERM cuts that short.

    Raises:
        RunError: if the run in its folder is of other settings, questions or weights, or fails; the message says where
            what it printed stands.
        OSError: if its folder cannot be written.
    """
    begun = _check_same(cell)
    if begun and is_finished(cell):
        return False
    command = [*TRAIN, "--config", cell.source, *cell.overrides, *(["--resume"] if begun else [])]
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    # Without a last line that was cut off, to which the next would be glued, and without those of a run that was removed.
    replace_text(cell.times, "".join(json.dumps(line) + "\n" for line in (_noted(cell) if begun else [])))
    _note(cell, "start", model=model_hash(cell.config), cpu=describe_cpu())
    with cell.log.open("ab") as log:
        # In a session of its own, because Ctrl-C goes to all of a terminal's, and a second signal ends a run at once.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"PYTHONPATH": _PYTHONPATH}
        )
        try:
            for metrics in _follow(cell.folder, process):
                _note(cell, "step", step=metrics["step"])
                on_step(metrics)
        finally:
            status = _end(process)
            _note(cell, "end", status=status)
    if status or not is_finished(cell):
        last = cell.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        raise RunError(f"{cell.config.folder} is not finished (status {status}): {last}; all of it: {cell.log}")
    return True


def was_finished(cell: Cell) -> bool:
    """Tell whether there is nothing to do for `run_cell`. Raises RunError if another run stands in the cell's folder."""
    return _check_same(cell) and is_finished(cell)


def is_finished(cell: Cell) -> bool:
    """Tell whether a run has its last step, its adapter and the evaluations that its config asks for."""
    config, folder = cell.config, cell.folder
    metrics, wanted = folder.read_metrics(), config.evaluation
    evaluations = [(wanted.before, 0), (wanted.after, config.training.steps)]
    return (
        bool(metrics)
        and metrics[-1]["step"] == config.training.steps
        and folder.adapter.is_dir()
        and all(folder.read_evaluation(step) is not None for asked, step in evaluations if asked and config.data.eval)
    )


def config_hash(config: Config) -> str:
    """Return the SHA-256 of the settings of a run, without its seed and places, and with paths as seen from here."""
    places = {"name": True, "run_dir": True, "seed": True, "data": {"root": True}}
    tree = config.model_dump(mode="json", exclude=places)
    text = json.dumps(tree, sort_keys=True).replace(f"{os.getcwd()}/", "")
    return hashlib.sha256(text.encode()).hexdigest()


def model_hash(config: Config) -> str | None:
    """Return the SHA-256 of the weights of a model that is a folder here, and None for those that have a version."""
    folder = Path(config.model.path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_absolute() else []
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else None


def describe_cpu() -> dict[str, Any]:
    """Return the processor's name, the cores that this process may use, and the machine's memory in GiB."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"name": (names or [platform.machine()])[0], "cores": len(os.sched_getaffinity(0)), "gib": round(memory, 1)}


def read_origin(cell: Cell) -> dict[str, Any]:
    """Return where a run comes from: the `date` of its latest start, the `versions` then, and each `cpu` that it ran on.

    A start that took no note of its cpu counts as this machine's. `date` and `versions` are None where nothing tells them.
    """
    starts = [line for line in _noted(cell) if line["event"] == "start"]
    found = [start.get("cpu") or describe_cpu() for start in starts]
    file = cell.folder.path / "versions.json"
    return {
        "date": time.strftime("%F", time.localtime(starts[-1]["time"])) if starts else None,
        "cpu": [cpu for number, cpu in enumerate(found) if cpu not in found[:number]],
        "versions": json.loads(file.read_text(encoding="utf-8")) if file.exists() else None,
    }


def read_times(cell: Cell) -> tuple[dict[int, float], float]:
    """Return the seconds of work until each step was done, and until the end.

    Of a part that was killed, what came after its last step is not known and not counted.
    """
    steps: dict[int, float] = {}
    before = spent = started = 0.0
    for line in _noted(cell):
        if line["event"] == "start":
            before, started = spent, line["time"]
        spent = before + line["time"] - started
        if line["event"] == "step":
            # A step that was taken again counts as it was taken last.
            steps[line["step"]] = spent
    return steps, spent


def _check_same(cell: Cell) -> bool:
    """Tell whether a cell's run has begun. Raises RunError if it is another run than the cell's."""
    folder = cell.folder
    if not (folder.path / "config.yaml").exists():
        return False
    changes = changed_settings(folder.read_config(), cell.config, str(folder.path))
    changes = [change for change in changes if not change.startswith(tuple(f"{place}:" for place in _PLACES))]
    if changes:
        raise RunError(f"{folder.path} holds a run of other settings: {'; '.join(changes)}; give another --out")
    # `agentrl train` takes note of the adapter's weights and checks them itself.
    inputs = {key: value for key, value in folder.read_inputs().items() if key != "model.adapter"}
    check_inputs(inputs, describe_inputs(cell.config))
    model = model_hash(cell.config)
    if any(line["model"] != model for line in _noted(cell) if line["event"] == "start"):
        raise RunError(f"{folder.path} began with other weights than {cell.config.model.path} has; give another --out")
    return True


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a run as SIGTERM does, and return its status once it has saved its state."""
    process.terminate()
    try:
        return process.wait()
    except (KeyboardInterrupt, SystemExit):
        # Whoever asks twice does not want to wait for the state, and the run is not to outlive its study.
        process.terminate()
        process.wait()
        raise


def _follow(folder: RunFolder, process: subprocess.Popen[bytes]) -> Iterator[Mapping[str, Any]]:
    """Yield the metrics of each new step until the process has ended."""
    seen = len(folder.read_metrics())
    while True:
        ended = process.poll() is not None
        metrics = folder.read_metrics()
        # A resumed run drops the steps after its checkpoint, and takes them again.
        seen = min(seen, len(metrics))
        yield from metrics[seen:]
        seen = len(metrics)
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def _note(cell: Cell, event: str, **more: Any) -> None:
    append(cell.times, (json.dumps({"event": event, "time": time.time(), **more}) + "\n").encode())


def _noted(cell: Cell) -> list[dict[str, Any]]:
    """Return the lines of the times file, without a last one that was cut off. Raises RunError if another is no JSON."""
    lines = cell.times.read_text(encoding="utf-8").splitlines() if cell.times.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RunError(f"{cell.times}: line {number} is not JSON ({error}); remove it") from error
    return found
