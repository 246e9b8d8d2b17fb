"""Paths in a configuration: made absolute once, when it is read, since Ray's processes have working directories of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from retrievers.models import WHEEL_PREFIX, is_hub_name

if TYPE_CHECKING:
    from agentrl.config.sections import Config


def absolute(path: str) -> str:
    """Return a path as it is meant here: `~` is the user's folder, and what is relative lies under the working directory."""
    return str(Path(path).expanduser().absolute())


def packaged(name: str) -> Path:
    """Return a folder that agentrl brings along (configs, pocket_policy, starter), in the package or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def model_path(path: str) -> str:
    """Return the folder of a model as an absolute path, and `wheel:PACKAGE` or a hub name `owner/name` as it is.

    A folder that is there goes before a hub name of the same spelling, and before `pocket_policy`, the packaged one.
    """
    pocket = packaged("pocket_policy")
    if path == pocket.name and not Path(path).is_dir():
        return str(pocket)
    return path if path.startswith(WHEEL_PREFIX) or is_hub_name(path) else absolute(path)


def _adapter(path: str) -> str:
    starter = packaged("starter")
    return str(starter) if path == starter.name and not Path(path).is_dir() else model_path(path)


def _index(index: str) -> str:
    return index if index.startswith("prebuilt:") else os.path.expanduser(index)


LocalPath = Annotated[str, AfterValidator(absolute)]
"""A path on this machine."""

DataPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path on this machine or under `data.root`, where `DataConfig.resolve` finds it."""

IndexPath = Annotated[str, AfterValidator(_index)]
"""A DataPath, or `prebuilt:NAME`."""

ModelPath = Annotated[str, AfterValidator(model_path)]
"""A folder on this machine; where there is none, a hub name `owner/name`, `wheel:PACKAGE`, or the packaged `pocket_policy`."""

AdapterPath = Annotated[str, AfterValidator(_adapter)]
"""As ModelPath; `starter` is the packaged adapter where there is no such folder."""


def missing_folders(config: Config) -> Iterator[str]:
    """Yield one message for each model or adapter that is meant to be a folder of this machine and is none."""
    named = {"model.path": config.model.path, "model.adapter": config.model.adapter}
    if config.retriever is not None:
        if config.retriever.rerank is not None:
            named["retriever.rerank.model"] = config.retriever.rerank.model
        for number, index in enumerate(config.retriever.indexes):
            section = "retriever" if number == 0 else f"retriever.fuse.{number - 1}"
            named[f"{section}.options.model"] = index.options.get("model")
    for key, path in named.items():
        if isinstance(path, str) and Path(path).is_absolute() and not Path(path).is_dir():
            yield f"{key}: no folder {path}; give a folder, a hub name owner/name, or wheel:PACKAGE"
