"""Whether a process of Ray sees the cards that it asked for, and no others."""

from __future__ import annotations

import os
from collections.abc import Sequence

import ray

from agentrl.config import Config, ConfigError


def engines_need_gpus(config: Config) -> bool:
    """Whether the engines compute on GPUs of the machines that run them."""
    return config.device == "cuda" and config.engine.kind != "openai"


def check_granted(who: str, gpus: float) -> None:
    """Raise ConfigError unless this process of Ray has the cards that it asked for, and CUDA is shown no others.

    Otherwise engine and trainer would both compute on the first card of the machine, whoever it was given to.

    Args:
        who: names the process in the error.
        gpus: what it asked for, whole cards or a share of one.
    """
    granted = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    problem = granted_problem(granted, os.environ.get("CUDA_VISIBLE_DEVICES"), gpus)
    if problem is not None:
        raise ConfigError(f"{who} {problem}")


def granted_problem(granted: Sequence[str], visible: str | None, gpus: float) -> str | None:
    """Return what is wrong with the cards of a process, and what to do; None if nothing is.

    Args:
        granted: the names of the cards that Ray gave it.
        visible: its CUDA_VISIBLE_DEVICES, None without one.
        gpus: see `check_granted`.
    """
    wanted = max(1, int(gpus))
    if len(granted) != wanted:
        return (
            f"asked Ray for {gpus:g} GPU(s) and was given {len(granted)} ({', '.join(granted) or 'none'}); check that "
            "`ray status` lists the GPUs of every machine"
        )
    shown = [] if visible is None else visible.split(",")
    if sorted(shown) != sorted(granted):
        return (
            f"was given GPU {', '.join(granted)} by Ray, and CUDA_VISIBLE_DEVICES shows it "
            f"{'every GPU' if visible is None else visible or 'none'}; start Ray without "
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
        )
    return None
