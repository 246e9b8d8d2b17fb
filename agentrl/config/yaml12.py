"""YAML as configurations are written: the core schema of YAML 1.2, in which numbers are decimal, and each key once.

PyYAML speaks YAML 1.1, where `010` is 8, `1:30` is 90, `on` is true, `2026-11-27` is a date and `1e-5` is text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

_RESOLVERS = [
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
]

_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        try:
            return int(node.value)
        except ValueError as error:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a number of too many digits") from error

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Here, because `<<` may bring keys that the mapping itself has, and means them to be replaced.
        first: dict[Hashable, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                raise yaml.YAMLError(
                    f"`{key.value}` is set in line {first[key.value]} and again in line {line}; keep one"
                )
            first[key.value] = line
        super().flatten_mapping(node)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Only between double quotes does PyYAML escape Unicode's line breaks, which it would read back as blanks.
        style = '"' if _LINE_BREAKS.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
for _tag, _pattern, _first in _RESOLVERS:
    _resolver = (f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"))
    _Loader.add_implicit_resolver(*_resolver, [*_first, ""] if _tag == "null" else list(_first))
    _Dumper.add_implicit_resolver(*_resolver, list(_first))


def parse_yaml(text: str) -> Any:
    """Parse a document. Raises yaml.YAMLError, also where a mapping has a key twice."""
    return yaml.load(text, _Loader)


def parse_value(text: str) -> Any:
    """Parse a value that stands on a command line.

    Raises:
        yaml.YAMLError: if it is no YAML, or if YAML would drop a part of it as a comment or read a colon as a mapping's.
    """
    node = yaml.compose(text, _Loader)
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        raise yaml.YAMLError(
            "put text that holds `: ` or begins with `- ` in quotes, and write mappings as {key: value}"
        )
    if text[node.end_mark.index if node is not None else 0 :].strip():
        raise yaml.YAMLError("YAML takes what follows # for a comment; put text that holds one in quotes")
    return parse_yaml(text)


def write_yaml(tree: Any) -> str:
    """Write a tree of plain values as a document that `parse_yaml` reads back as the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
