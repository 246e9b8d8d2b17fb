"""What goes wrong in an episode costs this episode alone, and whoever took the time answers for a late one."""

import asyncio

import pytest
import virtual_clock
from fakes import PassageRetriever, ScriptedEngine, make_episode
from hypothesis import assume, given
from hypothesis import strategies as st
from playing import ANSWER, ELBE, NONSENSE, QUESTION, SEARCH, play, settings

from agentrl.advantages.episodes import episode_advantages
from agentrl.agent.episode import Agent
from agentrl.agent.protocols import SearchTags
from agentrl.rewards import REWARDS
from agentrl.types import End, EngineDied, EnvironmentFailure, FailureCause


@pytest.mark.parametrize("error", [EnvironmentFailure("the engine is gone"), EngineDied("the engine is gone")])
def test_a_failing_engine_ends_the_episode_with_its_earlier_turns(codec, error):
    episode, _ = play(codec, [SEARCH, error])
    assert (episode.end, episode.valid, episode.answer) == (End.ENVIRONMENT_FAILURE, False, None)
    assert (episode.cause, episode.failure) == (FailureCause.ENGINE, "the engine is gone")
    assert len(episode.turns) == len(episode.searches) == 1


def test_a_failing_retriever_ends_the_episode_with_its_turns_and_the_search_that_it_failed(codec):
    episode, _ = play(codec, [NONSENSE, SEARCH], retriever=PassageRetriever(error="index lost"))
    assert (episode.end, episode.cause) == (End.ENVIRONMENT_FAILURE, FailureCause.RETRIEVER)
    assert episode.failure == "index lost"
    assert [turn.action.kind for turn in episode.turns] == ["invalid", "search"]
    assert episode.searches == ()


class Broken:
    """A retriever of a user's own with a bug, which is not met for every query."""

    def __init__(self, error):
        self.error = error

    async def search(self, queries, k):
        raise self.error


class Unfit(SearchTags):
    """A protocol of a user's own with a bug in one of its methods."""

    method = "prompt"

    def __init__(self, config, codec, tools):
        super().__init__(config, codec, tools)

        def fail(*arguments):
            raise KeyError(self.method)

        # The agent tries prompt and observation once, before any episode.
        self.fails = fail

    def prompt(self, question):
        return self.fails() if self.method == "prompt" and question != "?" else super().prompt(question)

    def parse(self, text):
        return self.fails() if self.method == "parse" else super().parse(text)

    def observation(self, hits, limit, ended=False):
        return self.fails() if self.method == "observation" and hits else super().observation(hits, limit, ended)

    def answer(self, prompt, turns):
        return self.fails() if self.method == "answer" else super().answer(prompt, turns)


def test_an_exception_that_nobody_foresaw_costs_one_episode_and_keeps_its_traceback(codec):
    error = ZeroDivisionError("no\nmore")
    episode, _ = play(codec, [NONSENSE, SEARCH], retriever=Broken(error))
    assert (episode.end, episode.cause, episode.valid) == (End.ENVIRONMENT_FAILURE, FailureCause.CODE, False)
    first, _, rest = episode.failure.partition("\n")
    assert first == "ZeroDivisionError: no"
    assert "raise self.error" in rest
    assert len(episode.turns) == 2


@pytest.mark.parametrize("method", ["prompt", "parse", "observation", "answer"])
def test_a_protocol_that_raises_costs_one_episode(codec, monkeypatch, method):
    monkeypatch.setattr(Unfit, "method", method)
    episode, _ = play(codec, [SEARCH, ANSWER], config=settings(protocol="test_episode_failures:Unfit"))
    assert (episode.end, episode.cause, episode.answer) == (End.ENVIRONMENT_FAILURE, FailureCause.CODE, None)
    assert episode.failure.startswith(f"KeyError: '{method}'\n")


def test_what_is_kept_of_an_exception_is_bounded(codec):
    episode, _ = play(codec, [SEARCH], retriever=Broken(ValueError("x" * 1_000_000)))
    assert episode.failure.startswith("ValueError: xxx")
    assert len(episode.failure) < 6_000


def test_a_timeout_of_a_users_own_is_no_timeout_of_the_episode(codec):
    episode, _ = play(codec, [SEARCH], retriever=Broken(TimeoutError("upstream")))
    assert (episode.cause, episode.failure.partition("\n")[0]) == (FailureCause.CODE, "TimeoutError: upstream")


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_is_no_failure_of_an_episode(codec, leaving):
    with pytest.raises(leaving):
        play(codec, [SEARCH], retriever=Broken(leaving()))


def test_a_tool_that_waits_for_what_was_cancelled_costs_one_episode(codec):
    episode, _ = play(codec, [SEARCH], retriever=Broken(asyncio.CancelledError("a connection pool was closed")))
    assert (episode.cause, len(episode.turns)) == (FailureCause.CODE, 1)
    assert episode.failure.startswith("asyncio.exceptions.CancelledError: a connection pool was closed\n")


def test_an_episode_that_is_cancelled_is_no_failure(codec):
    async def cancel():
        engine = Slow(ScriptedEngine(codec, [SEARCH]))
        agent = Agent(settings(), codec, engine, PassageRetriever(ELBE), 3)
        episode = asyncio.create_task(agent.run(QUESTION, "1/0/0", temperature=1.0, seed=0, timeout=100.0))
        await asyncio.sleep(1.0)
        episode.cancel()
        await episode

    with pytest.raises(asyncio.CancelledError):
        virtual_clock.run(cancel())


class Slow:
    """An engine, or a retriever, that takes `seconds` for each call: a list, and for ever beyond its end."""

    def __init__(self, inner, *seconds):
        self.inner, self.seconds = inner, iter(seconds)

    async def _wait(self):
        await asyncio.sleep(next(self.seconds, 1e9))

    async def generate(self, prompt_ids, sampling):
        await self._wait()
        return await self.inner.generate(prompt_ids, sampling)

    async def search(self, queries, k):
        try:
            await self._wait()
        except asyncio.CancelledError:
            # As libraries do, whose own time limits are built on cancellation.
            raise ValueError("interrupted") from None
        return await self.inner.search(queries, k)


def play_slowly(codec, generating, searching, timeout=100.0):
    """Play two searches and an answer, each generation and each search with its seconds."""
    engine = Slow(ScriptedEngine(codec, [SEARCH, SEARCH, ANSWER]), *generating)
    agent = Agent(settings(), codec, engine, Slow(PassageRetriever(ELBE), *searching), 3)
    return virtual_clock.run(agent.run(QUESTION, "1/0/0", temperature=0.7, seed=5, timeout=timeout))


def test_an_episode_within_its_time_ends_as_it_would(codec):
    episode = play_slowly(codec, [30, 30, 30], [4, 5])
    assert (episode.end, episode.seconds, episode.cause) == (End.ANSWERED, 99.0, None)


def test_an_episode_that_spent_its_time_generating_stays_in_the_sample(codec):
    episode = play_slowly(codec, [40, 40, 40], [1, 1])
    assert (episode.end, episode.valid, episode.cause, episode.failure) == (End.TIMED_OUT, True, None, "")
    assert (len(episode.turns), episode.answer) == (2, None)
    assert [call.seconds for call in episode.searches] == [1.0, 1.0]
    assert REWARDS["exact_match"](episode) == 0.0
    assert episode.seconds == 100.0
    group = [episode.with_reward(0.0), make_episode("b", QUESTION, reward=1.0)]
    result = episode_advantages(group, [0, 0], [0, 0], estimator="grpo", scope="prompt", options={})
    assert result.valid == [True, True]
    assert result.values[0] < 0 < result.values[1]


def test_an_episode_that_spent_its_time_waiting_for_a_tool_says_nothing_about_the_policy(codec):
    episode = play_slowly(codec, [20, 20, 20], [1, 1e9])
    assert (episode.end, episode.cause) == (End.ENVIRONMENT_FAILURE, FailureCause.TIMEOUT)
    assert episode.failure == "the episode took longer than 100 s, and generating was only 40 s of it"
    # The search that nobody answered is on record.
    assert (len(episode.turns), len(episode.searches)) == (2, 1)


def test_a_tool_that_is_interrupted_does_not_make_a_slow_policy_fail(codec):
    assert play_slowly(codec, [40, 40], [1, 1e9]).end is End.TIMED_OUT


def test_an_engine_that_never_answers_is_no_policy_that_is_slow(codec):
    episode = play_slowly(codec, [], [])
    assert (episode.end, episode.cause, episode.turns) == (End.ENVIRONMENT_FAILURE, FailureCause.TIMEOUT, ())
    assert episode.failure == "the engine completed no turn within the episode's 100 s"


@given(
    generating=st.lists(st.integers(0, 120), min_size=3, max_size=3),
    searching=st.lists(st.integers(0, 120), min_size=2, max_size=2),
)
def test_who_took_the_time_decides_about_an_episode_that_is_late(codec, generating, searching):
    episode = play_slowly(codec, generating, searching)
    spent = {True: 0, False: 0}
    turns = 0
    for number, seconds in enumerate([generating[0], searching[0], generating[1], searching[1], generating[2]]):
        is_generation = number % 2 == 0
        left = 100 - sum(spent.values())
        spent[is_generation] += min(seconds, left)
        # What ends at the very deadline may or may not be in time.
        assume(seconds != left)
        if seconds > left:
            slow_policy = turns > 0 and spent[True] > spent[False]
            assert episode.end is (End.TIMED_OUT if slow_policy else End.ENVIRONMENT_FAILURE)
            assert episode.cause is (None if slow_policy else FailureCause.TIMEOUT)
            assert len(episode.turns) == turns
            return
        turns += is_generation
    assert episode.end is End.ANSWERED
