"""A file of trajectories gives back what was written, in however many pieces, and says where it is not one."""

import dataclasses
import json
import logging
import os
import subprocess
import sys

import pytest
import zstandard
from fakes import make_episode
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.runs import RunError, append_trajectories, read_trajectories, write_trajectories
from agentrl.types import ANSWER, INVALID, OPEN, SEARCH, Action, End, FailureCause, Question, ToolCall, Trajectory, Turn

# Any code points, lone surrogates and line separators too: passages and byte-level tokenizers give such text.
anything = st.text(st.characters(codec=None, categories=None), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
ids = st.lists(st.integers(0, 200_000), max_size=4).map(tuple)
questions = st.builds(
    Question,
    id=anything,
    text=anything,
    golden_answers=st.lists(anything, max_size=2).map(tuple),
    dataset=anything,
    metadata=st.dictionaries(anything, st.one_of(st.none(), st.integers(), st.lists(anything, max_size=2)), max_size=2),
)
calls = st.builds(
    ToolCall,
    tool=anything,
    arguments=st.dictionaries(anything, anything, max_size=2),
    passage_ids=st.lists(anything, max_size=2).map(tuple),
    scores=st.lists(numbers, max_size=2).map(tuple),
    seconds=numbers,
)
turns = st.builds(
    lambda sampled, **rest: Turn(tuple(i for i, _ in sampled), tuple(p for _, p in sampled), **rest),
    st.lists(st.tuples(st.integers(0, 200_000), numbers), max_size=4),
    text=anything,
    action=st.builds(
        Action,
        st.sampled_from([SEARCH, OPEN, ANSWER, INVALID]),
        anything,
        st.dictionaries(anything, anything, max_size=2),
    ),
    adapter_version=st.integers(0, 10),
    calls=st.lists(calls, max_size=2).map(tuple),
    observation_ids=ids,
    observation=anything,
)
ends = st.tuples(st.sampled_from(End), st.sampled_from(FailureCause)).map(
    lambda drawn: {"end": drawn[0], "cause": drawn[1] if drawn[0] is End.ENVIRONMENT_FAILURE else None}
)
episodes = st.builds(
    lambda ended, **rest: Trajectory(**ended, **rest),
    ended=ends,
    id=anything,
    question=questions,
    prompt_ids=ids,
    turns=st.lists(turns, max_size=3).map(tuple),
    answer=st.none() | anything,
    reward=st.none() | numbers,
    failure=anything,
    seconds=numbers,
)


def read(path):
    return list(read_trajectories(path))


@settings(max_examples=50)
@given(st.lists(st.lists(episodes, max_size=2), max_size=3))
def test_trajectories_survive_the_way_through_a_file_written_at_once_or_in_pieces(tmp_path_factory, pieces):
    folder = tmp_path_factory.mktemp("run")
    whole = [episode for piece in pieces for episode in piece]
    write_trajectories(folder / "whole", whole)
    (folder / "pieces").touch()
    for piece in pieces:
        append_trajectories(folder / "pieces", piece)
    assert read(folder / "whole") == read(folder / "pieces") == whole


def test_numbers_that_json_has_no_word_for_survive_too(tmp_path):
    written = make_episode("a", reward=float("inf"))
    write_trajectories(tmp_path / "file", [written])
    assert read(tmp_path / "file") == [written]


def test_many_trajectories_go_through_several_frames(tmp_path):
    written = [make_episode(f"{i}") for i in range(700)]
    write_trajectories(tmp_path / "file", written)
    assert read(tmp_path / "file") == written


def rows(*names):
    return [json.dumps(dataclasses.asdict(make_episode(name)), ensure_ascii=False).encode() for name in names]


def frame(data):
    return zstandard.ZstdCompressor().compress(data)


def streamed(data):
    """Compress as a stream does, whose frame does not say how much it holds."""
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    "content",
    [
        frame(b"\n".join(rows("a", "b")) + b"\n"),
        frame(rows("a")[0] + b"\n") + frame(rows("b")[0] + b"\n"),
        streamed(b"\n".join(rows("a", "b")) + b"\n"),
        frame(b"\n".join(rows("a", "b"))),
        frame(b"\n".join(rows("a", "b")) + b"\n\n"),
        frame(rows("a")[0][:50]) + streamed(rows("a")[0][50:] + b"\n" + rows("b")[0]),
    ],
    ids=["one frame", "two frames", "a stream", "no last line break", "an empty last line", "a row over two frames"],
)
def test_files_of_other_programs_are_read_whole(tmp_path, caplog, content):
    (tmp_path / "file").write_bytes(content)
    assert [trajectory.id for trajectory in read(tmp_path / "file")] == ["a", "b"]
    assert caplog.records == []


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"id": "0", "contents": "x"}', r"file:2: not a trajectory: question: Field required"),
        (b'{"id": 7}', r"file:2: not a trajectory: id: Input should be a valid string"),
        (b'{"id": "cut', r"file:2: not JSON"),
        (b"null", r"file:2: not a trajectory"),
        (b"\xff\xfe", r"file:2: not JSON"),
    ],
)
def test_another_row_is_refused_by_file_and_line(tmp_path, second, message):
    (tmp_path / "file").write_bytes(frame(rows("a")[0] + b"\n" + second + b"\n"))
    with pytest.raises(RunError, match=message):
        read(tmp_path / "file")


@pytest.mark.parametrize("content", [b"{}", frame(b"\n".join(rows("a"))) + b"tail"])
def test_a_file_of_something_else_is_refused_by_name(tmp_path, content):
    (tmp_path / "step-00001.jsonl.zst").write_bytes(content)
    with pytest.raises(RunError, match=r"step-00001\.jsonl\.zst: not a trajectory file"):
        read(tmp_path / "step-00001.jsonl.zst")


def test_a_kill_while_trajectories_are_added_loses_these_alone_wherever_it_cuts(tmp_path, caplog):
    path = tmp_path / "file"
    first, second = [make_episode("a"), make_episode("b")], [make_episode("c"), make_episode("d")]
    append_trajectories(path, first)
    kept = path.stat().st_size
    append_trajectories(path, second)
    whole = path.read_bytes()
    for size in range(kept, len(whole)):
        path.write_bytes(whole[:size])
        caplog.clear()
        assert read(path)[:2] == first
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * (size > kept)


def test_a_file_without_a_byte_is_one_whose_end_is_missing(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert read(tmp_path / "file") == []
    assert "its end is missing" in caplog.text
    caplog.clear()
    write_trajectories(tmp_path / "file", [])
    assert read(tmp_path / "file") == []
    assert caplog.records == []


def test_a_trajectory_file_appears_whole_or_not_at_all(tmp_path):
    strange = make_episode("b", Question("q", "?", ("x",), metadata={"k": object()}))
    with pytest.raises(TypeError):
        write_trajectories(tmp_path / "file", [make_episode("a"), strange])
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from fakes import make_episode
from agentrl.runs import append_trajectories, write_trajectories

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
big = [make_episode(f"{i}", sampled=2000) for i in range(20)]
try:
    {write}(Path(sys.argv[1]), big)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("write", ["append_trajectories", "write_trajectories"])
def test_a_full_disk_is_named_and_what_was_written_before_stays(tmp_path, write):
    # A bound on the size of files stands in for a full disk: the system takes a part of the data and then refuses.
    path = tmp_path / "file"
    write_trajectories(path, [make_episode("a")])
    program = FULL_DISK.replace("{write}", write)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, env=environment)
    assert ended.stdout == f"[Errno 27] File too large: '{path}'\n", ended.stderr
    assert [trajectory.id for trajectory in read(path)] == ["a"]
    assert list(tmp_path.iterdir()) == [path]
