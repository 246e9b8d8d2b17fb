"""Reads a corpus: a file of JSON lines in the format of Pyserini and Search-R1, or in one of its common variants.

The format is `{"id": "...", "contents": "\\"Title\\"\\ntext"}` on each line. Also read are `docid` and `_id` for `id`, a whole
number as an id, `title` and `text` for `contents`, blank lines, a byte-order mark, a file that is one JSON array of such
objects, and a file packed with gzip, bzip2 or xz.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from retrievers.base import ID_KEYS, RetrieverError, titled

MAX_LINE_BYTES = 16 << 20
"""A longer line, or element of an array, is refused, so that no file can fill the memory."""

_CHUNK_BYTES = 1 << 20

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
}
_HEAD_BYTES = 8

# A text, or what else gives an array its structure. A quotation mark alone begins a text of which the rest is not read yet.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},"]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Passage:
    """One entry of a corpus. `contents` is `"Title"` in double quotes, a line break, then the text."""

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
            RetrieverError: if the file is missing, empty or of another form, or an entry is invalid; names the file and
                the line, or the element of an array, counted from 1.
        """
        if not self.path.is_file():
            raise RetrieverError(f"corpus {self.path} is not a file; give the path of a file of passages")
        with self.path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        unpack = next((unpack for magic, unpack in _UNPACKERS.items() if head.startswith(magic)), None)
        self.sha256, self.count, self.plain = "", 0, unpack is None
        digest = hashlib.sha256()
        first: dict[str, int] = {}
        with self.path.open("rb") if unpack is None else unpack(self.path) as file:
            is_array = _is_array(file, self.path)
            self.plain &= not is_array
            entries, at, place = (_elements, ": element ", "in element") if is_array else (_lines, ":", "on line")
            for number, entry in enumerate(entries(file, self.path, digest), 1):
                where = f"{self.path}{at}{number}"
                if number == 1 and entry.startswith(codecs.BOM_UTF8):
                    self.plain, entry = False, entry.removeprefix(codecs.BOM_UTF8)
                if not is_array and not entry.strip():
                    self.plain = False
                    continue
                passage, plain = _parse(entry, where)
                self.plain &= plain
                if passage.id in first:
                    raise RetrieverError(
                        f"{where}: id {passage.id!r} stands {place} {first[passage.id]} already; "
                        "give every passage its own id"
                    )
                first[passage.id] = number
                self.count += 1
                yield passage
        if self.count == 0:
            raise RetrieverError(f"corpus {self.path} is empty; it needs at least one passage")
        self.sha256 = digest.hexdigest()


def _is_array(file: Any, path: Path) -> bool:
    """Whether a file, open and unpacked, begins as a JSON array. Raises RetrieverError if it does as one of another form."""
    try:
        head = file.peek(_HEAD_BYTES)
    except _UNPACK_ERRORS as error:
        raise RetrieverError(f"{path} cannot be unpacked ({error}); the file is damaged") from error
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            raise RetrieverError(f"corpus {path} is {what}")
    return head.startswith(b"[")


def _lines(file: IO[bytes], path: Path, digest: Any) -> Iterator[bytes]:
    """The file's lines. Raises RetrieverError at one of more than MAX_LINE_BYTES, of which no more is read."""
    number = 1
    while line := _read(lambda: file.readline(MAX_LINE_BYTES + 1), f"{path}:{number}"):
        _check_length(len(line), f"{path}:{number}")
        digest.update(line)
        yield line
        number += 1


def _elements(file: IO[bytes], path: Path, digest: Any) -> Iterator[bytes]:
    """What stands between the commas of a file's one JSON array, whether or not it is JSON itself.

    Raises:
        RetrieverError: at an element of more than MAX_LINE_BYTES, of which no more is read, or if the array does not end, or
            something follows it.
    """

    def read() -> bytes:
        chunk = _read(lambda: file.read(_CHUNK_BYTES), f"{path}: element {number}")
        digest.update(chunk)
        return chunk

    # Of the element under way: its number, where it begins in `buffer`, and how many brackets are open in it.
    number, begin, depth = 1, 0, 0
    buffer, position = read().partition(b"[")[2], 0
    while True:
        found = _STRUCTURE.search(buffer, position)
        mark = b'"' if found is None else found[0]
        if found is None or mark == b'"':
            _check_length(len(buffer) - begin, f"{path}: element {number}")
            if not (chunk := read()):
                raise RetrieverError(
                    f"{path}: element {number}: the file ends here and its array does not; close what is open, or get the "
                    "whole file"
                )
            buffer, position, begin = buffer[begin:] + chunk, position - begin, 0
            continue
        position = found.end()
        if mark in (b"[", b"{"):
            depth += 1
        elif depth and mark in (b"]", b"}"):
            depth -= 1
        elif not depth and mark in (b",", b"]"):
            element = buffer[begin : found.start()]
            _check_length(len(element), f"{path}: element {number}")
            if mark == b"," or number > 1 or element.strip():
                yield element
            if mark == b"]":
                break
            number, begin = number + 1, position
    rest = buffer[position:] or read()
    while rest:
        if rest.strip():
            raise RetrieverError(f"{path}: something follows the array, which ends with element {number}; remove it")
        rest = read()


def _check_length(length: int, where: str) -> None:
    if length > MAX_LINE_BYTES:
        raise RetrieverError(
            f"{where}: longer than {MAX_LINE_BYTES} bytes; write each passage by itself, and cut long ones"
        )


def _read(read: Callable[[], bytes], where: str) -> bytes:
    try:
        return read()
    except _UNPACK_ERRORS as error:
        raise RetrieverError(f"{where}: cannot be read ({error}); the file is damaged or not whole") from error


def _parse(entry: bytes, where: str) -> tuple[Passage, bool]:
    """Turn one entry into a passage; also return whether it has the plain form. Raises RetrieverError with `where`."""
    try:
        record = json.loads(entry.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RetrieverError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RetrieverError(f"{where}: not JSON ({error}); write each passage as one JSON object") from error
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
