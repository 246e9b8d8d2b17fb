"""What may be different when a run goes on: settings that do not touch what was trained, and no question or passage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from agentrl.advantages.schedule import Schedule, make_rule
from agentrl.config import Config
from agentrl.runs.files import RunError

Inputs = Mapping[str, Mapping[str, Any]]
"""The files that a run reads, by the key of the config that names each: its `path`, and what tells its contents apart."""

MAY_CHANGE = (
    "name",
    "run_dir",
    "cpu_config",
    "data.root",
    "engine",
    "evaluation",
    "logging",
    "model.adapter",
    "ray",
    "retriever.cache",
    "retriever.cache_mib",
    "retriever.gpus",
    "retriever.record",
    "retriever.retries",
    "retriever.timeout_seconds",
    "retriever.token_env",
    "rollout.episode_timeout_seconds",
    "rollout.failure_window_seconds",
    "rollout.max_failed_share",
    "rollout.max_failures",
    "rollout.reward_timeout_seconds",
    "rollout.workers",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.steps",
    "training.threads",
    "training.watch",
)
"""Settings, and sections of them, that a resumed run may have another value of. They decide where, how fast and how long
it runs. `training.steps` may grow, unless something is scheduled over the whole of the run. `model.adapter` may lie in
another folder: its weights are among the inputs."""


def changed_settings(recorded: Config, given: Config, place: str) -> list[str]:
    """Return the settings that are different now, each as `key: before -> now`.

    Args:
        recorded: the configuration of the run so far, which `place` holds.
        given: the one to go on with.
        place: named in errors.

    Raises:
        RunError: if one of them must not be; the message names each.
    """
    before, now = flat_settings(recorded), flat_settings(given)
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    changes = {key: f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys}
    fixed = [key for key in keys if not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)]
    if fixed:
        raise RunError(
            "\n  ".join(
                [
                    f"{place}: a run keeps the settings that it was trained with, and these differ; resume with the same "
                    "ones, or start a new run under another name",
                    *(changes[key] for key in fixed),
                ]
            )
        )
    if "training.steps" in keys:
        _check_steps(recorded, given, place)
    return list(changes.values())


def check_inputs(recorded: Inputs, given: Inputs) -> None:
    """Raise RunError if a file has other contents than when the run began; the message names it.

    Nothing can be said of a run that took no note of its inputs.
    """
    for key in sorted(recorded.keys() | given.keys()) if recorded else ():
        if key not in recorded or key not in given:
            where = "began with none" if key in given else f"began with {recorded[key]['path']}, and none is given now"
            raise RunError(f"{key}: the run {where}; resume with the same one, or start a new run under another name")
        before, now = recorded[key], given[key]
        for what in before.keys() - {"path"}:
            if before[what] != now.get(what):
                raise RunError(
                    f"{now['path']} ({key}) is not what the run began with: its {what} was {before[what]} and is "
                    f"{now.get(what)}; bring it back, or start a new run under another name"
                )


def _check_steps(recorded: Config, given: Config, place: str) -> None:
    before, now = recorded.training.steps, given.training.steps
    if now < before:
        raise RunError(f"{place}: training.steps can grow when a run is resumed, and {now} is less than {before}")
    scheduled = list(_scheduled(given))
    if scheduled:
        raise RunError(
            f"{place}: training.steps cannot grow from {before} to {now}: {' and '.join(scheduled)} is scheduled over the "
            "whole of the run, so the steps that were taken would have been others; start a new run under another name, "
            "with what this one has trained as model.adapter or model.path"
        )


def _scheduled(config: Config) -> Iterator[str]:
    """Yield what has a value that depends on the number of steps of the run."""
    if config.training.schedule in ("linear", "cosine"):
        yield f"training.schedule {config.training.schedule}"
    for option, value in config.advantages.options.items():
        if isinstance(value, Mapping) and isinstance(make_rule(option, value), Schedule):
            yield f"advantages.options.{option}"


def flat_settings(config: Config) -> dict[str, Any]:
    """Return the settings of a configuration by dotted key, with numbers for the places in lists."""
    return dict(_leaves(config.model_dump(mode="json")))


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not children:
        yield key, tree
    for name, child in children:
        yield from _leaves(child, f"{key}.{name}" if key else str(name))
