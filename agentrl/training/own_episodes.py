"""Demonstrations out of a policy's own episodes, chosen by what they earned and how they searched: rejection sampling.

What is trained on are samples that were right, as in STaR (arXiv 2203.14465) and RFT (arXiv 2308.01825).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from agentrl.agent.codec import Codec
from agentrl.config import EpisodesConfig
from agentrl.data.errors import DataError
from agentrl.runs import read_trajectories
from agentrl.types import INVALID, End, Trajectory

# So many of the chosen episodes show whose tokens they are made of.
_COMPARED = 8


def choose_episodes(settings: EpisodesConfig, seed: int, codec: Codec) -> list[Trajectory]:
    """Read episodes and return those to train on: different ones of each question, drawn by `seed`.

    Raises:
        DataError: if none is left, with what was wrong with them, or their ids are not those of the codec's tokenizer.
        RunError: if a file holds no episodes.
    """
    files = list(map(Path, settings.files))
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file; give one that `agentrl rollout --out` or a run wrote")
    fit: dict[tuple[str, str], dict[tuple[int, ...], Trajectory]] = {}
    refused: Counter[str] = Counter()
    for episode in chain.from_iterable(map(read_trajectories, files)):
        reason = _refusal(episode, settings)
        if reason is not None:
            refused[reason] += 1
            continue
        of_question = fit.setdefault((episode.question.dataset, episode.question.id), {})
        if of_question.setdefault(tuple(episode.completion_ids), episode) is not episode:
            refused["repeat another"] += 1
    chosen = list(_drawn(fit.values(), settings.per_question, seed))
    if not chosen:
        why = ", ".join(f"{count} {reason}" for reason, count in refused.most_common()) or "they hold no episode"
        raise DataError(
            f"{', '.join(map(str, files))}: no episode to train on ({why}); sample more, or choose less strictly"
        )
    _check_ids(chosen, codec, files)
    return chosen


def _refusal(episode: Trajectory, settings: EpisodesConfig) -> str | None:
    """Return what keeps an episode out, as words that follow a count, or None."""
    if not episode.valid or episode.reward is None:
        return "failed"
    if episode.end is not End.ANSWERED or any(turn.action.kind == INVALID for turn in episode.turns):
        return "have no answer, or a turn that is no action"
    if episode.reward < settings.min_reward:
        return f"earned less than {settings.min_reward:g}"
    most = settings.max_searches
    if len(episode.searches) < settings.min_searches or (most is not None and len(episode.searches) > most):
        return f"searched fewer than {settings.min_searches} times" + (
            f" or more than {most}" if most is not None else ""
        )
    return None


def _drawn(questions: Iterable[dict[tuple[int, ...], Trajectory]], most: int | None, seed: int) -> Iterable[Trajectory]:
    rng = random.Random(seed)
    for episodes in questions:
        members = list(episodes.values())
        yield from members if most is None or len(members) <= most else rng.sample(members, most)


def _check_ids(episodes: list[Trajectory], codec: Codec, files: list[Path]) -> None:
    for episode in episodes[:_COMPARED]:
        for turn in episode.turns:
            if codec.decode(turn.token_ids) != turn.text:
                raise DataError(
                    f"{files[0]}: the ids of episode {episode.id} are not those of this model's tokenizer; give episodes that "
                    "the model of this config sampled"
                )
