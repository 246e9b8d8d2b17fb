"""Reads a corpus: a file of JSON lines in the format of Pyserini and Search-R1, or in one of its common variants.

The format is `{"id": "...", "contents": "\\"Title\\"\\ntext"}` on each line. Also read are `docid` and `_id` for `id`, a whole
number as an id, `title` and `text` for `contents`, blank lines, a byte-order mark, and a file packed with gzip, bzip2 or xz.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from retrievers.base import ID_KEYS, RetrieverError, titled

MAX_LINE_BYTES = 16 << 20
"""A longer line is refused, so that a file without line breaks cannot fill the memory."""

_UNPACKERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_UNPACK_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)

# What else people call a corpus, by its first bytes.
_REFUSED = {
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it with `zstd -d`",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "a Parquet file; write its rows as JSON lines",
    b"ARROW1": "an Arrow file; write its rows as JSON lines",
    codecs.BOM_UTF16_LE: "UTF-16; convert the file to UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; convert the file to UTF-8",
    b"[": "a JSON array; write one object on each line, for instance with `jq -c '.[]'`",
}
_HEAD_BYTES = 8


@dataclass(frozen=True, slots=True)
class Passage:
    """One line of a corpus. `contents` is `"Title"` in double quotes, a line break, then the text."""

    id: str
    contents: str


class CorpusReader:
    """Streams and validates a corpus file; afterwards its attributes describe what was read.

    Memory grows by about 100 bytes a passage, because ids must be known to find duplicates.

    Attributes:
        sha256: hex digest of the file's bytes, unpacked; empty until the file was read to its end.
        count: passages read so far.
        plain: whether the file so far is one that Pyserini's JsonCollection reads to the same passages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = ""
        self.count = 0
        self.plain = True

    def __iter__(self) -> Iterator[Passage]:
        """Yield the passages in the file's order.

        Raises:
            RetrieverError: if the file is missing, empty or of another form, or a line is invalid; names file and line.
        """
        if not self.path.is_file():
            raise RetrieverError(f"corpus {self.path} is not a file; give the path of a JSON-lines file of passages")
        with self.path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        unpack = next((unpack for magic, unpack in _UNPACKERS.items() if head.startswith(magic)), None)
        self.sha256, self.count, self.plain = "", 0, unpack is None
        digest = hashlib.sha256()
        first_line: dict[str, int] = {}
        with self.path.open("rb") if unpack is None else unpack(self.path) as file:
            _check_form(file, self.path)
            for number, line in enumerate(_lines(file, self.path), 1):
                digest.update(line)
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    self.plain, line = False, line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    self.plain = False
                    continue
                passage, plain = _parse(line, f"{self.path}:{number}")
                self.plain &= plain
                if passage.id in first_line:
                    raise RetrieverError(
                        f"{self.path}:{number}: id {passage.id!r} stands on line {first_line[passage.id]} already; "
                        "give every passage its own id"
                    )
                first_line[passage.id] = number
                self.count += 1
                yield passage
        if self.count == 0:
            raise RetrieverError(f"corpus {self.path} is empty; it needs at least one passage")
        self.sha256 = digest.hexdigest()


def _check_form(file: Any, path: Path) -> None:
    """Raise RetrieverError if a file, open and unpacked, begins as one of another form does."""
    try:
        head = file.peek(_HEAD_BYTES)
    except _UNPACK_ERRORS as error:
        raise RetrieverError(f"{path} cannot be unpacked ({error}); the file is damaged") from error
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise RetrieverError(f"corpus {path} is {what}")


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """The file's lines. Raises RetrieverError at one of more than MAX_LINE_BYTES, of which no more is read."""
    number = 0
    while line := _next_line(file, f"{path}:{number + 1}"):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise RetrieverError(
                f"{path}:{number}: longer than {MAX_LINE_BYTES} bytes; write one passage on each line, and cut long ones"
            )
        yield line


def _next_line(file: IO[bytes], where: str) -> bytes:
    try:
        return file.readline(MAX_LINE_BYTES + 1)
    except _UNPACK_ERRORS as error:
        raise RetrieverError(f"{where}: cannot be read ({error}); the file is damaged or not whole") from error


def _parse(line: bytes, where: str) -> tuple[Passage, bool]:
    """Turn one line into a passage; also return whether it has the plain form. Raises RetrieverError with `where`."""
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RetrieverError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RetrieverError(f"{where}: not JSON ({error}); write one JSON object on each line") from error
    if not isinstance(record, dict):
        raise RetrieverError(f'{where}: not a JSON object; write {{"id": "...", "contents": "..."}}')
    passage = Passage(_id(record, where), _contents(record, where))
    return passage, record.get("id") == passage.id and "contents" in record


def _id(record: dict[str, object], where: str) -> str:
    key = next((key for key in ID_KEYS if key in record), None)
    if key is None:
        raise RetrieverError(f"{where}: 'id' is missing; give each passage an id, as {' or '.join(ID_KEYS)}")
    value = record[key]
    return str(value) if type(value) is int else _text(value, key, where)


def _contents(record: dict[str, object], where: str) -> str:
    if "contents" in record:
        return _text(record["contents"], "contents", where)
    if "text" not in record:
        raise RetrieverError(f"{where}: 'contents' is missing; write contents, or title and text")
    title = record.get("title")
    return titled(_text(title, "title", where, may_be_empty=True), _text(record["text"], "text", where))


def _text(value: object, key: str, where: str, *, may_be_empty: bool = False) -> str:
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise RetrieverError(f"{where}: {key!r} is a {type(value).__name__}; it must be a string")
    # Java counts every character up to the space as blank, Python every Unicode space: what either calls empty, is.
    if not may_be_empty and all(character <= " " or character.isspace() for character in value):
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
