"""The commands of agentrl. Each reads its arguments, calls one function of the package and prints what came out."""

from __future__ import annotations

import json
import os
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from agentrl.cli import data, retrieval, runs
from agentrl.cli.shared import (
    AdapterOption,
    ConfigOption,
    LimitOption,
    Overrides,
    QuestionsOption,
    RunArgument,
    console,
    errors,
    load,
    say,
)
from agentrl.extras import missing_extra
from agentrl.types import AgentRLError
from retrievers.base import RetrieverError

# Libraries ask the hub for news of models that are already on disk.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train language models to use a search engine.")
app.add_typer(data.commands, name="data")
app.add_typer(retrieval.commands, name="index")
app.add_typer(runs.commands, name="runs")


@app.command()
def init(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="The new folder; its name is the run's.")],
    corpus: Annotated[Path, typer.Option(help="Passages: JSON lines with id and contents.")],
    questions: Annotated[Path, typer.Option(help="Questions: JSON lines or Parquet with question and golden_answers.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name; by default SmolLM2-135M with the starter adapter.")
    ] = None,
) -> None:
    """Look at your corpus and questions, and write a commented config for them."""
    from agentrl.commands.init import make_start

    start = make_start(out, corpus, questions, model)
    lines = [*start.seen, f"config: {start.config}", "next:", *(f"    {command}" for command in start.commands)]
    say("\n".join(lines))


@app.command()
def train(
    config: ConfigOption,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue after the latest checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and the plan; start nothing.")
    ] = False,
) -> None:
    """Train an adapter or a whole model, evaluating before and after."""
    settings = load(config, overrides)
    settings.require("training", "retriever")
    if dry_run:
        print(settings.to_yaml())
        from agentrl.training.plan import plan

        console.print(plan(settings))
        return
    from agentrl.commands.runs import finish
    from agentrl.display import RunDisplay, evaluation_table
    from agentrl.evaluation.run import read_evaluation
    from agentrl.runs import RunFolder
    from agentrl.training.run import train as run

    earlier = RunFolder(settings.folder).read_metrics() if resume else []
    with RunDisplay(console, settings.training.steps, earlier) as display:
        folder, before, after = run(settings, resume=resume, on_progress=display.update)
    ceiling = read_evaluation(folder, "ceiling") if settings.evaluation.ceiling else None
    columns = {"before": before, "after": after, "ceiling": ceiling}
    if any(columns.values()):
        console.print(evaluation_table(f"{settings.name}: before and after", columns))
    finish(folder, console)


@app.command("eval")
def evaluate(
    config: ConfigOption,
    overrides: Overrides = None,
    adapter: AdapterOption = None,
    questions: QuestionsOption = None,
    limit: LimitOption = None,
    out: Annotated[Path | None, typer.Option(help="Write scores and episodes into this new folder.")] = None,
) -> None:
    """Evaluate over question files, as `evaluation` says: EM with its interval, F1, searches, ends."""
    from agentrl.commands.evaluate import run_evaluation
    from agentrl.display import RunDisplay, evaluation_table

    settings = load(config, overrides)
    with RunDisplay(console, 0) as display:
        evaluations = run_evaluation(settings, adapter, questions or [], limit, out, display.update)
    console.print(evaluation_table(f"evaluation with {settings.name}", evaluations))


@app.command()
def rollout(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]... | FILE...", help="Settings to change; without --config files to --show."
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="A config file, or the name of a packaged one.")
    ] = None,
    adapter: AdapterOption = None,
    questions: QuestionsOption = None,
    limit: LimitOption = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Episodes a question; by default rollout.group_size.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="By default agent.temperature.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the episodes into this new .jsonl.zst file.")] = None,
    show: Annotated[
        bool,
        typer.Option("--show", help="Print episodes as a person reads them; without --config at most --limit of FILE."),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Look at a small policy at once: three questions, shown, in this process, without Ray and vLLM.",
        ),
    ] = False,
) -> None:
    """Sample episodes without training, or with --show FILE read those of any run."""
    if config is None:
        if not show or not arguments:
            raise AgentRLError("give --config X to sample episodes, or --show FILE to read recorded ones")
        given = [adapter, questions, samples, temperature, out, quick or None]
        if any(value is not None and value != [] for value in given):
            raise AgentRLError("--show FILE only reads; give --config X to sample episodes")
        from agentrl.commands.show import show_files

        show_files([Path(file) for file in arguments], limit, console)
        return
    show = show or quick
    if out is None and not show:
        raise AgentRLError("give --out FILE.jsonl.zst to keep the episodes, --show to read them, or both")
    from agentrl.commands.rollout import run_rollout, summary
    from agentrl.commands.show import show_episodes
    from agentrl.display import RunDisplay

    settings = load(config, arguments)
    with RunDisplay(console, 0) as display:
        groups = run_rollout(
            settings,
            adapter=adapter,
            files=questions or [],
            limit=limit,
            samples=samples,
            temperature=temperature,
            out=out,
            quick=quick,
            on_progress=display.update,
        )
    if show:
        for group in groups:
            show_episodes(group, console)
    console.print(summary(settings, groups))
    if quick:
        console.print("sampled in this process, without Ray, and by transformers where the config names vLLM")
    if out is not None:
        say(f"episodes    {out}")


@app.command()
def warmstart(
    config: ConfigOption,
    overrides: Overrides = None,
    episodes: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="FILE", help="Train on right episodes of this file alone; may be repeated."),
    ] = None,
) -> None:
    """Train an adapter on demonstrations: written through the real retriever, or a policy's own episodes."""
    from agentrl.display import RunDisplay
    from agentrl.training.warmstart import warm_start

    files = [str(file.absolute()) for file in episodes or ()]
    own = ["warmstart.sources=[]", f"warmstart.episodes.files={json.dumps(files)}"] if files else []
    settings = load(config, [*own, *(overrides or [])])
    with RunDisplay(console, 0) as display:
        result = warm_start(settings, display.update)
    say(
        f"adapter of {result.demonstrations} demonstrations, loss {result.final_loss}: {settings.warmstart.out}",
    )


@app.command("config")
def settings_reference(
    key: Annotated[
        str | None, typer.Argument(help="A setting or section, such as training.kl; all without it.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/config.md.")] = False,
) -> None:
    """Explain the settings of a config: type, default and meaning of all, of a section or of one."""
    from agentrl.commands.settings import explain
    from agentrl.config.reference import find, page, sections

    if markdown:
        print(page(), end="")
    else:
        explain(sections() if key is None else [find(key)], console)


@app.command()
def pocket(
    config: ConfigOption = "pocket.yaml",
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("pocket_policy"),
    overrides: Overrides = None,
) -> None:
    """Make the pocket policy from nothing: made-up worlds, a tokenizer, demonstrations and pretraining."""
    from agentrl.display import RunDisplay
    from agentrl.pocket.making import Recipe, make_pocket_policy

    settings = load(config, overrides)
    with RunDisplay(console, 0) as display:
        card = make_pocket_policy(settings, Recipe(), out, display.update)
    say(
        f"a policy of {card['parameters']:,} parameters from {card['demonstrations']:,} demonstrations, loss "
        f"{card['loss']}: {out}",
    )


@app.command()
def export(
    run: RunArgument,
    merged: Annotated[bool, typer.Option("--merged", help="Export the model with the adapter merged into it.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; by default RUN/export/adapter, or …/model.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Upload it to the Hugging Face hub as owner/name, private where that is new."
        ),
    ] = None,
) -> None:
    """Write what a run trained as a folder for transformers, PEFT and vLLM: weights, tokenizer and model card."""
    from agentrl.commands.export import check_name, export_run, push_folder

    if push is not None:
        check_name(push)
    folder = export_run(run, out, merged=merged)
    say(f"exported    {folder}")
    if push is not None:
        say(f"pushed      {push_folder(folder, push)}")


app.command("serve-retriever")(retrieval.serve_retriever)


def main() -> None:
    """Run the command line; errors that agentrl knows become one message and exit status 1."""
    # Without this a terminated run would leave Ray, Java and vLLM behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # A config may name the user's own modules, which are looked for where the command is run: last, because a file there must
    # not stand in for a library. agentrl.rollout.imports does the same in Ray's processes.
    sys.path.append(os.getcwd())
    # Ray's processes inherit these and have working directories of their own.
    for name in ("AGENTRL_CACHE", "RETRIEVERS_CACHE", "HF_HOME"):
        if os.environ.get(name):
            os.environ[name] = os.path.abspath(os.path.expanduser(os.environ[name]))
    # What a terminal cannot write is no reason to stop.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except (AgentRLError, RetrieverError, OSError) as error:
        # A note says where more is to be found, such as the traceback.
        _fail("; ".join([str(error), *getattr(error, "__notes__", [])]))
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        _fail(message)


def _fail(message: str) -> NoReturn:
    errors.print("[bold red]error:[/] ", end="")
    say(message, errors)
    sys.exit(1)
