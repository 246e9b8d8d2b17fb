"""A recorded run is repeated from its file alone, and the file says what was seen."""

import asyncio
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
from fake_retriever import FakeRetriever, ReadingRetriever
from stored import found, search, using

from retrievers.base import Hit, RetrieverError
from retrievers.stages.cache import CachedRetriever, RecordingRetriever, ReplayRetriever, check_search_works


def test_a_recorded_run_is_repeated_without_the_retriever(tmp_path):
    file = tmp_path / "deep" / "run.sqlite"

    async def use(retriever):
        return await retriever.search(["x", " y\t"], 2), await retriever.read("a"), await retriever.read("none")

    recorded = using(RecordingRetriever(ReadingRetriever(), file, "a"), use)
    before = file.read_bytes()
    assert using(ReplayRetriever(file, "a"), use) == recorded == (found(["x", "y"]), Hit("a", '"a"\nwhole', 0.0), None)
    assert file.read_bytes() == before


def test_a_replay_refuses_by_name_what_was_not_recorded(tmp_path):
    file = tmp_path / "run.sqlite"
    search(RecordingRetriever(ReadingRetriever(), file, "a"), ["x"])
    with pytest.raises(RetrieverError, match=r"run\.sqlite does not have the query 'never asked' with k 2"):
        search(ReplayRetriever(file, "a"), ["x", "never asked"])
    with pytest.raises(RetrieverError, match="the query 'x' with k 3"):
        search(ReplayRetriever(file, "a"), ["x"], 3)
    with pytest.raises(RetrieverError, match="the document 'a'"):
        using(ReplayRetriever(file, "a"), lambda r: r.read("a"))


def test_another_identity_is_refused_also_for_recording_on(tmp_path):
    file = tmp_path / "run.sqlite"
    search(RecordingRetriever(FakeRetriever(), file, "index 1"), ["x"])
    for make in (
        lambda: ReplayRetriever(file, "index 2"),
        lambda: RecordingRetriever(FakeRetriever(), file, "index 2"),
    ):
        with pytest.raises(RetrieverError, match="records another retriever or other options"):
            make()
    assert search(ReplayRetriever(file, "index 1"), ["x"]) == found(["x"])
    # Where there is no index, nobody can say which it was.
    assert search(ReplayRetriever(file), ["x"]) == found(["x"])


def test_a_cache_of_several_indexes_is_no_recording(tmp_path):
    for identity in ("index 1", "index 2"):
        search(CachedRetriever(FakeRetriever(), tmp_path, identity), ["x"])
    with pytest.raises(RetrieverError, match="holds 2 identities and is no recording"):
        ReplayRetriever(tmp_path / "hits.sqlite")


def test_a_missing_recording_is_not_made(tmp_path):
    with pytest.raises(RetrieverError, match="is not a file; record a run first"):
        ReplayRetriever(tmp_path / "nothing.sqlite", "a")
    assert list(tmp_path.iterdir()) == []


def test_a_recording_says_what_the_run_saw_even_where_the_retriever_changes_its_mind(tmp_path):
    class Fickle(FakeRetriever):
        async def search(self, queries, k):
            self.calls.append(queries)
            number = len(self.calls)
            await asyncio.sleep(0.05)
            return [[Hit(f"{number}", query, 1.0)] for query in queries]

    inner, file = Fickle(), tmp_path / "run.sqlite"

    async def run():
        # As two processes would, at the same time, and a third after them.
        first, second, third = (RecordingRetriever(inner, file, "a") for _ in range(3))
        at_once = await asyncio.gather(first.search(["x"], 1), second.search(["x"], 1))
        later = await third.search(["x"], 1)
        for recorder in (first, second, third):
            await recorder.close()
        return [*at_once, later]

    answers = asyncio.run(run())
    assert len(inner.calls) == 2
    assert answers == [search(ReplayRetriever(file, "a"), ["x"], 1)] * 3


def record(file, start):
    """In a process of its own."""
    return search(RecordingRetriever(FakeRetriever(), file, "a"), [f"q{i}" for i in range(start, start + 50)])


def test_processes_record_into_one_file(tmp_path):
    file = tmp_path / "run.sqlite"
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(record, [file] * 6, range(0, 300, 50)))
    queries = [f"q{i}" for i in range(300)]
    assert search(ReplayRetriever(file, "a"), queries) == found(queries)


def record_and_die(file):
    async def run():
        await RecordingRetriever(FakeRetriever(), file, "a").search(["x"], 2)
        os._exit(1)

    asyncio.run(run())


def test_what_was_answered_is_recorded_also_when_the_process_is_killed(tmp_path):
    file = tmp_path / "run.sqlite"
    process = multiprocessing.get_context("spawn").Process(target=record_and_die, args=(file,))
    process.start()
    process.join()
    assert process.exitcode == 1
    assert search(ReplayRetriever(file, "a"), ["x"]) == found(["x"])


def test_a_replay_passes_its_probe_without_a_retriever(tmp_path):
    search(RecordingRetriever(FakeRetriever(), tmp_path / "run.sqlite", "a"), ["x"])
    using(ReplayRetriever(tmp_path / "run.sqlite"), check_search_works)
