"""The sections of a configuration as pydantic models, and what each setting means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from agentrl.config.base import ConfigError, PlugInOptions, Section
from agentrl.config.engine import EngineConfig, device_problem, trainer_share
from agentrl.config.evaluation import EvaluationConfig
from agentrl.config.model import ModelConfig
from agentrl.config.paths import DataPath, IndexPath, LocalPath, absolute
from agentrl.config.retriever import RetrieverConfig
from agentrl.config.reward import RewardConfig, length_problem, names_problem, written_as_list
from agentrl.config.training import TrainingConfig
from agentrl.config.yaml12 import write_yaml


class QuestionSet(Section):
    """A question file. `name` prefixes its ids (default: the file's folder and stem); `weight` is its share of the mix."""

    path: DataPath
    name: str | None = None
    weight: float = Field(1.0, gt=0)
    limit: int | None = Field(None, ge=1)


class DataConfig(Section):
    """Relative paths of question sets and indexes are looked up under `root`, by default $AGENTRL_DATA or ./data."""

    root: LocalPath = Field(default_factory=lambda: os.environ.get("AGENTRL_DATA", "data"))
    train: list[QuestionSet] = Field(default_factory=list)
    eval: list[QuestionSet] = Field(default_factory=list)

    def resolve(self, path: str) -> Path:
        """Return `path` itself if absolute, else the path under `root`."""
        return Path(self.root) / path

    def resolve_index(self, index: str) -> str:
        """Return the folder of an index as `resolve` does, and `prebuilt:NAME` as it is."""
        return index if index.startswith("prebuilt:") else str(self.resolve(index))


class ToolConfig(Section):
    """A tool: `search`, `open`, or `package.module:Class` (see agentrl.agent.tools.Tool) with the options that it is made with.

    A call that takes longer than `timeout_seconds` is stopped; the model is told so, and the episode goes on. What comes
    back has at most `max_tokens` of the model's tokens, and never more than `agent.max_observation_tokens`. `on_error` is
    what the model is told where the tool refuses a call or is stopped; null tells it why.
    """

    kind: str
    options: PlugInOptions = Field(default_factory=dict)
    timeout_seconds: float | None = Field(None, gt=0)
    max_tokens: int | None = Field(None, ge=32)
    on_error: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, tree: Any) -> Any:
        return {"kind": tree} if isinstance(tree, str) else tree

    @model_serializer(mode="wrap")
    def _shortest(self, write: SerializerFunctionWrapHandler) -> dict[str, Any] | str:
        return self.kind if self == ToolConfig(kind=self.kind) else write(self)

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in ("search", "open") and ":" not in kind:
            raise ValueError(
                f"{kind!r} is neither `search` nor `open`; write a tool of your own as package.module:Class"
            )
        return kind


class AgentConfig(Section):
    """How an episode runs.

    `protocol` is a name or `package.module:Class`; `tools` are sections of ToolConfig, or what `kind` is there alone. An episode
    executes at most `max_turns` calls of tools and then has one more turn to answer. The model is told of at most
    `max_invalid` mistakes; with `mistakes_are_turns` each mistake counts towards `max_turns` instead. Token limits count ids of
    the model's tokenizer; `max_episode_tokens` includes the prompt. vLLM samples no colder than at `temperature` 0.01.

    `instruction` replaces the protocol's own wording; the question stands where the instruction has `{question}`, else below
    it. An empty `instruction` leaves the question alone; it suits a model whose adapter knows the protocol already.
    `instruction_file` names a file with the wording, which the resolved configuration holds as `instruction`.
    """

    protocol: str = "search_tags"
    prompt: Literal["plain", "chat"] = "plain"
    tools: list[ToolConfig] = Field(["search"], min_length=1, validate_default=True)
    instruction: str | None = None
    instruction_file: str | None = None
    worked_examples: int = Field(0, ge=0, le=2)
    max_turns: int = Field(3, ge=0)
    max_invalid: int = Field(1, ge=0)
    mistakes_are_turns: bool = False
    max_turn_tokens: int = Field(96, ge=8)
    max_observation_tokens: int = Field(240, ge=32)
    max_episode_tokens: int = Field(1024, ge=64)
    temperature: float = Field(1.0, ge=0.01)

    @property
    def most_own_tokens(self) -> int:
        """The most tokens of an episode that the model itself can write."""
        # After the last turn that acts comes one that answers.
        return min((self.max_turns + self.max_invalid + 1) * self.max_turn_tokens, self.max_episode_tokens)

    @model_validator(mode="before")
    @classmethod
    def _reads_its_instruction(cls, tree: Any) -> Any:
        file = tree.get("instruction_file") if isinstance(tree, dict) else None
        if not isinstance(file, str):
            return tree
        if tree.get("instruction") is not None:
            raise ValueError("set `instruction` or `instruction_file`, not both")
        try:
            text = Path(absolute(file)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"instruction_file {absolute(file)} cannot be read: {error}") from error
        # The file may change, or be missing on another machine; what a run was told stands in its resolved configuration.
        return tree | {"instruction": text, "instruction_file": None}

    @field_validator("tools")
    @classmethod
    def _has_each_tool_once(cls, tools: list[ToolConfig]) -> list[ToolConfig]:
        packaged = [tool.kind for tool in tools if ":" not in tool.kind]
        if len(set(packaged)) < len(packaged):
            raise ValueError("name each tool once")
        return tools

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_turn_tokens >= self.max_episode_tokens:
            raise ValueError(
                f"max_turn_tokens {self.max_turn_tokens} must be below max_episode_tokens {self.max_episode_tokens}"
            )
        if self.max_observation_tokens >= self.max_episode_tokens:
            raise ValueError(
                f"max_observation_tokens {self.max_observation_tokens} must be below max_episode_tokens {self.max_episode_tokens}"
            )
        return self


class RolloutConfig(Section):
    """Groups of `group_size` episodes for each of `questions_per_step` questions, on `workers` engines.

    An engine that dies or hangs is started again, and its episodes are run again. A run stops when that happens more than
    `max_failures` times within `failure_window_seconds`, or when the environment fails more than `max_failed_share` of a
    step's episodes. With `max_staleness` n, engines sample up to n steps ahead of the trainer; 0 is on-policy. An episode with
    a turn of weights older than that counts as failed.

    The rewards of an episode have `reward_timeout_seconds` together, after the episode's own `episode_timeout_seconds`.
    """

    workers: int = Field(1, ge=1)
    group_size: int = Field(8, ge=2)
    questions_per_step: int = Field(2, ge=1)
    episode_timeout_seconds: float = Field(300.0, gt=0)
    reward_timeout_seconds: float = Field(120.0, gt=0)
    max_failed_share: float = Field(0.1, ge=0, lt=1)
    max_failures: int = Field(5, ge=0)
    failure_window_seconds: float = Field(600.0, gt=0)
    max_staleness: int = Field(0, ge=0)


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
    max_extra: float | None = Field(2.0, ge=0)


class AdvantagesConfig(Section):
    """The estimator by name or import path, its own options, and what sorts episodes into strata.

    `stratified` with `alpha` is alpha * stratified + (1 - alpha) * global (arXiv 2510.06214); see agentrl.advantages.
    An option may change during the run: `{start: 1, end: 0, shape: step, at: 0.5}` or `{rule: progress}`, see
    agentrl.advantages.schedule. `stratum` is a stratifier by name or import path, or a list of them for tuples of keys;
    `random_like:NAME` deals the keys of NAME at random among the episodes of each question. `max_strata` merges the tail of
    the strata. `scope: batch` compares over the questions of a step. `value_baseline` learns from past steps, and excludes
    `selection`.
    """

    estimator: str = "stratified"
    stratum: str | list[str] = "searches"
    max_strata: int | None = Field(None, ge=2)
    scope: Literal["prompt", "batch"] = "prompt"
    options: PlugInOptions = Field(default_factory=dict)
    selection: SelectionConfig = SelectionConfig()

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
    name: str | None = None
    index: IndexPath
    count: int = Field(ge=1)


class WarmStartConfig(Section):
    """Demonstrations written from gold passages through the real retriever, then supervised training on them."""

    sources: list[DemonstrationSource] = Field(min_length=1)
    out: LocalPath = "starter"
    epochs: int = Field(1, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    batch: int = Field(8, ge=1)
    threads: int = Field(2, ge=1)


class RayConfig(Section):
    """`address` null starts a cluster on this machine and ends it with the run; "auto" joins the one that runs here."""

    address: str | None = None


Logger = Literal["tensorboard", "wandb", "mlflow", "trackio", "jsonl"]
"""Where the metrics of a run are shown: by the name of the Python package, and jsonl for `metrics.jsonl`."""


class Config(Section):
    """Everything that a run depends on. `cpu_config` names the config to use instead where there is no GPU.

    `logging` lists where metrics are shown beside `metrics.jsonl`, which every run writes; see `agentrl.training.loggers`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=2**32)
    run_dir: LocalPath = "runs"
    device: Literal["cpu", "cuda"] = "cpu"
    cpu_config: str | None = None
    model: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    retriever: RetrieverConfig | None = None
    agent: AgentConfig = AgentConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: list[RewardConfig] = Field([RewardConfig()], min_length=1)
    advantages: AdvantagesConfig = AdvantagesConfig()
    training: TrainingConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: list[Logger] = Field(default_factory=lambda: ["tensorboard"])
    warmstart: WarmStartConfig | None = None
    ray: RayConfig = RayConfig()

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
