"""Reads a corpus, in the format of Pyserini and Search-R1.

It is a file of JSON lines, each `{"id": "...", "contents": "\\"Title\\"\\ntext"}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from retrievers.base import RetrieverError

MAX_LINE_BYTES = 16 << 20
"""A longer line is refused, so that a file without line breaks cannot fill the memory."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One line of a corpus. `contents` is `"Title"` in double quotes, a line break, then the text."""

    id: str
    contents: str


class CorpusReader:
    """Streams and validates a corpus file; afterwards `sha256` and `count` describe what was read.

    Memory grows by about 100 bytes a passage, because ids must be known to find duplicates.

    Attributes:
        sha256: hex digest of the file's bytes; empty until the file was read to its end.
        count: passages read so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = ""
        self.count = 0

    def __iter__(self) -> Iterator[Passage]:
        """Yield the passages in the file's order.

        Raises:
            RetrieverError: if the file is missing or empty, or a line is not valid; names file and line.
        """
        if not self.path.is_file():
            raise RetrieverError(f"corpus {self.path} is not a file; give the path of a JSON-lines file of passages")
        self.sha256, self.count = "", 0
        digest = hashlib.sha256()
        first_line: dict[str, int] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(_lines(file, self.path), 1):
                digest.update(line)
                passage = _parse(line, f"{self.path}:{number}")
                if passage.id in first_line:
                    raise RetrieverError(
                        f"{self.path}:{number}: id {passage.id!r} stands on line {first_line[passage.id]} already; "
                        "give every passage its own id"
                    )
                first_line[passage.id] = number
                self.count = number
                yield passage
        if self.count == 0:
            raise RetrieverError(f"corpus {self.path} is empty; it needs at least one passage")
        self.sha256 = digest.hexdigest()


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The file's lines. Raises RetrieverError at one of more than MAX_LINE_BYTES, of which no more is read."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise RetrieverError(
                f"{path}:{number}: longer than {MAX_LINE_BYTES} bytes; write one passage on each line, and cut long ones"
            )
        yield line


def _parse(line: bytes, where: str) -> Passage:
    """Turn one line into a passage. Raises RetrieverError that begins with `where`."""
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RetrieverError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RetrieverError(f"{where}: not JSON ({error}); write one JSON object on each line") from error
    if not isinstance(record, dict):
        raise RetrieverError(f'{where}: not a JSON object; write {{"id": "...", "contents": "..."}}')
    return Passage(_text(record, "id", where), _text(record, "contents", where))


def _text(record: dict[str, object], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        found = "missing" if key not in record else f"a {type(value).__name__}"
        raise RetrieverError(f"{where}: {key!r} is {found}; it must be a string")
    # Java counts every character up to the space as blank, Python every Unicode space: what either calls empty, is.
    if all(character <= " " or character.isspace() for character in value):
        raise RetrieverError(f"{where}: {key!r} is empty; remove the line or fill it in")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RetrieverError(
            f"{where}: {key!r} holds half a surrogate pair; remove it, no index can store it"
        ) from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    # Python reads NaN and Infinity, which are not JSON and which the indexer refuses.
    raise ValueError(f"{name} is not JSON")
