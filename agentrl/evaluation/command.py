"""`agentrl eval`: from a config and an adapter to scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from agentrl.config import Config, ConfigError
from agentrl.data.questions import read_questions
from agentrl.evaluation.run import Evaluation, evaluate
from agentrl.rollout.cluster import cluster
from agentrl.runs import write_trajectories
from agentrl.training.adapter import adapter_folder, read_adapter
from agentrl.training.loop import Progress
from agentrl.training.run import check_index, evaluation_questions
from agentrl.types import Question


def run_evaluation(
    config: Config,
    adapter: str | None,
    files: Sequence[str],
    limit: int | None,
    out: Path | None,
    on_progress: Callable[[Progress], None],
) -> Evaluation:
    """Evaluate `adapter` (default: the config's) greedily over `files` (default: `data.eval`).

    Writes scores.json and trajectories.jsonl.zst into the new folder `out`.

    Raises:
        AgentRLError, RetrieverError: for missing or unsound inputs.
    """
    if adapter is not None:
        model = config.model.model_copy(update={"adapter": adapter})
        config = config.model_copy(update={"model": model})
    config.require("retriever")
    if out is not None and out.exists():
        raise ConfigError(f"--out {out}: exists already; choose another folder")
    start = adapter_folder(config)
    check_index(config)
    questions = [q for file in files for q in read_questions(Path(file))] if files else evaluation_questions(config)
    if limit is not None:
        questions = _first_of_each_set(questions, limit)
    if not questions:
        raise ConfigError("nothing to evaluate: give --questions FILE, or set data.eval in the config")
    with cluster(config, lambda phase: on_progress(Progress(0, f"starting {phase}", 0, 0))) as running:
        if start is not None:
            running.pool.publish(0, read_adapter(start))
        total = len(questions)
        on_progress(Progress(0, "evaluation", 0, total))
        result = evaluate(
            running.pool,
            questions,
            max_failed_share=config.rollout.max_failed_share,
            on_done=lambda done: on_progress(Progress(0, "evaluation", done, total)),
        )
    if out is not None:
        out.mkdir(parents=True)
        (out / "scores.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
        write_trajectories(out / "trajectories.jsonl.zst", result.trajectories)
    return result


def _first_of_each_set(questions: Sequence[Question], limit: int) -> list[Question]:
    taken: dict[str, int] = {}
    kept: list[Question] = []
    for question in questions:
        taken[question.dataset] = taken.get(question.dataset, 0) + 1
        if taken[question.dataset] <= limit:
            kept.append(question)
    return kept
