"""Makes the pocket policy from nothing: worlds, tokenizer, demonstrations, pretraining, and a card of it all."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from agentrl.agent.codec import Codec
from agentrl.config import AgentConfig, Config, ConfigError
from agentrl.demo.sources import load_world
from agentrl.pocket import demonstrations as demos
from agentrl.pocket.demonstrations import Demonstration, demonstrate, make_up
from agentrl.pocket.pretraining import Pretraining, pretrain, score
from agentrl.pocket.tokenizer import make_tokenizer
from agentrl.pocket.worlds import Names, names_of
from agentrl.progress import OnProgress, Progress

_FIRST_WORLD = 1
# Their words are pieces of the tokenizer; more worlds have hardly any others.
_WORLDS_READ = 3
_WORDINGS_REPEATED = 100
# Worlds that pretraining does not see.
_HELD_OUT = 1
_SCORED = 400


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a pocket policy is made of. `worlds` are made up for training, each from a seed of its own."""

    worlds: int = 24
    pretraining: Pretraining = field(default_factory=Pretraining)


def make_pocket_policy(config: Config, recipe: Recipe, out: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Make a policy for the agent and retriever of `config`, write it to the folder `out`, and return its card.

    Demonstrations are played by `recipe.pretraining.processes` processes, each with a Lucene of its own.

    An earlier policy in `out` is replaced once the new one is whole; other files there stay.

    Raises:
        ConfigError: if `out` holds something else than an earlier policy.
        OSError: if `out` cannot be written, which is tried first.
        RetrieverError, EnvironmentFailure: if demonstrations cannot be played.
    """
    config.require("retriever")
    if out.exists() and not _may_replace(out):
        raise ConfigError(f"{out}: already there and no pocket policy; give another folder with --out")
    started = time.monotonic()
    names = names_of(load_world())
    out.mkdir(parents=True, exist_ok=True)
    # Inside, so that it is on the same disk.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as scratch:
        folder = Path(scratch)
        _tokenizer(names, config.retriever.k).save_pretrained(folder)
        # Processes read it as runs will.
        tokenizer = AutoTokenizer.from_pretrained(folder)
        seeds = range(_FIRST_WORLD, _FIRST_WORLD + recipe.worlds + _HELD_OUT)
        by_world = _demonstrations(names, seeds, config, folder, recipe.pretraining.processes, on_progress)
        held_out = by_world[-_HELD_OUT:]
        training = [demonstration for world in by_world[:-_HELD_OUT] for demonstration in world]
        played = time.monotonic()
        model, losses = pretrain(recipe.pretraining, training, tokenizer, on_progress)
        trained = time.monotonic()
        card = {
            "recipe": asdict(recipe),
            "mix": {"questions": demos.QUESTIONS, "structures": demos.STRUCTURES, "countries": demos.COUNTRIES},
            "agent": config.agent.model_dump(mode="json"),
            "k": config.retriever.k,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "vocabulary": len(tokenizer),
            "demonstrations": len(training),
            "structures": _counts(training),
            "tokens": sum(len(demonstration.token_ids) for demonstration in training),
            "own_tokens": sum(sum(demonstration.own) for demonstration in training),
            "loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
            "held_out": score(model, [row for world in held_out for row in world][:_SCORED], tokenizer),
            "minutes": {
                "demonstrations": round((played - started) / 60, 1),
                "pretraining": round((trained - played) / 60, 1),
            },
        }
        model.to(torch.bfloat16).save_pretrained(folder)
        card["sha256"] = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir())
            if path.is_file()
        }
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o644)
            path.replace(out / path.name)
    return card


def _may_replace(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        return not any(folder.iterdir()) or "held_out" in json.loads((folder / "card.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return False


def _tokenizer(names: Names, k: int) -> PreTrainedTokenizerBase:
    texts = [f" {wording}" for wording in demos.WORDINGS * _WORDINGS_REPEATED]
    for seed in range(_FIRST_WORLD, _FIRST_WORLD + _WORLDS_READ):
        made_up = make_up(names, seed)
        texts += [f" {passage.title} {passage.text}" for passage in made_up.library.passages]
        texts += [f"Question: {question.text}" for question in made_up.questions]
    return make_tokenizer(names.all, texts, k)


def _demonstrations(
    names: Names, seeds: Sequence[int], config: Config, tokenizer: Path, processes: int, on_progress: OnProgress
) -> list[list[Demonstration]]:
    """Return the demonstrations of each world."""
    phase = "playing demonstrations in made-up worlds"
    on_progress(Progress(0, phase, 0, len(seeds)))
    # Java does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        playing = {
            pool.submit(_play_world, names, seed, config.agent, tokenizer, config.retriever.k): seed for seed in seeds
        }
        for done, _ in enumerate(as_completed(playing), 1):
            on_progress(Progress(0, phase, done, len(seeds)))
        return [played.result() for played in playing]


def _play_world(names: Names, seed: int, agent: AgentConfig, tokenizer: Path, k: int) -> list[Demonstration]:
    codec = Codec(AutoTokenizer.from_pretrained(tokenizer))
    return demonstrate(make_up(names, seed), seed, config=agent, codec=codec, k=k)


def _counts(demonstrations: Sequence[Demonstration]) -> dict[str, int]:
    counted = Counter(f"{demonstration.hops} hops, {demonstration.structure}" for demonstration in demonstrations)
    return dict(sorted(counted.items()))
