"""Settings that a command line changes: `training.steps=8`, `data.train.0.weight=2`, `agent.instruction=Use # for numbers`."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from agentrl.config.agent import ToolConfig
from agentrl.config.base import ConfigError
from agentrl.config.sections import Config
from agentrl.config.yaml12 import parse_value


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the value of `key=value` in a nested mapping; sections that are missing are made.

    Where the key takes text, the value is taken as it stands; elsewhere it is YAML. Quotes, `null` and nothing at all mean
    what they mean in YAML in either case.

    Raises:
        ConfigError: if it is written otherwise, or does not lead to a setting. The message holds the override.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write it as key=value, such as training.steps=8")
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]), override)
    node[_position(node, last, key, override) if isinstance(node, list) else last] = _parse(key, value, override)


def known_keys(location: Sequence[Any]) -> list[str]:
    """Return the keys of the section at `location`, or none where there is no section."""
    return [key for model in _kinds_at(location) if issubclass(model, BaseModel) for key in model.model_fields]


def _parse(key: str, value: str, override: str) -> Any:
    kinds = _kinds_at(key.split("."))
    text_alone = str in kinds and kinds <= {str, list, type(None)}
    if text_alone and not value.lstrip().startswith(('"', "'", "[" if list in kinds else '"')):
        return None if value in ("", "null", "~") and type(None) in kinds else value
    try:
        return parse_value(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _child(node: Any, part: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        position = _position(node, part, path, override)
        if isinstance(node[position], str) and ToolConfig in _kinds_at(path.split(".")):
            # A tool that stands there by its name alone.
            node[position] = {"kind": node[position]}
        if not isinstance(node[position], (dict, list)):
            raise ConfigError(f"override {override!r}: `{path}` is a single value, not a section")
        return node[position]
    child = node.get(part)
    if child is None:
        child = node[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {override!r}: `{path}` is a single value, not a section")
    return child


def _position(node: list[Any], part: str, path: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"override {override!r}: `{path}` must be an index from 0 to {len(node) - 1}")
    return int(part)


def _kinds_at(location: Sequence[Any]) -> set[type]:
    """Return the classes that a value at `location` may be of; none where the configuration has no such place."""
    found: set[Any] = {Config}
    for part in location:
        inner: set[Any] = set()
        for kind in found:
            if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
                inner.add(kind.model_fields[part].annotation)
            elif get_origin(kind) is list:
                inner.add(get_args(kind)[0])
            elif get_origin(kind) is dict:
                inner.add(get_args(kind)[1])
        found = set().union(*map(_alternatives, inner))
    return {get_origin(kind) or kind for kind in found} - {Any} | ({object} if Any in found else set())


def _alternatives(annotation: Any) -> set[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(_alternatives, get_args(annotation)))
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {annotation}
