"""The whole configuration of a run as pydantic models, read from YAML with dotted overrides.

    config = load_config("smollm2.yaml", ["training.steps=8", "seed=3"])

A config is found by path or by the name of a packaged one. Its paths become absolute when it is read. Unknown keys, wrong
types, impossible combinations and missing folders of models raise `ConfigError`, whose message holds the key's path and,
for a key, the nearest known one. Importing this module loads neither torch nor Ray.
"""

from agentrl.config.agent import AgentConfig, ToolConfig
from agentrl.config.base import ConfigError, Section
from agentrl.config.engine import EndpointConfig, EngineConfig
from agentrl.config.evaluation import EvaluationConfig
from agentrl.config.loading import find_config, load_config, packaged_configs, parse_config, with_setting
from agentrl.config.model import LoraSettings, ModelConfig
from agentrl.config.retriever import IndexConfig, RerankConfig, RetrieverConfig
from agentrl.config.reward import JUDGE_PROMPT, REWARD_OPTIONS, RewardConfig
from agentrl.config.sections import (
    AdvantagesConfig,
    Config,
    DataConfig,
    DemonstrationSource,
    EpisodesConfig,
    QuestionSet,
    RayConfig,
    RolloutConfig,
    SelectionConfig,
    WarmStartConfig,
)
from agentrl.config.training import ImportanceConfig, KlConfig, LldsConfig, OptimizerConfig, TrainingConfig, WatchConfig

__all__ = [
    "JUDGE_PROMPT",
    "REWARD_OPTIONS",
    "AdvantagesConfig",
    "AgentConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DemonstrationSource",
    "EndpointConfig",
    "EngineConfig",
    "EpisodesConfig",
    "EvaluationConfig",
    "ImportanceConfig",
    "IndexConfig",
    "KlConfig",
    "LldsConfig",
    "LoraSettings",
    "ModelConfig",
    "OptimizerConfig",
    "QuestionSet",
    "RayConfig",
    "RerankConfig",
    "RetrieverConfig",
    "RewardConfig",
    "RolloutConfig",
    "Section",
    "SelectionConfig",
    "ToolConfig",
    "TrainingConfig",
    "WarmStartConfig",
    "WatchConfig",
    "find_config",
    "load_config",
    "packaged_configs",
    "parse_config",
    "with_setting",
]
