"""A file of hits that nobody can write to: a recording is replayed from it, and whatever else it is says what to do."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from retrievers.base import RetrieverError
from retrievers.stages.store import HitStore


@contextmanager
def read_only(folder):
    """Nobody may write in `folder`, which holds for root only where it gives its powers up."""
    was = os.geteuid()
    folder.chmod(0o555)
    for file in folder.iterdir():
        file.chmod(0o444)
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)
        folder.chmod(0o755)


@pytest.fixture
def folder():
    # What pytest makes can be entered by its owner alone.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def record(path):
    store = HitStore(path, "index", exclusive=True)
    store.put(3, {"q": "[]"})
    return store


def test_a_recording_is_replayed_from_a_folder_that_cannot_be_written(folder):
    record(folder / "seen").close()
    with read_only(folder):
        store = HitStore(folder / "seen", None, read_only=True, exclusive=True)
        assert store.get(3, ["q", "r"]) == {"q": "[]"}
        store.close()
    assert [path.name for path in folder.iterdir()] == ["seen"]


def test_a_recording_whose_last_entries_are_beside_it_is_not_replayed_without_them(folder):
    store = record(folder / "made")
    for name in ("made", "made-wal"):
        shutil.copy(folder / name, folder / name.replace("made", "copy"))
    store.close()
    with read_only(folder), pytest.raises(RetrieverError, match="copy it with its -wal file"):
        HitStore(folder / "copy", None, read_only=True, exclusive=True)


def test_a_store_in_a_folder_that_cannot_be_written_says_so_and_not_that_it_is_damaged(folder):
    record(folder / "seen").close()
    for name in ("seen", "new"):
        with read_only(folder), pytest.raises(RetrieverError, match="make it and its folder writable") as raised:
            HitStore(folder / name, "index")
        assert "damaged" not in str(raised.value)


def test_a_recording_is_replayed_while_another_process_adds_to_it(folder):
    store = record(folder / "seen")
    replay = HitStore(folder / "seen", None, read_only=True, exclusive=True)
    store.put(3, {"r": "[1]"})
    assert replay.get(3, ["r"]) == {"r": "[1]"}
    replay.close()
    store.close()


def test_an_identity_is_kept_as_a_digest_and_told_in_no_message(folder):
    for _ in range(2):
        HitStore(folder / "seen", "key=sk-planted", exclusive=True).close()
    with pytest.raises(RetrieverError, match="records another retriever or other options") as raised:
        HitStore(folder / "seen", "key=sk-planted-too", exclusive=True)
    assert "planted" not in str(raised.value)
    assert not any(b"planted" in path.read_bytes() for path in folder.iterdir())
