"""`agentrl eval`: from a config and an adapter to scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from agentrl.commands.policy import prepare, started
from agentrl.config import Config, ConfigError
from agentrl.evaluation.run import Evaluation, evaluate
from agentrl.progress import Progress
from agentrl.runs import write_trajectories
from agentrl.types import Trajectory


def run_evaluation(
    config: Config,
    adapter: str | None,
    files: Sequence[str],
    limit: int | None,
    out: Path | None,
    on_progress: Callable[[Progress], None],
) -> dict[str, Evaluation]:
    """Evaluate `adapter` (default: the config's), as `evaluation` says, over the first `limit` questions of each file.

    The files are `files`, or the sets of `data.eval`. Return the evaluation, by the name of `evaluated_as`, and if the config
    asks for it what a perfect searcher would score, as `ceiling`. scores.json and trajectories.jsonl.zst go into the new
    folder `out`, and the episodes of the perfect searcher into its ceiling.jsonl.zst.

    Raises:
        AgentRLError, RetrieverError: for missing or unsound inputs.
    """
    if out is not None and out.exists():
        raise ConfigError(f"--out {out}: exists already; choose another folder")
    config, questions = prepare(config, adapter, files, limit, "evaluate", with_gold=config.evaluation.ceiling)
    if out is not None:
        # A folder that cannot be made is found now and not when all episodes are done.
        out.parent.mkdir(parents=True, exist_ok=True)
    total, name = len(questions), evaluated_as(config)
    evaluations: dict[str, Evaluation] = {}
    with started(config, on_progress) as running:
        if config.evaluation.ceiling:
            from agentrl.evaluation.ceiling import measure_ceiling

            on_progress(Progress(0, "ceiling", 0, total))
            evaluations["ceiling"] = measure_ceiling(
                config, running.indexes, questions, lambda done: on_progress(Progress(0, "ceiling", done, total))
            )
        episodes = total * config.evaluation.samples
        on_progress(Progress(0, "evaluation", 0, episodes))
        evaluations[name] = evaluate(
            running.pool,
            questions,
            max_failed_share=config.rollout.max_failed_share,
            temperature=config.evaluation.temperature,
            samples=config.evaluation.samples,
            on_episodes=lambda episodes: None if out is None else _write_episodes(out, episodes),
            on_done=lambda done: on_progress(Progress(0, "evaluation", done, episodes)),
            on_stall=lambda message: on_progress(Progress(0, message, 0, 0)),
        )
    if out is not None:
        _write_scores(out, evaluations)
    return evaluations


def evaluated_as(config: Config) -> str:
    """Return how the policy is evaluated: `greedy`, or by the number of samples, such as `avg@8 at 0.7`."""
    settings = config.evaluation
    return f"avg@{settings.samples} at {settings.temperature:g}" if settings.temperature else "greedy"


def _write_scores(out: Path, evaluations: Mapping[str, Evaluation]) -> None:
    scores = next(e for name, e in evaluations.items() if name != "ceiling").to_dict()
    if "ceiling" in evaluations:
        scores["ceiling"] = evaluations["ceiling"].to_dict()
        write_trajectories(out / "ceiling.jsonl.zst", evaluations["ceiling"].trajectories)
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


def _write_episodes(out: Path, episodes: Sequence[Trajectory]) -> None:
    out.mkdir()
    write_trajectories(out / "trajectories.jsonl.zst", episodes)
