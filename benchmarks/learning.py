"""Whether training teaches: exact match before and after with each of some seeds, and how fast reward rises.

    python benchmarks/learning.py pocket [--seeds 5] [--out DIR] [--set KEY=VALUE]...
    python benchmarks/learning.py sweep --vary training.learning_rate=5e-4,1e-3 [--vary KEY=A,B]... [--config pocket.yaml]
    python benchmarks/learning.py sweep --variant grpo advantages.estimator=grpo advantages.options={} [--variant NAME ...]...
    python benchmarks/learning.py sweep STUDY.yaml
    python benchmarks/learning.py report RESULTS.json [--against VARIANT]

`pocket` trains configs/pocket.yaml with each seed. `sweep` compares variants of a config: all combinations of what varies,
named variants, or those of a file (`config` or `mixes`, `seeds`, `set`, `first`, and `vary` or `variants`), which may do so on
several mixes of questions. Both train one run after another with `agentrl train`, each in a folder of its own under --out, and
may be stopped and called again: finished runs are read, a started one goes on, and a run of other settings, questions or
weights is refused. With `--known RESULTS.json` the runs in that file are done too, wherever their folders are, if settings and
weights are the same; whether the questions are, it does not know. Data is looked up under $AGENTRL_DATA. `report` shows tables
and pictures of results and runs nothing.

Exact match is over `data.eval`, greedy, with Wilson's 95 % interval; "apart" says that the intervals before and after do not
meet. Means are over seeds with Student's 95 % interval: they hold for other seeds of training, not for other questions. Variants
are compared with the first one (or --against) over pairs of seed and question: `learning_pairs.py` says how.
Times are of this machine with whatever else it did.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learning_cells import Cell, Study, config_hash, make_cells, model_hash, read_study, run_cell, vary, was_finished
from learning_curves import draw
from learning_tables import (
    THRESHOLD,
    WINDOW,
    Record,
    by_variant,
    cost_table,
    dynamics_table,
    paired_table,
    read_record,
    run_table,
    speed_table,
    strata_table,
    summarize,
    variant_table,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agentrl.config import ConfigError
from agentrl.runs import RunError
from agentrl.runs.files import replace_text
from agentrl.types import AgentRLError
from retrievers.base import RetrieverError

RESULTS = Path(__file__).parent / "results"
ITSELF = "as configured"
_ORIGIN = ("date", "cpu", "versions")
# Where output is no terminal, a line so often.
STEPS_A_LINE = 10

console = Console(highlight=False)
# Tables are read whole in a file too.
if not console.is_terminal:
    console.width = 140


def run_study(study: Study, out: Path, results: Path, known: Path | None = None) -> bool:
    """Run the cells of a study that are not finished, write the report after each, and tell whether all are finished.

    What was finished before is read first, so that the report has it whatever ends the study. Runs that are in the results
    file `known`, with the same settings and weights, are taken from there, wherever their folders are.

    Raises:
        AgentRLError, RetrieverError: if a config or its data is unsound, or `known` is no file of results; nothing is
            started then.
        OSError: if `known` cannot be read.
    """
    cells = make_cells(study, out)
    titles = [
        f"[{place}/{len(cells)}] {', '.join(filter(None, (cell.mix, cell.variant, f'seed {cell.seed}')))}"
        for place, cell in enumerate(cells, 1)
    ]
    records = {} if known is None else _known(known, cells)
    for number in records:
        console.print(f"{titles[number]}: taken from {known}", markup=False)
    if records:
        _write(study, cells, list(records.values()), results)
    failures: dict[int, str] = {}
    for do in (_find, _run):
        for number, (cell, title) in enumerate(zip(cells, titles, strict=True)):
            if number in records or number in failures:
                continue
            try:
                record = do(cell, title)
            except RunError as error:
                # What others found is worth having.
                failures[number] = f"{title}: {error}"
                console.print(failures[number], style="red", markup=False)
                continue
            if record is not None:
                records[number] = record
                _write(study, cells, [records[number] for number in sorted(records)], results)
    if records:
        _show([records[number] for number in sorted(records)], results)
    for number in sorted(failures):
        console.print(f"not finished: {failures[number]}", style="red", markup=False)
    return not failures


def _known(path: Path, cells: Sequence[Cell]) -> dict[int, Record]:
    """Return the records of a results file by the number of the cell, of those cells that are what was run."""
    report, runs = _read(path)
    found = {(run.get("mix", ""), run["variant"], run["seed"]): run for run in runs}
    records = {}
    for number, cell in enumerate(cells):
        described = report.get("mixes", {}).get(cell.mix, report)
        before = described.get("variants", {}).get(cell.variant, {})
        same = before.get("config_sha256") == config_hash(cell.config)
        if same and before["model_sha256"] == model_hash(cell.config):
            run = found.get((cell.mix, cell.variant, cell.seed))
            records |= {} if run is None else {number: run}
    return records


def _read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return a file of results and its runs, each with all that is known of it."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        common = {key: report[key] for key in _ORIGIN if key in report}
        return report, [{**common, **run} for run in report["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: no results of a study ({error!r}); give a file that `sweep` or `pocket` wrote"
        ) from error


def _find(cell: Cell, title: str) -> Record | None:
    """Return the record of a cell that was finished before, None of another."""
    return _record(cell, title, fresh=False) if was_finished(cell) else None


def _run(cell: Cell, title: str) -> Record:
    """Run one cell, show how far it is, and return its record."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = cell.config.training.steps
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(f"{title}: starting", total=total)
        if not console.is_terminal:
            console.print(f"{title}: {cell.config.folder}", markup=False)

        def on_step(metrics: Mapping[str, Any]) -> None:
            reward = metrics["reward/mean"]
            said = f"{title}: reward {'-' if reward is None else f'{reward:.3f}'}"
            bars.update(task, description=said, completed=metrics["step"])
            if not console.is_terminal and metrics["step"] % STEPS_A_LINE == 0:
                console.print(f"{said} at step {metrics['step']} of {total}", markup=False)

        fresh = run_cell(cell, on_step)
    return _record(cell, title, fresh)


def _record(cell: Cell, title: str, fresh: bool) -> Record:
    record = read_record(cell)
    scores = [f"{record[when]['em']:.3f}" if record[when] else "-" for when in ("before", "after")]
    said = f"{title}: EM {' to '.join(scores)} in {record['minutes']:.1f} min{'' if fresh else ', finished before'}"
    console.print(said, markup=False)
    return record


def _write(study: Study, cells: Sequence[Cell], records: Sequence[Record], path: Path) -> None:
    """Write what is known so far. What runs have in common of `date`, `cpu` and `versions` stands once, the rest with each."""
    first, *others = records
    common = {key: first[key] for key in _ORIGIN if all(other[key] == first[key] for other in others)}
    by_mix = {mix: _describe(study, mix, cells, _of_mix(records, mix)) for mix in study.mixes}
    report = {
        "study": study.name,
        # Where the data lies says nothing about a result.
        "overrides": [override for override in study.overrides if not override.startswith("data.root=")],
        "seeds": list(study.seeds),
        "runs_finished": f"{len(records)} of {len(cells)}",
        **common,
        "window": WINDOW,
        "threshold": THRESHOLD,
        **by_mix.get("", {"mixes": by_mix}),
        "runs": [{key: value for key, value in record.items() if key not in common} for record in records],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(report, indent=1) + "\n")


def _describe(study: Study, mix: str, cells: Sequence[Cell], records: Sequence[Record]) -> dict[str, Any]:
    """Return the config of a mix, what its variants are, and means over their seeds."""
    configs = {cell.variant: cell.config for cell in cells if cell.mix == mix}
    return {
        "config": study.mixes[mix],
        "variants": {
            name: {
                "overrides": list(study.variants[name]),
                "config_sha256": config_hash(config),
                "model_sha256": model_hash(config),
            }
            for name, config in configs.items()
        },
        "summary": {variant: summarize(own) for variant, own in by_variant(records).items()},
    }


def _of_mix(records: Sequence[Record], mix: str) -> list[Record]:
    return [record for record in records if record.get("mix", "") == mix]


def show_results(results: Path, against: str | None) -> None:
    """Show the tables and draw the pictures of the runs in a file that a study wrote.

    Raises:
        ConfigError: if the file holds no runs, or none of the variant `against`.
        OSError: if it cannot be read.
    """
    report, records = _read(results)
    origin = {key: report[key] for key in _ORIGIN if key in report}
    variants = list(by_variant(records))
    if not variants or against not in (None, *variants):
        raise ConfigError(
            f"{results}: no run of {against or 'any variant'} (there are: {', '.join(variants) or 'none'})"
        )
    console.print(
        ", ".join([f"{report['study']}: {report['runs_finished']} runs", *map(str, origin.values())]), markup=False
    )
    _show(records, results, against)


def _show(records: Sequence[Record], results: Path, against: str | None = None) -> None:
    for mix in dict.fromkeys(record.get("mix", "") for record in records):
        own = _of_mix(records, mix)
        if mix:
            console.rule(mix)
        console.print(run_table(own), cost_table(own))
        if len(own) > 1:
            console.print(variant_table(own), speed_table(own), dynamics_table(own), strata_table(own))
        if len(by_variant(own)) > 1:
            console.print(paired_table(own, against or own[0]["variant"]))
        picture = results.with_name(f"{results.stem}_{mix}.png") if mix else results.with_suffix(".png")
        try:
            draw(own, picture)
            console.print(f"drawn: {picture}", markup=False, soft_wrap=True)
        except ModuleNotFoundError as error:
            console.print(f"no picture: {error}", markup=False)
    console.print(f"results: {results}", markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Report:
    """What to show again: the results of a study, and the variant with which the others are compared, by default the first."""

    results: Path
    against: str | None


def read_arguments(arguments: Sequence[str] | None = None) -> tuple[Study, Path, Path, Path | None] | Report:
    """Return the study that the command line asks for, the folder of its runs, the file of its results, and the one that is
    known; or what to report.

    Raises:
        ConfigError: if what varies is not said, or said in several ways.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--seeds", type=int, help="how many, from 0 on")
    shared.add_argument("--out", type=Path, help="the folder of the runs (default: runs/learning-NAME)")
    shared.add_argument(
        "--json", type=Path, help="where the results go (default: benchmarks/results/learning_NAME.json)"
    )
    shared.add_argument("--known", type=Path, metavar="JSON", help="results whose runs, of the same settings, are done")
    shared.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all runs")
    shared.add_argument("--config", default=None, help="a path or a packaged config (default: pocket.yaml)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pocket", parents=[shared], help="the pocket policy with each seed")
    sweep = commands.add_parser("sweep", parents=[shared], help="variants of a config")
    sweep.add_argument("study", nargs="?", type=Path, metavar="STUDY.yaml")
    sweep.add_argument("--name", help="of the study (default: sweep, or the file's name)")
    sweep.add_argument("--vary", action="append", default=[], metavar="KEY=A,B")
    sweep.add_argument("--variant", action="append", nargs="+", default=[], metavar="NAME KEY=VALUE")
    report = commands.add_parser("report", help="tables and pictures of results, without running anything")
    report.add_argument("results", type=Path, metavar="RESULTS.json")
    report.add_argument("--against", metavar="VARIANT", help="what the others are compared with (default: the first)")
    options = parser.parse_args(arguments)
    if options.command == "report":
        return Report(options.results, options.against)
    study = _pocket(options) if options.command == "pocket" else _sweep(options)
    out = options.out or Path("runs") / f"learning-{study.name}"
    return study, out, options.json or RESULTS / f"learning_{study.name}.json", options.known


def _pocket(options: argparse.Namespace) -> Study:
    return Study(
        "pocket", {"": options.config or "pocket.yaml"}, range(_seeds(options.seeds, 5)), options.set, {"pocket": []}
    )


def _sweep(options: argparse.Namespace) -> Study:
    if sum(map(bool, (options.study, options.vary, options.variant))) != 1:
        raise ConfigError("say what varies in one way: STUDY.yaml, --vary KEY=A,B, or --variant NAME KEY=VALUE...")
    read: dict[str, Any] = {} if options.study is None else read_study(options.study)
    if options.vary:
        read["variants"] = vary(_axes(options.vary))
    elif options.variant:
        read["variants"] = _named(options.variant)
    seeds = read.get("seeds") if options.seeds is None else options.seeds
    return Study(
        name=options.name or (options.study.stem if options.study else "sweep"),
        mixes={"": options.config} if options.config else read.get("mixes", {"": "pocket.yaml"}),
        seeds=range(_seeds(seeds, 3)),
        overrides=[*read.get("overrides", []), *options.set],
        variants=read.get("variants", {ITSELF: []}),
        first=read.get("first", []),
    )


def _seeds(given: int | None, default: int) -> int:
    if given is not None and given < 1:
        raise ConfigError(f"--seeds {given}: give at least 1")
    return default if given is None else given


def _axes(given: Sequence[str]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for axis in given:
        key, separator, values = axis.partition("=")
        if not separator or not key or key in axes:
            raise ConfigError(f"--vary {axis!r}: write each key once, as KEY=A,B; lists of lists go into a STUDY.yaml")
        axes[key] = values.split(",")
    return axes


def _named(given: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    variants: dict[str, list[str]] = {}
    for name, *own in given:
        if "=" in name or name in variants:
            raise ConfigError(f"--variant {name!r}: begin with a name of its own, then KEY=VALUE of that variant")
        variants[name] = own
    return variants


def main() -> None:
    # A study that is terminated, or whose terminal is closed, ends its run in good order.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup, a study stays.
        if signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, lambda number, frame: sys.exit(128 + number))
    try:
        asked = read_arguments()
        if isinstance(asked, Report):
            show_results(asked.results, asked.against)
            return
        finished = run_study(*asked)
    except (AgentRLError, RetrieverError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(0 if finished else 1)


if __name__ == "__main__":
    main()
