"""Finding and reading a configuration, with errors that name the key."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from agentrl.config.base import ConfigError
from agentrl.config.overrides import apply_override, known_keys
from agentrl.config.paths import missing_folders, packaged
from agentrl.config.sections import Config
from agentrl.config.yaml12 import parse_yaml
from retrievers.names import did_you_mean
from retrievers.secrets import find_literal_key


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
    """Read a config by path or packaged name and apply overrides, see `agentrl.config.overrides`.

    A file with the key `extends` changes the config that it names, a path as seen from that file or a packaged config:
    sections are joined key by key, and any other value, such as a list or the options of an estimator, replaces the one there.

    Raises:
        ConfigError: if the file is missing or not YAML, a key is unknown or set twice, a value has the wrong type, the
            settings contradict one another, a config extends itself, or the folder of a model or adapter is not there.
    """
    path, read = find_config(name), list[Path]()
    tree = _read_extended(path, read)
    for override in overrides:
        apply_override(tree, override)
    source = str(path) + (f", which extends {' and '.join(map(str, read[1:]))}" if len(read) > 1 else "")
    config = parse_config(tree, source)
    _check_folders(config, source)
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


def _read_extended(path: Path, read: list[Path]) -> dict[str, Any]:
    """Read a file and what it extends, and add the files to `read`."""
    tree = _read(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top, found {type(tree).__name__}")
    read.append(path.resolve())
    if "extends" not in tree:
        return tree
    named = tree.pop("extends")
    if not isinstance(named, str):
        raise ConfigError(f"{path}: extends: must be the path or the name of one config (got {named!r})")
    base = path.parent / Path(named).expanduser()
    if not base.is_file() or base.resolve() == read[-1]:
        # A config may have the name of the packaged one that it extends.
        known = packaged_configs()
        if named not in known:
            raise ConfigError(
                f"{path}: extends: no other config {named!r} beside it, and no packaged one of that name (there are: "
                f"{', '.join(known)}){did_you_mean(named, known)}"
            )
        base = known[named]
    if base.resolve() in read:
        raise ConfigError(f"{path}: extends: {named!r} extends this config in turn; remove `extends` from one of them")
    return _joined(_read_extended(base, read), tree)


def _joined(base: dict[str, Any], changes: Mapping[str, Any], location: Sequence[str] = ()) -> dict[str, Any]:
    """Return `base` with `changes`, both what stands at `location`: sections are joined, any other value is replaced."""
    joined = dict(base)
    for key, value in changes.items():
        below, place = joined.get(key), (*location, key)
        # Options are a mapping too, but belong together.
        is_section = isinstance(below, dict) and isinstance(value, dict) and known_keys(place)
        joined[key] = _joined(below, value, place) if is_section else value
    return joined


def _read(path: Path) -> Any:
    raw = path.read_bytes()
    try:
        return parse_yaml(raw.decode())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}: line {line}: byte 0x{raw[error.start]:02x} is not UTF-8 (byte {error.start + 1} of the file); save the "
            "file as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def _check_folders(config: Config, source: str) -> None:
    if missing := list(missing_folders(config)):
        raise _problems(source, missing)


def _problems(source: str, problems: Iterable[str]) -> ConfigError:
    lines = [f"  {problem}" for problem in problems]
    return ConfigError("\n".join([f"{source}: {len(lines)} problem(s) in the configuration", *lines]))


def _describe(problem: Any) -> str:
    location = problem["loc"]
    key = ".".join(str(part) for part in location) or "(top level)"
    given = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{did_you_mean(str(location[-1]), known_keys(location[:-1]))}"
        case "missing":
            return f"{key}: missing; set it"
        case "string_type" if isinstance(given, bool | int | float):
            return f"{key}: must be text; put {_shown(location, str(given).lower())} in quotes"
        case "model_type" | "dict_type":
            return f"{key}: must be a section of settings, each as `name: value` (got {_shown(location, repr(given))})"
        case "list_type":
            return f"{key}: must be a list, such as [a, b] (got {_shown(location, repr(given))})"
        case "bool_type":
            return f"{key}: must be true or false (got {given!r})"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if isinstance(given, dict) else f" (got {_shown(location, repr(given))})")


def _shown(location: Sequence[Any], given: str) -> str:
    """Return a value as a message may show it: a key that stands in a config by mistake is no part of it."""
    return "a key" if find_literal_key({str(part): given for part in location}) else given
