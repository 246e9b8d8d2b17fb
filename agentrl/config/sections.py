"""The sections of a configuration as pydantic models, and what each setting means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from agentrl.config.agent import AgentConfig
from agentrl.config.base import ConfigError, PlugInOptions, Section
from agentrl.config.engine import EngineConfig, device_problem, trainer_share
from agentrl.config.evaluation import EvaluationConfig
from agentrl.config.model import ModelConfig
from agentrl.config.paths import DataPath, IndexPath, LocalPath
from agentrl.config.retriever import RetrieverConfig
from agentrl.config.reward import RewardConfig, length_problem, names_problem, written_as_list
from agentrl.config.training import TrainingConfig
from agentrl.config.yaml12 import write_yaml


class QuestionSet(Section):
    """A question file and its share of the questions."""

    path: DataPath
    """The file: JSON lines or Parquet, see docs/retrieval.md and `agentrl data validate`. Relative to `data.root`."""
    name: str | None = None
    """What its question ids begin with. By default the file's folder and stem."""
    weight: float = Field(1.0, gt=0)
    """Its share of the mix, in proportion to the weights of the other files."""
    limit: int | None = Field(None, ge=1)
    """The first so many questions; null takes all."""


class DataConfig(Section):
    """The questions of a run."""

    root: LocalPath = Field(default_factory=lambda: os.environ.get("AGENTRL_DATA", "data"))
    """The folder under which relative paths of question sets and indexes are looked up. By default $AGENTRL_DATA or ./data."""
    train: list[QuestionSet] = Field(default_factory=list)
    """The question sets that a run trains on."""
    eval: list[QuestionSet] = Field(default_factory=list)
    """The question sets that it is evaluated on."""

    def resolve(self, path: str) -> Path:
        """Return `path` itself if absolute, else the path under `root`."""
        return Path(self.root) / path

    def resolve_index(self, index: str) -> str:
        """Return the folder of an index as `resolve` does, and `prebuilt:NAME` as it is."""
        return index if index.startswith("prebuilt:") else str(self.resolve(index))


class RolloutConfig(Section):
    """How groups of episodes are sampled, and what happens when engines or environments fail."""

    workers: int = Field(1, ge=1)
    """How many engines sample."""
    group_size: int = Field(8, ge=2)
    """How many episodes of one question are compared with one another."""
    questions_per_step: int = Field(2, ge=1)
    """How many groups a step trains on."""
    episode_timeout_seconds: float = Field(300.0, gt=0)
    """The time of an episode, from when it has a place on an engine."""
    reward_timeout_seconds: float = Field(120.0, gt=0)
    """The time of all rewards of an episode together, after the episode's own."""
    max_failed_share: float = Field(0.1, ge=0, lt=1)
    """The run stops when the environment fails more than this share of a step's episodes."""
    max_failures: int = Field(5, ge=0)
    """The run stops when engines die or hang more often than this within `failure_window_seconds`. Until then an engine is
    started again, and its episodes are run again.
    """
    failure_window_seconds: float = Field(600.0, gt=0)
    """See `max_failures`."""
    max_staleness: int = Field(0, ge=0)
    """How many steps engines may sample ahead of the trainer; 0 is on-policy. An episode with a turn of older weights than that
    counts as failed.
    """


class SelectionConfig(Section):
    """Drops groups whose rewards make no difference to their advantages, and samples the next questions in their place.

    A step trains on the first groups that remain, in the order of their questions, not in the order in which they get done.
    Only rewards keep a group; what an option such as `balance` adds to advantages regardless of the rewards does not. Each
    group is judged alone, so selection excludes estimators that compare over the questions of a step.

    A step samples at most `max_extra` times `rollout.questions_per_step` more questions and trains on the groups that it
    then has. With `max_extra: null` a step samples until it is full, and the run stops once a step has sampled as many
    questions as the sets hold.
    """

    enabled: bool = False
    """Whether groups are selected."""
    max_extra: float | None = Field(2.0, ge=0)
    """A step samples at most so many times `rollout.questions_per_step` more questions and trains on the groups that it then has.
    null samples until a step is full, and stops the run once a step has sampled as many questions as the sets hold.
    """


class AdvantagesConfig(Section):
    """How episodes are compared: see docs/algorithm.md."""

    estimator: str = "stratified"
    """The estimator by name or import path. `stratified` is alpha * stratified + (1 - alpha) * global (arXiv 2510.06214).
    `value_baseline` learns from past steps, and excludes `selection`.
    """
    stratum: str | list[str] = "searches"
    """What sorts episodes into strata: a stratifier by name or import path, or a list of them for tuples of keys.
    `random_like:NAME` deals the keys of NAME at random among the episodes of each question.
    """
    max_strata: int | None = Field(None, ge=2)
    """The most strata; the tail is merged."""
    scope: Literal["prompt", "batch"] = "prompt"
    """`prompt` compares the episodes of a question, `batch` over all questions of a step."""
    options: PlugInOptions = Field(default_factory=dict)
    """The estimator's own options. One may change during the run: `{start: 1, end: 0, shape: step, at: 0.5}` or `{rule:
    progress}`, see agentrl.advantages.schedule.
    """
    selection: SelectionConfig = SelectionConfig()
    """Drops groups that teach nothing."""

    @model_validator(mode="after")
    def _selects_what_it_can_judge(self) -> Self:
        over_batch = self.estimator == "reinforce_pp" and self.options.get("baseline", "none") == "none"
        if self.selection.enabled and (over_batch or self.scope == "batch"):
            raise ValueError(
                "`selection` judges each question by itself, and these advantages compare over the questions of a step; "
                "set scope to prompt and reinforce_pp's baseline to group, or leave selection off"
            )
        if self.selection.enabled and self.estimator == "value_baseline":
            raise ValueError(
                "`selection` drops questions whose episodes all earned the same, and value_baseline compares these with past "
                "steps; leave selection off, or take another estimator"
            )
        return self


class DemonstrationSource(Section):
    """Questions with gold passages and the index that their demonstrations search."""

    questions: DataPath
    """The question file, relative to `data.root`."""
    name: str | None = None
    """What its question ids begin with."""
    index: IndexPath
    """The index that demonstrations search."""
    count: int = Field(ge=1)
    """How many demonstrations are written."""


class EpisodesConfig(Section):
    """Which of a policy's own episodes are demonstrations: those that ended with an answer, in turns that were all understood."""

    files: list[LocalPath] = Field(min_length=1)
    """Files of episodes that the same model sampled: of `agentrl rollout --out`, or `trajectories/` of a run."""
    min_reward: float = 1.0
    """The least that an episode earned."""
    min_searches: int = Field(0, ge=0)
    """The fewest searches that it executed."""
    max_searches: int | None = Field(None, ge=0)
    """The most searches that it executed; null sets no limit."""
    per_question: int | None = Field(4, ge=1)
    """The most episodes of one question, drawn by the seed, so that easy questions do not outweigh hard ones. null takes all."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_searches is not None and self.max_searches < self.min_searches:
            raise ValueError(f"max_searches {self.max_searches} must be at least min_searches {self.min_searches}")
        return self


class WarmStartConfig(Section):
    """Supervised training on demonstrations: written from gold passages through the real retriever, own episodes, or both."""

    sources: list[DemonstrationSource] = Field(default_factory=list)
    """Questions and the indexes that their demonstrations search."""
    episodes: EpisodesConfig | None = None
    """A policy's own episodes, as in rejection sampling; see docs/training.md."""
    out: LocalPath = "starter"
    """The folder of the adapter that is trained."""
    epochs: int = Field(1, ge=1)
    """Passes over the demonstrations."""
    learning_rate: float = Field(5e-4, gt=0)
    """Of the supervised training."""
    batch: int = Field(8, ge=1)
    """Demonstrations of one update."""
    threads: int = Field(2, ge=1)
    """Of torch."""

    @model_validator(mode="after")
    def _has_demonstrations(self) -> Self:
        if not self.sources and self.episodes is None:
            raise ValueError("there is nothing to train on; set sources, or episodes (`agentrl warmstart --from FILE`)")
        return self


class RayConfig(Section):
    """The cluster that a run uses."""

    address: str | None = None
    """null starts a cluster on this machine and ends it with the run; "auto" joins the one that runs here; else a cluster's
    address.
    """


Logger = Literal["tensorboard", "wandb", "mlflow", "trackio", "jsonl"]
"""Where the metrics of a run are shown: by the name of the Python package, and jsonl for `metrics.jsonl`."""


class Config(Section):
    """Everything that a run depends on."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    """The run's name, which is that of its folder."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of everything that is drawn at random."""
    run_dir: LocalPath = "runs"
    """The folder of run folders."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What engines and trainer compute on."""
    cpu_config: str | None = None
    """The config to use instead where there is no GPU."""
    model: ModelConfig
    """The model that is trained, and what of it."""
    data: DataConfig = Field(default_factory=DataConfig)
    """The questions."""
    retriever: RetrieverConfig | None = None
    """What is searched."""
    agent: AgentConfig = AgentConfig()
    """How an episode runs."""
    engine: EngineConfig = EngineConfig()
    """What samples."""
    rollout: RolloutConfig = RolloutConfig()
    """How groups of episodes are sampled."""
    reward: list[RewardConfig] = Field([RewardConfig()], min_length=1)
    """What an episode earns: a list of rewards, which are added up. See docs/rewards.md."""
    advantages: AdvantagesConfig = AdvantagesConfig()
    """How episodes are compared."""
    training: TrainingConfig | None = None
    """What an update is made of. null is for configs that only sample or evaluate."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When questions are asked that are not trained on."""
    logging: list[Logger] = Field(default_factory=lambda: ["tensorboard"])
    """Where metrics are shown beside `metrics.jsonl`, which every run writes; see agentrl.training.loggers."""
    warmstart: WarmStartConfig | None = None
    """The supervised training that `agentrl warmstart` does."""
    ray: RayConfig = RayConfig()
    """The cluster."""

    @field_validator("reward", mode="before")
    @classmethod
    def _is_list_of_rewards(cls, given: Any) -> Any:
        if isinstance(given, dict):
            raise ValueError(f"must be a list of rewards; write it as {written_as_list(given)}")
        return given

    @field_validator("reward")
    @classmethod
    def _has_each_name_once(cls, rewards: list[RewardConfig]) -> list[RewardConfig]:
        if (problem := names_problem(rewards)) is not None:
            raise ValueError(problem)
        return rewards

    @field_validator("logging")
    @classmethod
    def _has_each_logger_once(cls, loggers: list[Logger]) -> list[Logger]:
        if len(set(loggers)) < len(loggers):
            raise ValueError("name each logger once")
        return loggers

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.device == "cpu" and self.model.dtype != "float32":
            raise ValueError(
                "model.dtype must be float32 on device cpu: bfloat16 is many times slower on CPUs without AMX"
            )
        if (problem := self._quantization_problem()) is not None:
            raise ValueError(problem)
        if self.evaluation.ceiling and self.retriever is not None and self.retriever.replay is not None:
            raise ValueError(
                "evaluation.ceiling searches for queries of its own, and retriever.replay holds only those of a recorded run; "
                "leave one of them out"
            )
        if (problem := length_problem(self.reward, self.agent.most_own_tokens)) is not None:
            raise ValueError(problem)
        problem = device_problem(
            self.device,
            self.engine,
            workers=self.rollout.workers,
            max_staleness=self.rollout.max_staleness,
            trains=self.training is not None,
        )
        if problem is not None:
            raise ValueError(problem)
        if self.warmstart is not None and self.model.lora is None:
            raise ValueError(
                "warmstart trains an adapter, and model.lora is null; set model.lora, or leave warmstart out"
            )
        rerank = None if self.retriever is None else self.retriever.rerank
        if self.device == "cpu" and rerank is not None and rerank.device == "cuda":
            raise ValueError("retriever.rerank.device cuda is an engine's card, and device is cpu; set it to cpu")
        if self.training is not None:
            if self.device == "cpu" and self.training.optimizer.name == "adamw_8bit":
                raise ValueError(
                    "training.optimizer.name adamw_8bit needs device cuda, and device is cpu; set it to adamw"
                )
            if self.training.shard and self.training.optimizer.name == "adamw_8bit":
                raise ValueError(
                    "training.optimizer.name adamw_8bit keeps scales that training.shard cannot put together in a checkpoint; "
                    "set it to adamw, or shard to false"
                )
            if self.training.shard and self.model.lora is not None:
                raise ValueError(
                    "training.shard needs model.lora null: an adapter is small, and the model below it stays whole; set shard to "
                    "false"
                )
            if self.training.workers > 1 and self.device == "cuda" and self.engine.shares_card:
                raise ValueError(
                    f"training.workers {self.training.workers} need a card each, and engine.gpus {self.engine.gpus:g} shares one "
                    "card among engines and trainer; set engine.gpus to 1, or training.workers to 1"
                )
            groups = self.rollout.questions_per_step
            if self.training.minibatches > groups:
                raise ValueError(
                    f"training.minibatches {self.training.minibatches} must be at most rollout.questions_per_step {groups}: "
                    "a minibatch holds whole groups"
                )
        return self

    def _quantization_problem(self) -> str | None:
        """Return why the model cannot be quantised as asked, and what to set; None if it can."""
        asked = f"model.quantization {self.model.quantization}"
        if self.model.quantization is None:
            return None
        if not self.model.publishes_adapter:
            return f"{asked} is for adapters that engines load beside the model; leave it out, or set model.lora without dora"
        if self.device == "cpu":
            return f"{asked} needs device cuda, and device is cpu; leave it out"
        if self.model.dtype != "bfloat16":
            return f"{asked} computes in bfloat16, and model.dtype is {self.model.dtype}; set it to bfloat16"
        if self.engine.kind != "vllm":
            return f"{asked} needs engine.kind vllm, and it is {self.engine.kind}"
        if self.engine.cards > 1:
            return (
                f"{asked} needs an engine on one card: with engine.gpus {self.engine.gpus:g} each card would quantise its part "
                "of a matrix by itself, and sample with other weights than the trainer's; set engine.gpus to 1"
            )
        if self.warmstart is not None:
            return f"{asked} is for training by rewards; leave it out of a config with the section `warmstart`"
        return None

    @property
    def trainer_gpus(self) -> float:
        """The cards that each trainer process asks for: one of its own, or the share that the engines leave."""
        if self.device == "cpu":
            return 0.0
        return trainer_share(self.engine, self.rollout.workers)

    @property
    def start_seconds(self) -> float:
        """How long an engine may take to start, or to load an adapter."""
        default = 300.0 if self.device == "cpu" else 900.0
        return default if self.engine.start_timeout_seconds is None else self.engine.start_timeout_seconds

    @property
    def folder(self) -> Path:
        """The run folder: `run_dir`/`name`."""
        return Path(self.run_dir) / self.name

    def require(self, *sections: str) -> None:
        """Raise ConfigError unless each named section is set."""
        missing = [section for section in sections if not getattr(self, section)]
        if missing:
            raise ConfigError(f"config {self.name!r}: this command needs the section `{missing[0]}`, which is missing")

    def to_yaml(self) -> str:
        return write_yaml(self.model_dump(mode="json"))
