"""What is remembered is what was found: in memory, on disk, by other processes, and in recordings."""

import asyncio
import gc
import multiprocessing
import pickle
import resource
import sqlite3
import unicodedata
from concurrent.futures import ProcessPoolExecutor

import pytest
from fake_retriever import FakeRetriever, OddRetriever, ReadingRetriever
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import found, search, using

from retrievers.base import CannotReadError, Hit, RetrieverError
from retrievers.stages.cache import CachedRetriever, RecordingRetriever, ReplayRetriever, check_search_works, normalised

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)


@settings(max_examples=30)
@given(
    calls=st.lists(st.tuples(st.lists(ANY_TEXT | st.sampled_from(["a", "b", "a b"]), max_size=4), st.integers(1, 3)))
)
def test_a_cached_search_equals_one_without_a_cache(tmp_path_factory, calls):
    folder = tmp_path_factory.mktemp("cache")

    async def use(retriever):
        return [await retriever.search(queries, k) for queries, k in calls]

    expected = [found([normalised(query) for query in queries], k) for queries, k in calls]
    assert using(CachedRetriever(FakeRetriever(), folder, "a"), use) == expected
    # From disk alone, and with a memory that holds nothing for long.
    nothing = FakeRetriever()
    assert using(CachedRetriever(nothing, folder, "a"), use) == expected
    assert using(CachedRetriever(nothing, folder, "a", memory_limit=0), use) == expected
    assert nothing.calls == []


@given(ANY_TEXT)
def test_normalising_is_done_once_and_for_all(text):
    once = normalised(text)
    assert normalised(once) == once
    assert once == once.strip(" ")
    assert "  " not in once
    once.encode()
    assert unicodedata.is_normalized("NFC", once)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (" who\t wrote \r\n it ", "who wrote it", True),
        ("Caf\u0065\u0301", "Caf\u00e9", True),
        ("US", "us", False),
        ("a\u3000b", "a b", False),
        ("a\x00b", "ab", False),
        ("ﬁ", "fi", False),
        ("", " ", True),
    ],
)
def test_queries_are_the_same_up_to_blanks_and_composition_and_never_up_to_case(one, other, same):
    assert (normalised(one) == normalised(other)) is same


def test_each_query_is_asked_once_for_each_k_and_identity(tmp_path):
    inner = FakeRetriever()
    retriever = CachedRetriever(inner, tmp_path, "a")

    async def use(retriever):
        await retriever.search(["x", "y", " x "], 2)
        await retriever.search(["y", "z"], 2)
        await retriever.search(["x"], 3)
        return retriever.counts

    assert using(retriever, use) == {"memory": 1, "disk": 0, "asking": 4, "waiting": 0}
    assert inner.calls == [(["x", "y"], 2), (["z"], 2), (["x"], 3)]
    search(CachedRetriever(inner, tmp_path, "b"), ["x"])
    search(CachedRetriever(inner, tmp_path, "a"), ["x"])
    assert inner.calls[3:] == [(["x"], 2)]


def test_equal_queries_at_the_same_time_are_asked_once(tmp_path):
    inner = OddRetriever()

    async def use(retriever):
        first = asyncio.create_task(retriever.search(["sleep 0.1", "x"], 1))
        await asyncio.sleep(0)
        others = await asyncio.gather(*(retriever.search(["x", "y"], 1) for _ in range(20)))
        return await first, others

    first, others = using(CachedRetriever(inner, tmp_path, "a"), use)
    assert [hits[0].id for hits in first] == ["sleep 0.1-0", "x-0"]
    assert all([hits[0].id for hits in other] == ["x-0", "y-0"] for other in others)
    assert sorted(inner.calls) == [(["sleep 0.1", "x"], 1), (["y"], 1)]


def test_one_who_gives_up_does_not_take_the_answer_from_the_others(tmp_path):
    async def use(retriever):
        first = asyncio.create_task(retriever.search(["sleep 0.1"], 1))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(retriever.search(["sleep 0.1"], 1))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return await second

    assert using(CachedRetriever(OddRetriever(), tmp_path, "a"), use)[0][0].id == "sleep 0.1-0"


def test_a_failure_is_told_to_all_who_wait_and_not_remembered(tmp_path):
    inner = FakeRetriever()
    inner.error = "gone"

    async def use(retriever):
        outcomes = await asyncio.gather(*(retriever.search(["x"], 1) for _ in range(3)), return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["gone"] * 3
        inner.error = None
        return await retriever.search(["x"], 1)

    assert using(CachedRetriever(inner, tmp_path, "a"), use) == found(["x"], 1)


class Refusing(FakeRetriever):
    """Refuses a search that has "bad" among its queries, once `go` is set."""

    def __init__(self):
        super().__init__()
        self.go = asyncio.Event()

    async def search(self, queries, k):
        found = await super().search(queries, k)
        await self.go.wait()
        if "bad" in queries:
            raise RetrieverError("'bad' is refused")
        return found


def test_who_shares_a_search_that_fails_by_anothers_query_asks_for_its_own_once(tmp_path):
    async def run():
        inner = Refusing()
        async with CachedRetriever(inner, tmp_path, "a") as retriever:
            calls = [["bad", "good"], ["good"], ["other", "bad"], ["bad", "good"]]
            tasks = [asyncio.create_task(retriever.search(queries, 1)) for queries in calls]
            await asyncio.sleep(0)
            inner.go.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        return inner.calls, outcomes

    calls, (refused, good, both, also_refused) = asyncio.run(run())
    assert good == found(["good"], 1)
    assert [str(error) for error in (refused, both, also_refused)] == ["'bad' is refused"] * 3
    # The last shared nothing but its own queries, and has its answer without asking again.
    assert [queries for queries, _ in calls] == [["bad", "good"], ["other"], ["good"], ["bad"]]


def test_a_caller_may_change_the_list_it_got(tmp_path):
    async def use(retriever):
        (await retriever.search(["x"], 2))[0].clear()
        return await retriever.search(["x"], 2)

    assert using(CachedRetriever(FakeRetriever(), tmp_path, "a"), use) == found(["x"])


def test_documents_are_remembered_also_that_there_is_none(tmp_path):
    inner = ReadingRetriever()

    async def use(retriever):
        return [await retriever.read(name) for name in ("a", "a", "none", "none", " a")]

    for _ in range(2):
        first, again, nothing, still_nothing, other = using(CachedRetriever(inner, tmp_path, "a"), use)
        assert first == again == Hit("a", '"a"\nwhole', 0.0)
        assert nothing is still_nothing is None
        assert other.id == " a"
    assert inner.calls == ["a", "none", " a"]
    with pytest.raises(CannotReadError):
        using(CachedRetriever(FakeRetriever(), tmp_path, "b"), lambda r: r.read("a"))


def test_broken_text_survives_the_disk(tmp_path):
    first = search(CachedRetriever(OddRetriever(), tmp_path, "a"), ["surrogate"], 1)
    again = search(CachedRetriever(OddRetriever(), tmp_path, "a"), ["surrogate"], 1)
    assert first == again == [[Hit("\udc80", "half \ud800 of a pair \x00\x1b", 1.0)]]


def test_a_disk_that_takes_no_more_is_named_and_what_was_stored_is_kept(tmp_path):
    async def fill(retriever):
        for number in range(1000):
            await retriever.search([f"q{number}"], 1)

    async def use(retriever):
        await retriever.search(["first"], 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(RetrieverError, match=r"hits\.sqlite cannot be used \(disk I/O error\)"):
                await fill(retriever)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return [await retriever.search([query], 1) for query in ("later", "first")]

    assert using(CachedRetriever(FakeRetriever(), tmp_path, "a"), use) == [found(["later"], 1), found(["first"], 1)]
    inner = FakeRetriever()
    assert search(CachedRetriever(inner, tmp_path, "a"), ["first", "later"], 1) == found(["first", "later"], 1)
    assert inner.calls == []


def test_the_file_stays_within_its_bound_and_forgets_the_oldest(tmp_path):
    class Wordy(FakeRetriever):
        async def search(self, queries, k):
            self.calls.extend(queries)
            return [[Hit(query, "x" * 5000, 1.0)] for query in queries]

    inner, limit = Wordy(), 1 << 20
    queries = [f"q{i}" for i in range(1000)]

    async def use(retriever):
        for query in queries:
            await retriever.search([query], 1)

    using(CachedRetriever(inner, tmp_path, "a", size_limit=limit), use)
    assert (tmp_path / "hits.sqlite").stat().st_size < limit + 100_000
    inner.calls.clear()
    newest = search(CachedRetriever(inner, tmp_path, "a", size_limit=limit), queries[-50:], 1)
    assert [hits[0].id for hits in newest] == queries[-50:]
    assert inner.calls == []
    search(CachedRetriever(inner, tmp_path, "a", size_limit=limit), queries[:50], 1)
    assert inner.calls == queries[:50]


def test_what_is_larger_than_the_cache_is_answered_all_the_same(tmp_path):
    assert search(CachedRetriever(FakeRetriever(), tmp_path, "a", size_limit=1, memory_limit=1), ["x"]) == found(["x"])


def test_memory_forgets_what_was_used_longest_ago(tmp_path):
    async def use(retriever):
        for query in ("x", "y", "x", "z", "x", "y"):
            await retriever.search([query], 1)
        return retriever.counts

    # Room for two.
    counts = using(CachedRetriever(FakeRetriever(), tmp_path, "a", memory_limit=1200), use)
    assert counts == {"memory": 2, "disk": 1, "asking": 3, "waiting": 0}


def fill(folder, start):
    """In a process of its own: ask for queries of which others ask half."""
    queries = [f"q{i}" for i in range(start, start + 200)]

    async def use(retriever):
        return [await retriever.search(queries[i : i + 4], 2) for i in range(0, 200, 4)]

    answers = using(CachedRetriever(FakeRetriever(), folder, "a"), use)
    return [hits for answer in answers for hits in answer] == found(queries)


def test_processes_share_a_cache(tmp_path):
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        assert all(pool.map(fill, [tmp_path] * 6, [0, 100, 200, 0, 100, 200]))
    inner = FakeRetriever()
    assert len(search(CachedRetriever(inner, tmp_path, "a"), [f"q{i}" for i in range(400)])) == 400
    assert inner.calls == []


def test_nothing_in_the_file_is_unpickled_and_damage_is_named(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    search(CachedRetriever(FakeRetriever(), tmp_path, "a"), ["x"])
    with sqlite3.connect(tmp_path / "hits.sqlite") as database:
        database.execute("UPDATE entries SET hits = ?", (pickle.dumps(Trap()),))
    with pytest.raises(RetrieverError, match="stored hits are damaged"):
        search(CachedRetriever(FakeRetriever(), tmp_path, "a"), ["x"])
    (tmp_path / "hits.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(RetrieverError, match=r"hits\.sqlite cannot be used .*remove it"):
        CachedRetriever(FakeRetriever(), tmp_path, "a")


def test_another_kind_of_file_is_refused_and_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "other.sqlite") as database:
        database.execute("CREATE TABLE mine (a)")
    before = (tmp_path / "other.sqlite").read_bytes()
    for make in (lambda file: RecordingRetriever(FakeRetriever(), file, "a"), lambda file: ReplayRetriever(file, "a")):
        with pytest.raises(RetrieverError, match="holds something else"):
            make(tmp_path / "other.sqlite")
    assert (tmp_path / "other.sqlite").read_bytes() == before


def test_it_enters_and_leaves_what_it_wraps(tmp_path):
    class Entered(FakeRetriever):
        entered = False

        async def __aenter__(self):
            self.entered = True

        async def __aexit__(self, *error):
            self.entered = False

    async def run():
        inner = Entered()
        async with CachedRetriever(inner, tmp_path, "a") as retriever:
            assert inner.entered
            await retriever.search(["x"], 1)
        assert not inner.entered

    asyncio.run(run())


def test_leaving_ends_a_search_that_is_stuck_and_that_nobody_waits_for(tmp_path):
    class Stuck(FakeRetriever):
        async def __aenter__(self):
            self.left = asyncio.get_running_loop().create_future()

        async def __aexit__(self, *error):
            self.left.set_exception(RetrieverError("it was stopped"))

        async def search(self, queries, k):
            await self.left

    complaints = []

    async def run():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
        async with asyncio.timeout(5), CachedRetriever(Stuck(), tmp_path, "a") as retriever:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await retriever.search(["x"], 1)

    asyncio.run(run())
    gc.collect()
    assert complaints == []


def test_probing_reaches_the_retriever_and_leaves_nothing_behind(tmp_path):
    inner, file = FakeRetriever(), tmp_path / "run.sqlite"

    async def use(retriever):
        cached = CachedRetriever(retriever, tmp_path, "a")
        for _ in range(2):
            await check_search_works(cached)
        await cached.close()
        inner.error = "gone"
        with pytest.raises(RetrieverError, match="gone"):
            await check_search_works(retriever)

    using(RecordingRetriever(inner, file, "a"), use)
    assert len(inner.calls) == 3
    with sqlite3.connect(file) as database, sqlite3.connect(tmp_path / "hits.sqlite") as cache:
        for stored in (database, cache):
            assert stored.execute("SELECT count(*) FROM entries").fetchone() == (0,)
