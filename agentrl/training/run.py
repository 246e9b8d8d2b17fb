"""A training run from a config to a run folder: evaluate, train under Ray Train, evaluate again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from agentrl.adapters import WEIGHTS, adapter_folder, check_tensors
from agentrl.config import Config, ConfigError
from agentrl.data.inputs import (
    check_index,
    check_rewarded,
    describe_inputs,
    evaluation_questions,
    file_sha256,
    first_of_each_set,
    read_set,
)
from agentrl.data.stream import QuestionStream
from agentrl.engines import check_device, require_trainable
from agentrl.evaluation.ceiling import measure_ceiling, searcher_codec
from agentrl.evaluation.run import Evaluation, read_evaluation
from agentrl.models import model_on_disk, resolve_model
from agentrl.progress import OnProgress, Progress
from agentrl.quantization import check_quantization
from agentrl.rollout.cluster import cluster
from agentrl.rollout.pool import RolloutPool
from agentrl.runs import RunFolder
from agentrl.runs.folder import Evaluated
from agentrl.runs.logs import logged
from agentrl.training.checkpoints import learning_rate
from agentrl.training.ending import stalled
from agentrl.training.evaluating import evaluate_step
from agentrl.training.loggers import Loggers, check_loggers
from agentrl.training.memory import card_bytes, check_memory, store_bytes
from agentrl.training.policy import saved_files
from agentrl.training.process import TrainerProcess
from agentrl.training.sizes import read_sizes
from agentrl.training.watch import RollBack
from agentrl.types import Question

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The questions of a run: those it trains on, in their order, and the evaluation set."""

    questions: QuestionStream
    evaluation: list[Question]


def load_inputs(config: Config) -> Inputs:
    """Read and check everything that a run needs from disk, before anything is started.

    Raises:
        AgentRLError: for whatever is missing or unsound, in one message.
        RetrieverError: if the index is missing or damaged.
    """
    config.require("training", "retriever")
    if not config.data.train:
        raise ConfigError(f"config {config.name!r}: data.train names no question set")
    if config.evaluation.every is not None and not config.data.eval:
        raise ConfigError(
            f"config {config.name!r}: evaluation.every {config.evaluation.every} has no question to ask; set data.eval, or "
            "leave it out"
        )
    require_trainable(config)
    check_loggers(config)
    _check_adapter(config)
    check_index(config)
    sets = [(read_set(config.data, entry), entry) for entry in config.data.train]
    for questions, entry in sets:
        check_rewarded(config.reward, config.data.resolve(entry.path), questions)
    return Inputs(
        questions=QuestionStream([(questions, entry.weight) for questions, entry in sets], config.seed),
        evaluation=evaluation_questions(config.data, with_gold=config.evaluation.ceiling),
    )


def _check_adapter(config: Config) -> None:
    """Raise ModelError unless the adapter to start from is there and fits the model, as far as that is on this disk."""
    start = adapter_folder(config)
    model = None if start is None else model_on_disk(config.model.path)
    if start is not None and model is not None:
        check_tensors(start, str(model))


def _planned_store(config: Config) -> int | None:
    """Check that engines and trainer fit the cards of this machine, and return the size of Ray's object store.

    None means Ray's own size, which is enough for the small models of a CPU; other machines start a Ray of their own.

    Raises:
        ConfigError: if something does not fit.
        ModelError: if there is no such model.
    """
    if config.device == "cpu" or config.ray.address is not None:
        return None
    # Of a model of the hub, what says how large it is; its weights are downloaded later.
    resolve_model(config.model.path, weights=False)
    sizes, card = read_sizes(config), card_bytes(config)
    if card is not None:
        check_memory(config, sizes, card)
    return store_bytes(config, sizes)


def train(
    config: Config, *, resume: bool, on_progress: OnProgress
) -> tuple[RunFolder, Evaluation | None, Evaluation | None]:
    """Run `config` from its first step, or with `resume` from its latest checkpoint, and return folder and evaluations.

    Where `evaluation.ceiling` asks for it, the folder has the scores of a perfect searcher too.

    Where `training.watch` asks for it, a run that collapsed goes on from an older checkpoint, with processes of its own.

    SIGTERM, Ctrl-C and an exception of `on_progress` make the trainer save the state of its last whole step first; another
    signal meanwhile ends the run at once.

    Raises:
        AgentRLError: if anything of the run fails; the folder keeps what was done, to resume from, and the traceback in
            error.txt.
        RetrieverError: if the index is missing or damaged.
    """
    if config.ray.address is None:
        check_device(config)
        check_quantization(config, trains=True)
    inputs = load_inputs(config)
    store = _planned_store(config)
    described = describe_inputs(config)
    start = adapter_folder(config)
    if start is not None:
        described["model.adapter"] = {"path": str(start), "sha256": file_sha256(start / WEIGHTS)}
    folder, done = RunFolder.reopen(config, described) if resume else (RunFolder.create(config, described), 0)
    with closing(folder), logged(folder.path):
        run = _Run(config, folder, inputs, resume, done, store, _logging(on_progress))
        while True:
            try:
                before, after = run.go()
                return folder, before, after
            except RollBack as back:
                folder.roll_back(back.target, back.step, back.reason)
                rate = learning_rate(config.training.learning_rate, folder)
                notice = f"{back}, at a learning rate of {rate:g}"
                run.on_progress(Progress(back.target, "notice", 0, 0, notice=notice))
                run = replace(run, resume=True, done=back.target)


@dataclass(frozen=True, slots=True)
class _Run:
    """A run whose folder is open, with `done` steps behind it; `store` is the size of Ray's object store, None for Ray's own."""

    config: Config
    folder: RunFolder
    inputs: Inputs
    resume: bool
    done: int
    store: int | None
    on_progress: OnProgress

    def go(self) -> tuple[Evaluation | None, Evaluation | None]:
        """Start trainer and engines, evaluate, train, evaluate again, and return both evaluations."""
        config, settings = self.config, self.config.evaluation
        if self.folder.changes:
            self._tell(self.done, f"continuing with {'; '.join(self.folder.changes)}")
        before = read_evaluation(self.folder, 0)
        after = None
        measures_ceiling = (
            settings.ceiling and bool(self.inputs.evaluation) and self.folder.read_evaluation("ceiling") is None
        )
        over = self.done >= config.training.steps or stalled(self.folder, settings, self.done) is not None
        trains = not (over and self.folder.trained.exists())
        if trains:
            self.folder.forget_ending()
        during = first_of_each_set(self.inputs.evaluation, settings.limit)
        with (
            closing(TrainerProcess(config, self.folder, self.inputs.questions, during, resume=self.resume)) as trainer,
            cluster(
                config,
                lambda phase: self._tell(self.done, f"starting {phase}"),
                beside=trainer if trains else None,
                logs=self.folder.logs,
                store_bytes=self.store,
            ) as running,
        ):
            if measures_ceiling:
                # What would end the run is found before the training.
                searcher_codec(config)
            if settings.before and self.inputs.evaluation and before is None:
                start = adapter_folder(config)
                if start is not None:
                    running.pool.publish(0, saved_files(config, start))
                before = self._evaluate(running.pool, 0, trainer.check)
            if trains:
                self._tell(self.done, "starting trainer")
                trainer.train(running.pool, self.on_progress, lambda message: self._tell(self.done, message))
            # After the training, because the first step is waited for.
            if measures_ceiling:
                self._measure_ceiling(running.indexes)
            if settings.after and self.inputs.evaluation:
                after = self._evaluate_trained(running.pool, anew=not trains)
        return before, after

    def _evaluate_trained(self, pool: RolloutPool, *, anew: bool) -> Evaluation:
        """Evaluate what training left on all questions, unless that was done during training and shall not be done `anew`."""
        steps, ending = self.config.training.steps, self.folder.read_ending()
        kept = steps if ending is None else ending["kept_step"]
        limited = self.config.evaluation.limit is not None
        found = None if anew or limited else read_evaluation(self.folder, kept)
        if found is not None:
            return found
        # Engines load no version that is not newer, and may hold those of steps after the one that is kept.
        pool.publish(kept if kept == steps else steps + 1, saved_files(self.config, self.folder.trained))
        after = self._evaluate(pool, kept, recorded_as="after" if limited else kept)
        with closing(Loggers(self.config, self.folder, self._notice)) as loggers:
            loggers.log_evaluation(kept, after)
        return after

    def _measure_ceiling(self, indexes: Sequence[Any]) -> None:
        total = len(self.inputs.evaluation)
        self.on_progress(Progress(self.done, "ceiling", 0, total))
        ceiling = measure_ceiling(
            self.config,
            indexes,
            self.inputs.evaluation,
            lambda done: self.on_progress(Progress(self.done, "ceiling", done, total)),
        )
        self.folder.write_evaluated("ceiling", ceiling.trajectories)
        self.folder.write_evaluation("ceiling", ceiling.to_dict())

    def _evaluate(
        self,
        pool: RolloutPool,
        step: int,
        check: Callable[[], None] = lambda: None,
        recorded_as: Evaluated | None = None,
    ) -> Evaluation:
        """Evaluate the engines' weights as those of `step`, and call `check`, which may raise, after each question."""
        return evaluate_step(
            self.config, self.folder, pool, self.inputs.evaluation, step, self.on_progress, check, recorded_as
        )

    def _notice(self, line: str) -> None:
        self.on_progress(Progress(self.done, "notice", 0, 0, notice=line))

    def _tell(self, step: int, message: str) -> None:
        self.on_progress(Progress(step, message, 0, 0))


def _logging(on_progress: OnProgress) -> OnProgress:
    """Return an `on_progress` that also logs each new phase and step."""
    last = ""

    def tell(progress: Progress) -> None:
        nonlocal last
        if progress.notice:
            _log.warning("%s", progress.notice)
        elif progress.phase != last:
            last = progress.phase
            _log.info("step %d: %s", progress.step, last)
        on_progress(progress)

    return tell
