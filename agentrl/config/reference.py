"""What each setting means, its type and its default, read from the sections: for `agentrl config` and docs/config.md."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agentrl.config.base import ConfigError
from agentrl.config.reward import REWARD_OPTIONS
from agentrl.config.sections import Config
from retrievers.names import did_you_mean

_BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        key: as a command line names it; `N` stands for a position in a list.
        type: what may stand there, such as `a | b` or `number, at least 1`.
        default: as YAML writes it, or "" where there is none.
        meaning: in words.
    """

    key: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True)
class SectionPart:
    """A section: its key, which is "" for the whole configuration, what it is about, and its settings."""

    key: str
    meaning: str
    settings: tuple[Setting, ...]


def sections() -> list[SectionPart]:
    """Return all sections, each before those within it; the options of rewards stand under `reward.N.options`."""
    found = list(_sections(Config, ""))
    place = next(i for i, part in enumerate(found) if part.key == "reward.N") + 1
    options = [
        next(_sections(model, f"reward.N.options ({kind})"))
        for kind, model in REWARD_OPTIONS.items()
        if model.model_fields
    ]
    return found[:place] + options + found[place:]


def find(key: str) -> SectionPart:
    """Return the section of a key, or the section that a setting is in with that setting alone.

    Positions may be written as they are: `data.train.0.weight` is `data.train.N.weight`.

    Raises:
        ConfigError: if there is no such key.
    """
    parts = sections()
    asked = ".".join("N" if part.isdecimal() else part for part in key.split("."))
    for part in parts:
        if part.key and asked in (part.key, part.key.removesuffix(".N")):
            return part
    for part in parts:
        for setting in part.settings:
            if setting.key == asked:
                return SectionPart(part.key, part.meaning, (setting,))
    known = [setting.key for part in parts for setting in part.settings]
    raise ConfigError(
        f"there is no setting {key!r}{did_you_mean(asked, known, most=3)}; `agentrl config` lists all of them"
    )


def page() -> str:
    """Return the reference as a page of Markdown."""
    lines = [
        "# Settings",
        "",
        "Every setting of a config with its type, its default and what it means. `agentrl config` prints this page and `agentrl",
        "config KEY` one section or setting of it. A command line sets a setting with `key=value`, such as",
        "`training.steps=8` or `data.train.0.weight=2`; `N` stands for a position in a list.",
        "",
        "This page is made by `agentrl config --markdown > docs/config.md`.",
    ]
    for part in sections():
        lines += [
            "",
            f"## {part.key or 'The whole'}",
            "",
            part.meaning,
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| `{setting.key}` | {_escaped(setting.type)} | {f'`{_escaped(setting.default)}`' if setting.default else ''} | "
            f"{_escaped(setting.meaning)} |"
            for setting in part.settings
        ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _sections(model: type[BaseModel], key: str) -> Iterator[SectionPart]:
    prefix = f"{key}." if key else ""
    fields = model.model_fields.items()
    yield SectionPart(
        key, _one_line(inspect.getdoc(model)), tuple(_setting(f"{prefix}{name}", field) for name, field in fields)
    )
    for name, field in fields:
        for inner, is_listed in _models(field.annotation):
            yield from _sections(inner, f"{prefix}{name}{'.N' if is_listed else ''}")


def _models(annotation: Any, is_listed: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """Yield the sections that may stand where a field has this annotation, and whether they stand in a list there."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, is_listed
    for inner in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _models(inner, is_listed or get_origin(annotation) is list)


def _setting(key: str, field: FieldInfo) -> Setting:
    bounds = [
        words.format(value)
        for bound in field.metadata
        for name, words in _BOUNDS.items()
        if (value := getattr(bound, name, None)) is not None
    ]
    return Setting(key, ", ".join([_type(field.annotation), *bounds]), _default(field), _one_line(field.description))


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(_type(one) for one in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true | false", type(None): "null"}
    return names.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    # A section has its defaults in a table of its own, and a text that is found out depends on the machine.
    if field.default_factory is not None and isinstance(value, str):
        return ""
    if isinstance(value, BaseModel) or (isinstance(value, list) and any(isinstance(item, BaseModel) for item in value)):
        return ""
    written = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value or '""'
    return written if len(written) <= 60 else "see the resolved config"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
