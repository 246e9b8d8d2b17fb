"""10,000 queries from 64 clients at once against wiki-mini: the right answers, and nothing that grows."""

import asyncio
import hashlib
import json
import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import psutil
import pytest
from real_data import real_data

from retrievers.backends import build_index
from retrievers.lucene import jvm
from retrievers.lucene.retriever import LuceneRetriever

pytestmark = pytest.mark.slow

CORPUS = "corpus/wiki-mini.jsonl"
CLIENTS, QUERIES, WARM_UP, K = 64, 10_000, 2_000, 3
QUERY_WORDS = 9


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wiki-mini") / "index"
    build_index(real_data(CORPUS), folder)
    return str(folder)


def queries(count):
    """Words from the middle of passages all over the corpus."""
    with real_data(CORPUS).open(encoding="utf-8") as lines:
        passages = [json.loads(line)["contents"].split() for line in lines]
    step = len(passages) // count
    chosen = (passages[step * number] for number in range(count))
    return [" ".join(words[len(words) // 3 :][:QUERY_WORDS]) for words in chosen]


def digest(hits):
    """All of an answer in 16 bytes: 10,000 answers themselves would be a part of the memory that is measured."""
    return hashlib.blake2b(repr([(hit.id, hit.contents, hit.score) for hit in hits]).encode(), digest_size=16).digest()


def java_threads():
    bean = jvm.autoclass("java.lang.management.ManagementFactory").getThreadMXBean()
    return bean.getThreadCount()


def state():
    """Threads of Java and of Python, and the resident bytes, once threads that are ending have ended."""
    counts = (0, 0)
    for _ in range(50):
        before, counts = counts, (jvm.submit(java_threads).result(), threading.active_count())
        if counts == before:
            break
        time.sleep(0.1)
    return (*counts, psutil.Process().memory_info().rss)


def put_under_load(index):
    """The queries whose answers were wrong, how many were answered, and the state before and after."""
    asked = queries(WARM_UP + QUERIES)
    warm_up, measured = asked[:WARM_UP], asked[WARM_UP:]
    retriever = LuceneRetriever(index)

    async def one_by_one():
        # A lone query does not go through Java's batch search, and is searched by one thread.
        return [digest((await retriever.search([query], K))[0]) for query in measured]

    async def clients(chosen, expected):
        rest, wrong, answered = iter(enumerate(chosen)), [], 0

        async def client():
            nonlocal answered
            for number, query in rest:
                found = digest((await retriever.search([query], K))[0])
                answered += 1
                if expected and found != expected[number]:
                    wrong.append(query)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return wrong, answered

    reference = asyncio.run(one_by_one())
    asyncio.run(clients(warm_up, None))
    before = state()
    wrong, answered = asyncio.run(clients(measured, reference))
    after = state()
    found_something = sum(answer != digest([]) for answer in reference)
    retriever.close()
    return wrong, answered, found_something, before, after


def test_ten_thousand_queries_of_64_clients_get_the_right_answers_and_leave_nothing_behind(index):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        wrong, answered, found_something, before, after = pool.submit(put_under_load, index).result(timeout=500)
    assert wrong == []
    assert answered == QUERIES
    assert found_something > 0.99 * QUERIES
    assert after[0] == before[0], "threads of Java"
    assert after[1] == before[1], "threads of Python"
    assert abs(after[2] - before[2]) < 0.1 * before[2], (before[2], after[2])
