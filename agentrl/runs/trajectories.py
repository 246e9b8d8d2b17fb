"""Files of trajectories: one JSON object a line, compressed with zstandard, in one frame or several."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from agentrl.runs.files import RunError, append, replace_file
from agentrl.types import Trajectory

# Token ids and log-probabilities hardly shrink further at a higher level, which takes many times as long.
_LEVEL = 1
_FRAME_ROWS = 256
_CHUNK = 1 << 20

_log = logging.getLogger(__name__)


def write_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Write a file of trajectories, which appears when it is whole; its folder is made if need be.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = map(_encode, trajectories)
    replace_file(path, lambda file: file.writelines(_frames_of(rows)))


def append_trajectories(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Add trajectories to a file, as one frame: a kill on the way loses these and none before them.

    Raises:
        OSError: if they cannot be written; the file stays as it was.
    """
    append(path, _frame(map(_encode, trajectories)))


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """Yield the trajectories of a file. A last row that was cut off is left out, and logged as a warning.

    Raises:
        RunError: if the file is damaged or a row is no trajectory; the message names the file, and the line of the row.
    """
    for line, row in enumerate(_lines(path), start=1):
        if row.strip():
            yield _decode(row, f"{path}:{line}")


def _frames_of(rows: Iterator[bytes]) -> Iterator[bytes]:
    # An empty file is one without a frame, and would read as one that was cut off.
    first = True
    while (some := list(islice(rows, _FRAME_ROWS))) or first:
        yield _frame(some)
        first = False


def _frame(rows: Iterable[bytes]) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL).compress(b"".join(row + b"\n" for row in rows))


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of all frames; the last one may lack its line break."""
    rest = b""
    frame: Any = None
    empty = True
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                empty = False
                while chunk:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    # Not splitlines: a JSON text may hold Unicode's own line separators.
                    *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
                    yield from lines
                    chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise RunError(f"{path}: not a trajectory file, or a damaged one: {error}; get the file again") from error
    if frame is not None or empty:
        _log.warning("%s: its end is missing, as after a kill; what stands before it was read", path)
    elif rest:
        yield rest


@cache
def _adapter() -> TypeAdapter[Trajectory | None]:
    # With None, because pydantic takes no settings for a dataclass alone.
    return TypeAdapter(Trajectory | None, config=ConfigDict(ser_json_inf_nan="constants"))


def _encode(trajectory: Trajectory) -> bytes:
    # A text may hold half of a surrogate pair, which JSON has an escape for and UTF-8 has nothing; pydantic refuses it in a
    # value, and in the key of a mapping writes U+FFFD instead.
    with suppress(PydanticSerializationError):
        row = _adapter().dump_json(trajectory)
        if b"\xef\xbf\xbd" not in row:
            return row
    return json.dumps(_adapter().dump_python(trajectory)).encode("ascii")


def _decode(row: bytes, place: str) -> Trajectory:
    try:
        try:
            trajectory = _adapter().validate_json(row)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise
            trajectory = _adapter().validate_python(json.loads(row.decode("utf-8", "surrogatepass")))
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]))
        raise RunError(
            f"{place}: not a trajectory: {what}; give a file that `agentrl train`, rollout or eval wrote"
        ) from error
    except ValueError as error:
        raise RunError(f"{place}: not JSON: {error}") from error
    if trajectory is None:
        raise RunError(f"{place}: not a trajectory: null")
    return trajectory
