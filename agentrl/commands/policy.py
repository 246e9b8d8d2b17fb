"""What the commands that only run a policy share: checking what they are given, and the engines that hold the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agentrl.adapters import adapter_folder
from agentrl.config import Config, ConfigError, with_setting
from agentrl.data.inputs import check_index, evaluation_questions
from agentrl.progress import Progress
from agentrl.quantization import check_quantization
from agentrl.training.policy import saved_files
from agentrl.types import Question

if TYPE_CHECKING:
    from agentrl.rollout.cluster import Cluster
    from agentrl.rollout.local import LocalPool
    from agentrl.rollout.pool import RolloutPool


def with_adapter(config: Config, adapter: str | None) -> Config:
    """Return the config with `adapter` as `model.adapter`; None leaves the config's own."""
    if adapter is None:
        return config
    return with_setting(config, "model.adapter", adapter, source="--adapter")


def prepare(
    config: Config,
    adapter: str | None,
    files: Sequence[str],
    limit: int | None,
    purpose: str,
    *,
    with_gold: bool = False,
    rewarded: bool = False,
) -> tuple[Config, list[Question]]:
    """Check adapter, questions and index before anything starts; return the config with `adapter`, and the questions.

    The questions are all of each of `files`, or the first `limit` of each; without files, those of `data.eval`. `purpose`
    completes the error "nothing to …" where there is no question. `with_gold` asks that each names its gold passages,
    `rewarded` that each has what the config's rewards read. What a config names by import path was checked when it was loaded.

    Raises:
        AgentRLError, RetrieverError: for missing or unsound inputs.
    """
    config = with_adapter(config, adapter)
    config.require("retriever")
    rewards = config.reward if rewarded else ()
    questions = evaluation_questions(config.data, files, limit, with_gold=with_gold, rewards=rewards)
    if not questions:
        raise ConfigError(f"nothing to {purpose}: give --questions FILE, or set data.eval in the config")
    if config.ray.address is None:
        check_quantization(config, trains=False)
    adapter_folder(config)
    check_index(config)
    return config, questions


@contextmanager
def started(config: Config, on_progress: Callable[[Progress], None]) -> Iterator[Cluster]:
    """Start the cluster with the config's adapter on its engines, and stop it at the end of the block.

    Raises:
        AgentRLError, RetrieverError: if a part does not start, or the adapter is unsound.
    """
    # Ray takes seconds to import, and most mistakes are found before it is needed.
    from agentrl.rollout.cluster import cluster

    start = adapter_folder(config)
    with cluster(config, lambda phase: on_progress(Progress(0, f"starting {phase}", 0, 0))) as running:
        if start is not None:
            running.pool.publish(0, saved_files(config, start))
        yield running


@contextmanager
def started_here(config: Config, on_progress: Callable[[Progress], None]) -> Iterator[LocalPool]:
    """Start what `started` starts in this process, without Ray, and with transformers in place of vLLM.

    Raises:
        AgentRLError, RetrieverError: as `started`.
    """
    from agentrl.rollout.local import local_config, local_pool

    start = adapter_folder(config)
    with local_pool(local_config(config), lambda phase: on_progress(Progress(0, f"starting {phase}", 0, 0))) as pool:
        if start is not None:
            pool.publish(0, saved_files(config, start))
        yield pool


@contextmanager
def sampling_pool(
    config: Config, on_progress: Callable[[Progress], None], quick: bool
) -> Iterator[RolloutPool | LocalPool]:
    """Start the pool of `started`, or with `quick` of `started_here`, and stop it at the end of the block."""
    if quick:
        with started_here(config, on_progress) as pool:
            yield pool
    else:
        with started(config, on_progress) as running:
            yield running.pool
