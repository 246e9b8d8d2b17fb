"""Where the metrics of a run are shown beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow and Trackio.

The last three are driven through transformers' own callbacks, as its Trainer would: so a run of agentrl looks there like any
other of transformers, with `train/` before the names of metrics in wandb and Trackio. Each knows the run by its name and has
its settings by dotted key. A logger that fails is left out from then on, which is said once; training goes on.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from agentrl.config import Config, ConfigError
from agentrl.evaluation.run import Evaluation
from agentrl.rewards import exact_match
from agentrl.runs import RunFolder
from agentrl.runs.resume import flat_settings
from agentrl.types import Trajectory

if TYPE_CHECKING:
    from transformers import TrainerCallback

PROJECT = "agentrl"
"""The project that runs belong to in wandb and Trackio, and the experiment in MLflow, unless the environment names another."""

_MOST_EPISODES = 50
_CONNECT_SECONDS = 5.0
_TABLE = "eval/episodes"


def check_loggers(config: Config) -> None:
    """Raise ConfigError unless the packages of all loggers of a configuration are installed; nothing is imported."""
    for name in config.logging:
        # Each has the name of its package.
        if name != "jsonl" and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"config {config.name!r}: logging: {name} is not installed: pip install {name}; or leave it out of logging"
            )


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return the scores of an evaluation by name, without the `eval/` before them: of each set, and means over sets."""
    metrics = {"exact_match": evaluation.em, "f1": evaluation.f1}
    for result in evaluation.sets:
        if result.n:
            scores = {"exact_match": result.em, "f1": result.f1, "searches": result.searches}
            metrics |= {f"{result.dataset}/{name}": value for name, value in scores.items()}
    return metrics


def episode_rows(trajectories: Iterable[Trajectory]) -> list[dict[str, Any]]:
    """Return episodes as rows of a table: at most 50, at even distances, so that each set is there."""
    rows: list[dict[str, Any]] = []
    distance = 1
    # A large evaluation is read once and never held.
    for number, episode in enumerate(trajectories):
        if number % distance == 0:
            rows.append(_row(episode))
            if len(rows) > _MOST_EPISODES:
                rows, distance = rows[::2], 2 * distance
    return rows


def _row(episode: Trajectory) -> dict[str, Any]:
    golds, answer = episode.question.golden_answers, episode.answer
    return {
        "question": episode.question.text,
        "gold": " | ".join(golds),
        "answer": "" if answer is None else answer,
        "exact_match": exact_match(episode),
        "searches": len(episode.searches),
        "text": "".join(turn.text + turn.observation for turn in episode.turns),
    }


class Loggers:
    """The loggers of a run, opened where the run has come to, also if another process had them open before."""

    def __init__(
        self, config: Config, folder: RunFolder, tell: Callable[[str], None], first_step: int | None = None
    ) -> None:
        """Open the loggers of `config.logging`.

        Args:
            config, folder: of the run.
            tell: is called with a line for the user.
            first_step: the step that is taken next. TensorBoard hides what it was shown of this step and later ones before.
        """
        self._tell = tell
        self._loggers: dict[str, _Logger] = {}
        makers: dict[str, Callable[[], _Logger]] = {
            "tensorboard": lambda: _TensorBoard(folder, first_step),
            "wandb": lambda: _Wandb(config, folder, tell),
            "mlflow": lambda: _MLflow(config, folder),
            "trackio": lambda: _Trackio(config, folder),
        }
        for name in config.logging:
            if name in makers:
                self._try(name, lambda name=name: self._loggers.update({name: makers[name]()}))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        self._each(lambda logger: logger.log(step, metrics))

    def log_evaluation(self, step: int, evaluation: Evaluation, episodes: Iterable[Trajectory] | None = None) -> None:
        """Show the scores of an evaluation after `step` steps as `eval/…`, and some of its episodes as a table.

        `episodes` are those of an evaluation that does not hold them itself.
        """
        scores = evaluation_metrics(evaluation)
        rows = episode_rows(evaluation.trajectories if episodes is None else episodes)
        self._each(lambda logger: logger.log_evaluation(step, scores, rows))

    def close(self) -> None:
        """Write what waits to be written, and leave the loggers."""
        self._each(lambda logger: logger.close())
        self._loggers.clear()

    def _each(self, act: Callable[[_Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            self._try(name, lambda logger=logger: act(logger))

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001, no logger is worth a run, whatever it raises
            self._loggers.pop(name, None)
            reason = str(error).strip().partition("\n")[0]
            self._tell(f"{name} failed and is left out from here on: {type(error).__name__}: {reason}")


class _Logger(Protocol):
    """A logger of one run; everything may raise what its package raises."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_evaluation(self, step: int, scores: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    """Has no tables, so that of an evaluation it shows the scores."""

    def __init__(self, folder: RunFolder, first_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_evaluation(self, step: int, scores: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        self.log(step, {f"eval/{name}": value for name, value in scores.items()})

    def close(self) -> None:
        self._writer.close()


@dataclass
class _Arguments:
    """What transformers' callbacks read of TrainingArguments; real ones would look for devices and processes."""

    run_name: str
    output_dir: str
    settings: Mapping[str, Any]
    project: str = PROJECT
    trackio_space_id: None = None
    trackio_bucket_id: None = None
    trackio_static_space_id: bool = False
    hub_private_repo: None = None

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)


class _Callback:
    """A callback of transformers, told what its Trainer would tell it."""

    def __init__(self, callback: TrainerCallback, config: Config, folder: RunFolder, known: Sequence[str] = ()) -> None:
        """Open it. Of the settings those are left out that it is known to have."""
        settings = {name: value for name, value in flat_settings(config).items() if name not in known}
        self._callback = callback
        self._arguments = _Arguments(config.name, str(folder.path), settings)
        self._tell("on_train_begin", 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tell("on_log", step, logs=dict(metrics))

    def close(self) -> None:
        self._tell("on_train_end", 0)

    def _tell(self, event: str, step: int, **told: Any) -> None:
        from transformers import TrainerControl, TrainerState

        state = TrainerState(global_step=step)
        getattr(self._callback, event)(self._arguments, state, TrainerControl(), **told)


class _Wandb(_Callback):
    def __init__(self, config: Config, folder: RunFolder, tell: Callable[[str], None]) -> None:
        import wandb
        from transformers.integrations import WandbCallback

        self._wandb = wandb
        reason = _why_offline(wandb)
        if reason is not None:
            tell(
                f"wandb runs offline: {reason}; upload later with: wandb sync {folder.path / 'wandb'}/offline-run-*; "
                "set WANDB_MODE to choose"
            )
        run_id = folder.read_logger_ids().get("wandb") or uuid.uuid4().hex[:12]
        # The callback takes over the run that it finds.
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=config.name,
            id=run_id,
            resume="allow",
            dir=str(folder.path),
            mode=None if reason is None else "offline",
            # What the process prints is in the logs of the run, and what wandb prints would run through displays.
            settings=wandb.Settings(console="off", silent=True),
        )
        folder.note_logger_id("wandb", run_id)
        super().__init__(WandbCallback(), config, folder)

    def log_evaluation(self, step: int, scores: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        self.log(step, {f"eval_{name}": value for name, value in scores.items()})
        if rows:
            table = self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            self._wandb.log({_TABLE: table, "train/global_step": step})

    def close(self) -> None:
        super().close()
        self._wandb.finish()


def _why_offline(wandb: Any) -> str | None:
    """Return why wandb cannot send anything to its host; None if it can, or if WANDB_MODE says what to do."""
    # A package that wandb itself needs.
    from requests.utils import get_netrc_auth

    if os.environ.get("WANDB_MODE"):
        return None
    settings = wandb.setup().settings
    if settings.mode != "online":
        return None
    host = settings.base_url
    given = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if not (given or get_netrc_auth(host)):
        return "there is no API key (WANDB_API_KEY, or wandb login)"
    parts = urlsplit(host)
    if parts.scheme in getproxies():
        # Who cannot be reached directly may be reached through it.
        return None
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None


class _MLflow(_Callback):
    def __init__(self, config: Config, folder: RunFolder) -> None:
        import mlflow
        from transformers.integrations import MLflowCallback

        self._mlflow = mlflow
        if not (os.environ.get("MLFLOW_TRACKING_URI") or mlflow.is_tracking_uri_set()):
            # A database would need packages that mlflow-skinny has not, and MLflow wants to be told that files are meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((folder.path / "mlflow").as_uri())
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        # The callback takes over the run that it finds.
        run = mlflow.start_run(run_id=folder.read_logger_ids().get("mlflow"), run_name=config.name)
        folder.note_logger_id("mlflow", run.info.run_id)
        callback = MLflowCallback()
        # A parameter has one value for ever there, and settings may have changed.
        super().__init__(callback, config, folder, known=tuple(run.data.params))
        # In a thread of its own it would write into a log that it has failed, and tell nobody.
        callback._async_log = False
        self._folders: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # Its names are paths, and a file such as advantages/strata cannot be the folder of advantages/strata/0/reward too.
        self._folders |= {str(parent) for name in metrics for parent in PurePosixPath(name).parents}
        super().log(step, {f"{name}/all" if name in self._folders else name: value for name, value in metrics.items()})

    def log_evaluation(self, step: int, scores: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        self.log(step, {f"eval/{name}": value for name, value in scores.items()})
        if rows:
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            self._mlflow.log_table(columns, f"evaluations/step-{step:05d}.json")

    def close(self) -> None:
        # Parameters are logged in a thread of its own.
        self._mlflow.flush_async_logging()
        super().close()
        self._mlflow.end_run()


class _Trackio(_Callback):
    def __init__(self, config: Config, folder: RunFolder) -> None:
        import trackio
        from transformers.integrations import TrackioCallback

        self._trackio = trackio
        super().__init__(TrackioCallback(), config, folder)

    def log_evaluation(self, step: int, scores: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        import pandas

        self.log(step, {f"eval_{name}": value for name, value in scores.items()})
        if rows:
            table = self._trackio.Table(dataframe=pandas.DataFrame(rows))
            self._trackio.log({_TABLE: table, "train/global_step": step})
