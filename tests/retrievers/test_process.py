"""A retriever in a process of its own answers as it does in this one, and is there again soon after it died."""

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_retriever import OddRetriever

from retrievers.base import CannotReadError, RetrieverError
from retrievers.service.process import ProcessRetriever, RetrieverStartingError

pytestmark = pytest.mark.slow

TARGET = "fake_retriever:OddRetriever"
WORKER = "fake_retriever:WorkerRetriever"


def running(use, target=TARGET, options=None, **bounds):
    async def run():
        async with ProcessRetriever(target, options or {}, **bounds) as retriever:
            return await use(retriever)

    return asyncio.run(run())


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def give_up(tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition, seconds=60):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def test_it_answers_as_in_this_process_and_many_at_once():
    queries = ["x", "", "東京 🙂", "\x00\x1b", "surrogate", "half \ud800"]

    async def use(retriever):
        calls = [([query] * 3, k) for query in queries for k in (1, 4)] * 10
        return await asyncio.gather(*(retriever.search(*call) for call in calls)), calls

    answers, calls = running(use)
    odd = OddRetriever()
    assert answers == [asyncio.run(odd.search(*call)) for call in calls]


def test_a_slow_search_does_not_hold_up_the_others():
    async def use(retriever):
        slow = asyncio.create_task(retriever.search(["sleep 30"], 1))
        await retriever.search(["x"], 1)
        assert not slow.done()
        slow.cancel()
        return await retriever.search(["y"], 1)

    assert running(use)[0][0].id == "y-0"


def test_a_search_that_is_given_up_ends_in_the_child_too():
    async def use(retriever):
        searches = [asyncio.create_task(retriever.search(["sleep 60"], 1)) for _ in range(4)]
        await asyncio.sleep(0)
        before = await retriever.search(["sleeping"], 1)
        await give_up(searches[1:])
        after = await retriever.search(["sleeping"], 1)
        await give_up(searches)
        return before[0][0].id, after[0][0].id

    assert running(use) == ("4", "1")


def test_what_is_given_up_before_its_turn_is_never_searched():
    async def use(retriever):
        begun, *waiting = (asyncio.create_task(retriever.search([query], 1)) for query in ["0.5", *["5"] * 3])
        await asyncio.sleep(0)
        await give_up(waiting)
        await begun
        return await retriever.search(["0"], 1)

    assert running(use, WORKER)[0][0].id == "0.5,0"


def test_it_tells_what_the_retriever_tells_of_itself():
    async def use(retriever):
        assert retriever.state == "ready"
        return retriever.about, retriever.pid

    about, pid = running(use, options={"greeting": "good morning"})
    assert about == {"greeting": "good morning", "pid": pid}


def test_documents_are_read_where_the_retriever_has_them():
    async def use(retriever):
        return await retriever.read("a"), await retriever.read("none")

    document, nothing = running(use)
    assert (document.contents, nothing) == ('"a"\nwhole', None)

    async def refuse(retriever):
        await retriever.read("a")

    with pytest.raises(CannotReadError, match="FakeRetriever cannot read whole documents"):
        running(refuse, "fake_retriever:FakeRetriever")


def test_a_search_that_fails_fails_alone():
    async def use(retriever):
        calls = [retriever.search([query], 1) for query in ("x", "error", "break", "y")]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, error, broken, also_good = running(use)
    assert (good[0][0].id, also_good[0][0].id) == ("x-0", "y-0")
    assert (type(error), str(error)) == (RetrieverError, "no such thing")
    assert "the retriever broke: ZeroDivisionError('oops')" in str(broken)


def test_hits_that_cannot_be_sent_fail_their_search_at_once():
    async def use(retriever):
        async with asyncio.timeout(10):
            with pytest.raises(RetrieverError, match="complex is not JSON serializable"):
                await retriever.search(["unspeakable"], 1)
        return await retriever.search(["x"], 1)

    assert running(use)[0][0].id == "x-0"


@pytest.mark.parametrize("word", ["die", "killed"])
def test_when_it_dies_those_who_wait_are_told_and_it_is_back_soon(word):
    async def use(retriever):
        first = retriever.pid
        waiting = [asyncio.create_task(retriever.search(["sleep 60"], 1)) for _ in range(5)]
        await retriever.search(["x"], 1)
        if word == "die":
            waiting.append(asyncio.create_task(retriever.search(["die"], 1)))
        else:
            os.kill(first, signal.SIGKILL)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {RetrieverStartingError}
        with pytest.raises(RetrieverStartingError, match="died and is being started again"):
            await retriever.search(["x"], 1)
        assert retriever.state == "starting"
        await until(lambda: retriever.state == "ready")
        assert retriever.pid != first
        assert retriever.restarts == 1
        return await retriever.search(["x"], 2)

    assert running(use) == asyncio.run(OddRetriever().search(["x"], 2))


def test_it_comes_back_as_often_as_it_dies():
    async def use(retriever):
        for _ in range(3):
            os.kill(retriever.pid, signal.SIGKILL)
            await until(lambda: retriever.state == "starting")
            await until(lambda: retriever.state == "ready")
        return await retriever.search(["x"], 1)

    assert running(use)[0][0].id == "x-0"


def test_a_process_that_gives_no_sign_of_life_is_killed_and_replaced():
    async def use(retriever):
        with pytest.raises(RetrieverStartingError):
            await retriever.search(["freeze"], 1)
        await until(lambda: retriever.state == "ready")
        return await retriever.search(["x"], 1)

    assert running(use, hang_seconds=0.5)[0][0].id == "x-0"


@pytest.mark.slow
def test_a_process_that_searches_for_long_is_not_taken_for_one_that_hangs():
    async def use(retriever):
        await retriever.search(["2.5"], 1)
        return retriever.restarts, retriever.state

    assert running(use, WORKER, hang_seconds=1) == (0, "ready")


@pytest.mark.slow
def test_a_process_that_answers_others_is_not_taken_for_one_that_is_stuck():
    async def use(retriever):
        searches = [asyncio.create_task(retriever.search(["0.2"], 1)) for _ in range(10)]
        await asyncio.gather(*searches)
        return retriever.restarts

    assert running(use, WORKER, stuck_seconds=1, hang_seconds=1) == 0


@pytest.mark.slow
def test_a_process_whose_retriever_never_answers_is_killed_and_replaced():
    async def use(retriever):
        with pytest.raises(RetrieverStartingError):
            await retriever.search(["60"], 1)
        await until(lambda: retriever.state == "ready")
        return await retriever.search(["0"], 1)

    assert running(use, WORKER, hang_seconds=2, stuck_seconds=1)[0][0].id == "0"


def test_a_start_that_lacks_file_descriptors_is_tried_again(monkeypatch):
    make_pair, refusals = socket.socketpair, []

    def refuse_twice():
        if len(refusals) == 2:
            return make_pair()
        refusals.append(OSError(errno.EMFILE, "Too many open files"))
        raise refusals[-1]

    async def use(retriever):
        monkeypatch.setattr(socket, "socketpair", refuse_twice)
        os.kill(retriever.pid, signal.SIGKILL)
        await until(lambda: len(refusals) == 2)
        with pytest.raises(RetrieverStartingError, match=r"cannot be started: .*Too many open files"):
            await retriever.search(["x"], 1)
        await until(lambda: retriever.state == "ready")
        return await retriever.search(["x"], 1)

    assert running(use)[0][0].id == "x-0"


@pytest.mark.parametrize(
    ("target", "options", "reason"),
    [
        (TARGET, {"greeting": "refuse"}, "there is no such index; build it"),
        (TARGET, {"greeting": "crash"}, "died while it started"),
        (TARGET, {"greeting": "hang"}, "not ready within 1 s"),
        (TARGET, {"no_such_option": 1}, "died while it started"),
        ("no_such_module:Retriever", {}, "cannot be imported"),
        ("retrievers.base:Nothing", {}, "cannot be imported"),
        ("retrievers.base", {}, "not an import path"),
    ],
)
def test_what_cannot_start_says_why(target, options, reason):
    async def use(retriever):
        raise AssertionError("it started")

    with pytest.raises(RetrieverError, match=reason):
        running(use, target, options, start_seconds=1 if options.get("greeting") == "hang" else 60)


def test_it_ends_with_its_context_and_is_of_no_use_outside():
    retriever = ProcessRetriever(TARGET, {})
    with pytest.raises(RetrieverError, match="not been started; use `async with`"):
        asyncio.run(retriever.search(["x"], 1))

    async def run():
        async with retriever:
            return retriever.pid

    assert not is_alive(asyncio.run(run()))
    assert retriever.state == "stopped"
    with pytest.raises(RetrieverError, match="it was stopped"):
        asyncio.run(retriever.search(["x"], 1))


def test_it_ends_when_its_owner_is_killed():
    code = (
        "import asyncio, sys\n"
        "from retrievers.service.process import ProcessRetriever\n"
        "async def run():\n"
        f"    async with ProcessRetriever('{TARGET}', {{}}) as retriever:\n"
        "        print(retriever.pid, flush=True)\n"
        "        await retriever.search(['sleep 60'], 1)\n"
        "asyncio.run(run())\n"
    )
    root, here = Path(__file__).parents[2], Path(__file__).parent
    environment = {"PYTHONPATH": f"{root}{os.pathsep}{here}"}
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(owner.stdout.readline())
    assert is_alive(pid)
    owner.kill()
    owner.wait()
    began = time.monotonic()
    while is_alive(pid) and time.monotonic() - began < 5:
        time.sleep(0.01)
    assert not is_alive(pid)
    owner.stdout.close()
