"""Finding and reading a configuration: YAML, dotted overrides, and errors that name the key."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from agentrl.config.base import ConfigError
from agentrl.config.paths import missing_folders, packaged
from agentrl.config.sections import Config
from retrievers.names import did_you_mean


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number, as YAML 1.2 does; PyYAML's YAML 1.1 takes it for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse YAML in which 1e-5 is a number. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def packaged_configs() -> dict[str, Path]:
    """Return the packaged configs by file name."""
    return {path.name: path for path in sorted(packaged("configs").glob("*.yaml"))}


def find_config(name: str) -> Path:
    """Return the file for a path or for the name of a packaged config.

    Raises:
        ConfigError: if there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = packaged_configs()
    for candidate in (name, f"{name}.yaml"):
        if candidate in known:
            return known[candidate]
    raise ConfigError(
        f"no config file {name!r}, and no packaged one of that name (there are: {', '.join(known)})"
        f"{did_you_mean(name, known)}"
    )


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a config by path or packaged name and apply `a.b=value` overrides, whose values are YAML.

    Raises:
        ConfigError: if the file is missing or not YAML, a key is unknown, a value has the wrong type, or the settings
            contradict one another.
    """
    path = find_config(name)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, found {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    config = parse_config(tree, source=str(path))
    _check_folders(config, source=str(path))
    return config


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Validate a nested mapping and make its paths absolute. `source` is named in errors.

    Raises:
        ConfigError: as `load_config`, except that models and adapters need not be on this machine.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _problems(source, map(_describe, error.errors())) from error


def with_setting(config: Config, key: str, value: Any, source: str) -> Config:
    """Return the config with another value of `key`, such as `model.adapter`, checked as `load_config` does.

    Raises:
        ConfigError: as `load_config`; `source` is named in errors.
    """
    tree = config.model_dump(mode="json")
    *parents, last = key.split(".")
    functools.reduce(dict.__getitem__, parents, tree)[last] = value
    changed = parse_config(tree, source)
    _check_folders(changed, source)
    return changed


def _check_folders(config: Config, source: str) -> None:
    if missing := list(missing_folders(config)):
        raise _problems(source, missing)


def _problems(source: str, problems: Iterable[str]) -> ConfigError:
    lines = [f"  {problem}" for problem in problems]
    return ConfigError("\n".join([f"{source}: {len(lines)} problem(s) in the configuration", *lines]))


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write it as key=value, such as training.steps=8")
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]), override)
    if isinstance(node, list):
        node[_position(node, last, key, override)] = parsed
    else:
        node[last] = parsed


def _child(node: Any, part: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, path, override)]
    child = node.get(part)
    if child is None:
        child = node[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {override!r}: `{path}` is a single value, not a section")
    return child


def _position(node: list[Any], part: str, path: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {override!r}: `{path}` must be an index from 0 to {len(node) - 1}")
    return int(part)


def _describe(problem: Any) -> str:
    location = problem["loc"]
    key = ".".join(str(part) for part in location) or "(top level)"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{did_you_mean(str(location[-1]), _known_keys(location[:-1]))}"
    if problem["type"] == "missing":
        return f"{key}: missing; set it"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    return f"{key}: {message}" + ("" if isinstance(given, dict) else f" (got {given!r})")


def _known_keys(location: Sequence[Any]) -> list[str]:
    model: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
