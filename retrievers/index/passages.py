"""The passages of an index on disk, found by row or by id without holding them in memory.

`passages.jsonl` has one JSON object a passage. `offsets.npy`, int64 of shape (passages + 1,), says where each begins.
`ids.npy`, sorted, of shape (passages,), has pairs of an id's 64-bit BLAKE2b digest and its row.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from retrievers.base import RetrieverError
from retrievers.index.corpus import Passage

_TEXTS, _OFFSETS, _IDS = "passages.jsonl", "offsets.npy", "ids.npy"
_ID_TYPE = np.dtype([("digest", "<u8"), ("row", "<i8")])


def write_passages(folder: Path, passages: Iterable[Passage]) -> int:
    """Write the three files of a store and return how many passages there are; 16 bytes a passage are held in memory.

    Raises:
        OSError: if they cannot be written.
    """
    offsets, digests = array("q", [0]), array("Q")
    with (folder / _TEXTS).open("wb") as file:
        for passage in passages:
            record = {"id": passage.id, "contents": passage.contents}
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            offsets.append(offsets[-1] + len(line))
            digests.append(_digest(passage.id))
    np.save(folder / _OFFSETS, np.frombuffer(offsets, np.int64))
    found = np.frombuffer(digests, np.uint64)
    order = np.argsort(found, kind="stable")
    table = np.empty(len(found), _ID_TYPE)
    table["digest"], table["row"] = found[order], order
    np.save(folder / _IDS, table)
    return len(found)


class PassageStore:
    """Reads what `write_passages` wrote; safe to use from many threads."""

    def __init__(self, folder: Path) -> None:
        """Open the store. Raises RetrieverError if its files do not fit together."""
        try:
            self._offsets = np.load(folder / _OFFSETS, mmap_mode="r")
            self._ids = np.load(folder / _IDS, mmap_mode="r")
            self._file = os.open(folder / _TEXTS, os.O_RDONLY)
        except (OSError, ValueError) as error:
            raise RetrieverError(
                f"the passages of {folder} cannot be opened: {error}; build the index again"
            ) from error
        self._folder = folder
        if len(self._offsets) != len(self._ids) + 1 or os.fstat(self._file).st_size != self._offsets[-1]:
            os.close(self._file)
            raise RetrieverError(f"the passages of {folder} do not fit their tables; build the index again")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> Passage:
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        record = json.loads(os.pread(self._file, end - start, start))
        return Passage(record["id"], record["contents"])

    def find(self, name: str) -> Passage | None:
        """The passage with this id, or None."""
        digest = np.uint64(_digest(name))
        position = int(np.searchsorted(self._ids["digest"], digest))
        while position < len(self._ids) and self._ids["digest"][position] == digest:
            passage = self[int(self._ids["row"][position])]
            if passage.id == name:
                return passage
            position += 1
        return None

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
