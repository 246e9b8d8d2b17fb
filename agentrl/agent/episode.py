"""One episode: generate, read the action, search, append the observation, until an end.

Token in, token out: the context handed to the engine is a list of ids that only grows. What the model sampled is decoded
to read its action and never encoded again; an observation is encoded once, alone, and appended.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time

from agentrl.agent.codec import Codec, as_string
from agentrl.agent.protocols import get_protocol
from agentrl.agent.tools import Toolbox
from agentrl.config import AgentConfig, ConfigError
from agentrl.engines.base import Engine, Sampling
from agentrl.types import (
    Action,
    ActionKind,
    End,
    EnvironmentFailure,
    Question,
    Trajectory,
    Turn,
)
from retrievers.base import Retriever, RetrieverError

# An observation leaves at least this many tokens for an answer, and is not worth a call when it gets fewer.
_ANSWER_TOKENS = 16
_SMALLEST_OBSERVATION = 32


class Agent:
    """Runs episodes, any number of them at once."""

    def __init__(self, config: AgentConfig, codec: Codec, engine: Engine, retriever: Retriever, k: int) -> None:
        """`k` passages come back for a search.

        Raises:
            ConfigError: if the protocol, the tools, the tokenizer, the retriever or the limits do not go together.
        """
        self.config, self.codec, self.engine = config, codec, engine
        self.tools = Toolbox(config.tools, retriever, k)
        self.protocol = get_protocol(config, codec)
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
        """Run one episode of at most `timeout` seconds.

        A failure of engine or retriever ends it as environment failure, and so does a question that is too long.
        """
        started = time.monotonic()
        prompt = self.codec.encode(self.protocol.prompt(question.text))
        turns: list[Turn] = []
        failure, answer = "", None
        deadline = asyncio.timeout(timeout)
        try:
            async with deadline:
                end = await self._play(prompt, turns, episode_id, temperature, seed)
            answer = self.protocol.answer(self.codec.decode(prompt), turns)
        except (EnvironmentFailure, RetrieverError) as error:
            end, failure = End.ENVIRONMENT_FAILURE, str(error)
        except TimeoutError as error:
            # A user's retriever or engine may raise one of its own.
            late = f"the episode took longer than {timeout:g} s" if deadline.expired() else f"TimeoutError {error}"
            end, failure = End.ENVIRONMENT_FAILURE, late
        return Trajectory(
            id=episode_id,
            question=question,
            prompt_ids=tuple(prompt),
            turns=tuple(turns),
            end=end,
            answer=answer,
            failure=failure,
            seconds=time.monotonic() - started,
        )

    async def _play(self, prompt: list[int], turns: list[Turn], episode_id: str, temperature: float, seed: int) -> End:
        """Append turns until the episode ends; return how it did."""
        config, protocol, codec = self.config, self.protocol, self.codec
        if len(prompt) + config.max_turn_tokens > config.max_episode_tokens:
            raise EnvironmentFailure(
                f"the prompt has {len(prompt)} tokens and leaves no room for a turn of {config.max_turn_tokens} within "
                f"agent.max_episode_tokens {config.max_episode_tokens}; raise it, or leave the question out"
            )
        ids = list(prompt)
        calls = mistakes = 0
        while True:
            room = config.max_episode_tokens - len(ids)
            generation = await self.engine.generate(
                ids,
                Sampling(
                    max_tokens=min(config.max_turn_tokens, room),
                    temperature=temperature,
                    stop=protocol.stop,
                    seed=turn_seed(seed, episode_id, len(turns)),
                ),
            )
            action = protocol.parse(codec.said(generation.token_ids, protocol.stop))
            if action.kind is ActionKind.INVALID and generation.finish == "length":
                action = Action(ActionKind.INVALID, "the turn was too long")
            text = codec.decode(generation.token_ids)
            turn = Turn(generation.token_ids, generation.logprobs, text, action, generation.adapter_version)
            room -= len(generation.token_ids)

            if action.kind is ActionKind.ANSWER:
                turns.append(turn)
                return End.ANSWERED
            limit = min(config.max_observation_tokens, room - _ANSWER_TOKENS)
            end = None
            if action.kind is ActionKind.INVALID and not config.mistakes_are_turns:
                end = End.INVALID if mistakes == config.max_invalid else None
            elif calls + mistakes * config.mistakes_are_turns == config.max_turns:
                end = End.TURN_LIMIT
            if end is None and limit < self._smallest_observation:
                end = End.TRUNCATED
            if end is not None:
                turns.append(turn)
                return end

            search = None
            ended = codec.ended(generation.token_ids)
            if action.kind is ActionKind.INVALID:
                mistakes += 1
                observation = protocol.correction(action.argument, ended)
            else:
                calls += 1
                hits, search = await self.tools.call(action.kind, action.argument)
                observation = protocol.observation(hits, limit, ended)
            observation_ids = codec.encode(observation)
            # An observation of hits fits, but a correction has a length of its own.
            if len(observation_ids) > room - _ANSWER_TOKENS:
                turns.append(dataclasses.replace(turn, search=search))
                return End.TRUNCATED
            turns.append(
                dataclasses.replace(
                    turn, search=search, observation_ids=tuple(observation_ids), observation=as_string(observation)
                )
            )
            ids += [*turn.token_ids, *observation_ids]


def turn_seed(seed: int, episode_id: str, turn: int) -> int:
    """Derive a turn's sampling seed (32 bits) from the run's seed, so that episodes do not depend on their order."""
    digest = hashlib.blake2b(f"{seed}/{episode_id}/{turn}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")
