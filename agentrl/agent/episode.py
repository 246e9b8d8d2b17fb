"""One episode: generate, read the action, call the tool, append the observation, until an end.

Token in, token out: the context handed to the engine is a list of ids that only grows. What the model sampled is decoded
to read its action and never encoded again; an observation is encoded alone and appended.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import traceback
from dataclasses import dataclass, field

from agentrl.agent.codec import Codec, as_string
from agentrl.agent.protocols import get_protocol
from agentrl.agent.tools import EpisodeTools, Toolbox
from agentrl.config import AgentConfig, ConfigError
from agentrl.engines.base import Engine, Sampling
from agentrl.types import (
    ANSWER,
    INVALID,
    TOO_LONG,
    Action,
    End,
    EnvironmentFailure,
    FailureCause,
    Question,
    ToolCall,
    Trajectory,
    Turn,
)
from retrievers.base import Retriever, RetrieverError

# An observation leaves at least this many tokens for an answer, and is not worth a call when it gets fewer.
_ANSWER_TOKENS = 16
_SMALLEST_OBSERVATION = 32

# What is kept of a traceback, in characters, from its start and from its end.
_TRACEBACK_START, _TRACEBACK_END = 1000, 3000


@dataclass(slots=True)
class _Course:
    """An episode under way: what is known of it when it ends, whichever way it ends.

    Attributes:
        prompt: empty while nothing was handed to the engine.
        turns: those that were sampled; the last one may lack its observation.
        generating: the seconds that the engine took, for a generation that was cut off too.
    """

    episode_id: str
    temperature: float
    seed: int
    prompt: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    generating: float = 0.0


class _OutOfTimeError(Exception):
    """The time of an episode ran out, and not because of the policy."""


class Agent:
    """Runs episodes, any number of them at once."""

    def __init__(self, config: AgentConfig, codec: Codec, engine: Engine, retriever: Retriever, k: int) -> None:
        """`k` passages come back for a search.

        Raises:
            ConfigError: if the protocol, the tools, the tokenizer, the retriever or the limits do not go together.
        """
        self.config, self.codec, self.engine = config, codec, engine
        self.tools = Toolbox(config.tools, retriever, k)
        self.protocol = get_protocol(config, codec, self.tools.specs)
        # What no question could mend is refused here, where it ends the run, and not in each episode.
        shortest = len(codec.encode(self.protocol.prompt("?")))
        if shortest + config.max_turn_tokens > config.max_episode_tokens:
            raise ConfigError(
                f"agent.max_episode_tokens {config.max_episode_tokens}: the prompt takes {shortest} tokens for the "
                f"question `?` and leaves no room for a turn of {config.max_turn_tokens}; raise it"
            )
        nothing = len(codec.encode(self.protocol.observation((), 0)))
        if nothing > config.max_observation_tokens:
            raise ConfigError(
                f"agent.max_observation_tokens {config.max_observation_tokens}: an observation of protocol "
                f"{config.protocol} that holds nothing takes {nothing} tokens of this tokenizer; raise it"
            )
        self._smallest_observation = max(_SMALLEST_OBSERVATION, nothing)

    async def run(
        self, question: Question, episode_id: str, *, temperature: float, seed: int, timeout: float
    ) -> Trajectory:
        """Run one episode of at most `timeout` seconds. Whatever goes wrong in it costs this episode and no other.

        When the time runs out, what took it decides how the episode ends. If generating took more than half of it, and at
        least one turn is complete, the policy wrote too much: the end is `End.TIMED_OUT`, which is valid, and the turns so
        far are kept. Otherwise tools took the time, or an engine that never answered: the end is an environment failure of
        cause TIMEOUT. The time that a generation waits in the engine's own queue counts as generating.

        An exception of retriever, engine, tool or protocol ends the episode as environment failure, with the turns so far.
        RetrieverError has the cause RETRIEVER, EnvironmentFailure the cause ENGINE; any other `Exception` has the cause
        CODE, and `failure` keeps its traceback; so has a CancelledError while this task is not cancelled. KeyboardInterrupt
        and SystemExit pass.
        """
        now = asyncio.get_running_loop().time
        started = now()
        course = _Course(episode_id, temperature, seed)
        end, answer = End.ENVIRONMENT_FAILURE, None
        cause: FailureCause | None = None
        failure = ""
        try:
            prompt = self.codec.encode(self.protocol.prompt(question.text))
            if len(prompt) + self.config.max_turn_tokens > self.config.max_episode_tokens:
                end = End.PROMPT_TOO_LONG
                failure = (
                    f"the prompt of question {question.id} has {len(prompt)} tokens and leaves no room for a turn of "
                    f"{self.config.max_turn_tokens} within agent.max_episode_tokens {self.config.max_episode_tokens}; raise "
                    "it, or leave the question out"
                )
            else:
                course.prompt = prompt
                end = await self._play_in_time(course, question, timeout)
                answer = self.protocol.answer(self.codec.decode(course.prompt), course.turns)
        except RetrieverError as error:
            cause, failure = FailureCause.RETRIEVER, str(error)
        except EnvironmentFailure as error:
            cause, failure = FailureCause.ENGINE, str(error)
        except _OutOfTimeError as error:
            cause, failure = FailureCause.TIMEOUT, str(error)
        except asyncio.CancelledError as error:
            # Nobody has cancelled this task: the code of users has waited for something else that was cancelled.
            if asyncio.current_task().cancelling():
                raise
            cause, failure = FailureCause.CODE, report(error)
        except Exception as error:  # noqa: BLE001, the code of users is called here, and the trajectory keeps what it raised
            cause, failure = FailureCause.CODE, report(error)
        return Trajectory(
            id=episode_id,
            question=question,
            prompt_ids=tuple(course.prompt),
            turns=tuple(course.turns),
            # An exception of `answer` comes after the end.
            end=end if cause is None else End.ENVIRONMENT_FAILURE,
            answer=answer,
            cause=cause,
            failure=failure,
            seconds=now() - started,
        )

    async def _play_in_time(self, course: _Course, question: Question, timeout: float) -> End:
        """Play an episode to its end, or until `timeout` seconds are over. What tools set up for it counts.

        Raises:
            _OutOfTimeError: if they are over and the policy's generations did not take more than half of them.
        """
        deadline = asyncio.timeout(timeout)
        failed: Exception | None = None
        try:
            async with deadline, self.tools.episode(question) as tools:
                try:
                    return await self._play(course, tools, deadline)
                except Exception as error:
                    failed = error
                    raise
        # Code that is cancelled may turn that into an exception of its own, and users raise TimeoutError too.
        except Exception:
            if not deadline.expired():
                raise
        # The clean-up of a tool can swallow what passes through it.
        if failed is not None and not deadline.expired():
            raise failed
        if not course.turns:
            raise _OutOfTimeError(f"the engine completed no turn within the episode's {timeout:g} s")
        if course.generating <= timeout / 2:
            raise _OutOfTimeError(
                f"the episode took longer than {timeout:g} s, and generating was only {course.generating:.3g} s of it"
            )
        return End.TIMED_OUT

    async def _play(self, course: _Course, tools: EpisodeTools, deadline: asyncio.Timeout) -> End:
        """Play turn after turn until the episode ends; return how it did. Raises TimeoutError after the deadline."""
        config, protocol, codec, turns = self.config, self.protocol, self.codec, course.turns
        ids = list(course.prompt)
        calls = mistakes = 0
        while True:
            room = config.max_episode_tokens - len(ids)
            turn = await self._generate(course, ids, min(config.max_turn_tokens, room))
            action = turn.action
            room -= len(turn.token_ids)

            if action.kind == ANSWER:
                return End.ANSWERED
            # Without room for an answer after it, an observation would only be read.
            limit = min(config.max_observation_tokens, room - _ANSWER_TOKENS)
            end = None
            if action.kind == INVALID and not config.mistakes_are_turns:
                end = End.INVALID if mistakes == config.max_invalid else None
            elif calls + mistakes * config.mistakes_are_turns == config.max_turns:
                end = End.TURN_LIMIT
            # Asked before the tool is called: a search whose passages cannot be shown must not count as executed.
            if end is None and limit < self._smallest_observation:
                end = End.TRUNCATED
            if end is not None:
                return end

            made: tuple[ToolCall, ...] = ()
            ended = codec.ended(turn.token_ids)
            if action.kind == INVALID:
                mistakes += 1
                observation = protocol.correction(action.argument, ended)
            else:
                calls += 1
                result, call = await tools.call(action)
                # It passes once, and a tool may go on although it was cancelled.
                if deadline.expired():
                    raise TimeoutError
                made = (call,)
                observation = protocol.observation(result, tools.most_tokens(action, limit), ended)
            observation_ids = codec.encode(observation)
            # An observation of hits fits, but a correction has a length of its own.
            if len(observation_ids) > room - _ANSWER_TOKENS:
                turns[-1] = dataclasses.replace(turn, calls=made)
                return End.TRUNCATED
            turns[-1] = dataclasses.replace(
                turn, calls=made, observation_ids=tuple(observation_ids), observation=as_string(observation)
            )
            ids += [*turn.token_ids, *observation_ids]

    async def _generate(self, course: _Course, ids: list[int], most: int) -> Turn:
        """Sample one turn of at most `most` tokens, read its action and append it, without its observation so far."""
        now = asyncio.get_running_loop().time
        sampling = Sampling(
            max_tokens=most,
            temperature=course.temperature,
            stop=self.protocol.stop,
            seed=turn_seed(course.seed, course.episode_id, len(course.turns)),
        )
        started = now()
        try:
            generation = await self.engine.generate(ids, sampling)
        finally:
            # A generation that the deadline cuts off is never seen, but its time was the policy's.
            course.generating += now() - started
        # The action is read from what was said; the turn keeps all that was sampled, which is what gets trained.
        action = self.protocol.parse(self.codec.said(generation.token_ids, self.protocol.stop))
        if action.kind == INVALID and generation.finish == "length":
            # "No tag was closed" would be true and of no help: the turn was cut off before it could close one.
            action = Action(INVALID, TOO_LONG)
        text = self.codec.decode(generation.token_ids)
        turn = Turn(generation.token_ids, generation.logprobs, text, action, generation.adapter_version)
        # Kept at once: where the tool fails or the time runs out, the record shows what the model had asked for.
        course.turns.append(turn)
        return turn


def turn_seed(seed: int, episode_id: str, turn: int) -> int:
    """Derive a turn's sampling seed (32 bits) from the run's seed, so that episodes do not depend on their order."""
    digest = hashlib.blake2b(f"{seed}/{episode_id}/{turn}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def report(error: BaseException) -> str:
    """Return type and message of an exception on one line, and below it the traceback without the middle of a long one."""
    lines = "".join(traceback.format_exception_only(error)).split("\n")
    return f"{lines[0][:_TRACEBACK_START]}\n{shortened(''.join(traceback.format_exception(error)).strip())}"


def shortened(told: str) -> str:
    """Return a traceback without the middle of a long one."""
    if len(told) <= _TRACEBACK_START + _TRACEBACK_END:
        return told
    return f"{told[:_TRACEBACK_START]}\n…\n{told[-_TRACEBACK_END:]}"
