"""What a configuration names by an import path or with options of its own, checked before anything is started."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from agentrl.advantages import AdvantageError, check_options, compute, get_estimator, get_stratifier
from agentrl.advantages.schedule import Options
from agentrl.agent.protocols import find_protocol
from agentrl.agent.tools import check_tool
from agentrl.config import AdvantagesConfig, Config, ConfigError, RetrieverConfig
from agentrl.data.inputs import read_set
from agentrl.registry import call_problem, look_up
from agentrl.rewards import REWARDS, RewardError, Rewards
from agentrl.rewards.trial import MADE_QUESTION, try_reward
from agentrl.types import End, FailureCause, Question, Trajectory
from retrievers.base import RetrieverError
from retrievers.clients.wire import load_format
from retrievers.secrets import check_no_literal_key


def check_plug_ins(config: Config) -> None:
    """Import the estimator, stratifiers, protocol, tools, rewards and retriever that a config names, and try their options.

    Nothing is loaded or connected to: a retriever and a protocol are only asked whether they can be called so. A reward of
    the user's own is called, on made episodes of the first question of the config's question sets.

    Raises:
        ConfigError: if one cannot be imported, cannot be called as agentrl calls it, or does not take its options. The
            message begins with the key.
        DataError: if the first question for a reward of the user's own cannot be read.
    """
    _check_advantages(config.advantages)
    for tool in config.agent.tools:
        check_tool(tool)
    _check_call("agent.protocol", config.agent.protocol, find_protocol(config.agent.protocol), config.agent, None, [])
    _check_keys(config)
    _check_rewards(config)
    if config.retriever is not None:
        _check_retriever(config.retriever)


def _check_keys(config: Config) -> None:
    """Refuse keys that stand in the config, which is written into run folders."""
    try:
        for name, section in (("retriever", config.retriever), ("engine", config.engine)):
            check_no_literal_key({} if section is None else section.model_dump(), name)
        check_no_literal_key([reward.model_dump() for reward in config.reward], "reward")
    except RetrieverError as error:
        raise ConfigError(str(error)) from error


def _check_rewards(config: Config) -> None:
    seconds = config.rollout.reward_timeout_seconds
    for number, settings in enumerate(config.reward):
        try:
            if settings.kind in REWARDS:
                Rewards([settings], seconds)
            else:
                try_reward(settings, seconds, _first_question(config))
        except (RewardError, ConfigError) as error:
            raise ConfigError(f"reward.{number}: {error}") from error


def _first_question(config: Config) -> Question:
    for questions in (*config.data.train, *config.data.eval):
        # What is missing is named by the command that needs it.
        if config.data.resolve(questions.path).is_file():
            return read_set(config.data, questions, limit=1)[0]
    return MADE_QUESTION


def _check_retriever(settings: RetrieverConfig) -> None:
    if settings.target is not None:
        target = look_up(settings.target, {}, "retriever", _at("retriever.target"))
        _check_call("retriever.options", settings.target, target, **settings.options)
    if settings.wire is not None:
        try:
            load_format(settings.wire)
        except RetrieverError as error:
            raise ConfigError(f"retriever.wire: {error}") from error


def _check_advantages(settings: AdvantagesConfig) -> None:
    """Try estimator and stratifier on episodes without a turn, which training meets too: those that failed at once."""
    try:
        estimator = get_estimator(settings.estimator)
    except AdvantageError as error:
        raise ConfigError(f"advantages.estimator: {error}") from error
    try:
        check_options(settings.estimator, estimator, settings.options)
        ends = Options(settings.options).ends()
    except AdvantageError as error:
        raise ConfigError(f"advantages.options: {error}") from error
    stratum = _stratum_of_a_failed_episode(settings)
    # Options that have a rule are tried at its start and at its end.
    for options in ends:
        past: list[Mapping[str, float]] = []
        try:
            # Twice, because an estimator may learn from what it noted the first time.
            for _ in range(2):
                tried = compute(
                    [0.0, 1.0],
                    groups=[0, 0],
                    strata=[stratum, stratum],
                    estimator=settings.estimator,
                    lengths=[1, 1],
                    turn_rewards=[[0.0], [0.0]],
                    anchors=[[""], [""]],
                    scope=settings.scope,
                    past=past,
                    **options,
                )
                past.append(tried.notes)
        except AdvantageError as error:
            raise ConfigError(
                f"advantages.estimator: {settings.estimator} with advantages.options {options}: {error}"
            ) from error


def _stratum_of_a_failed_episode(settings: AdvantagesConfig) -> Hashable:
    try:
        stratifier = get_stratifier(settings.stratum)
    except AdvantageError as error:
        raise ConfigError(f"advantages.stratum: {error}") from error
    question = Question("q", "?", ("",))
    failed = Trajectory("1/0/0", question, (), (), End.ENVIRONMENT_FAILURE, cause=FailureCause.WORKER)
    try:
        return stratifier([failed])[0]
    except AdvantageError as error:
        raise ConfigError(
            f"advantages.stratum: {settings.stratum} was tried on an episode without a turn: {error}"
        ) from error


def _check_call(key: str, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    problem = call_problem(function, *arguments, **options)
    if problem is not None:
        raise ConfigError(f"{key}: {name} cannot be called so: {problem}")


def _at(key: str) -> Callable[[str], ConfigError]:
    return lambda message: ConfigError(f"{key}: {message}")
