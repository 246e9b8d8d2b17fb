"""One episode: generate, read the action, search, append the observation, until an end.

Token in, token out: the context handed to the engine is a list of ids that only grows. What the model sampled is decoded
to read its action and never encoded again; an observation is encoded once, alone, and appended.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from dataclasses import dataclass

from agentrl.agent.codec import Codec
from agentrl.agent.protocols import PROTOCOLS, Protocol
from agentrl.config import AgentConfig, ConfigError
from agentrl.engines.base import Engine, Sampling
from agentrl.types import (
    Action,
    ActionKind,
    AgentRLError,
    End,
    EnvironmentFailure,
    Question,
    SearchCall,
    Trajectory,
    Turn,
)
from retrievers.base import Retriever, RetrieverError

# An observation leaves at least this many tokens for an answer, and is not worth a search when it gets fewer.
_ANSWER_TOKENS = 16
_SMALLEST_OBSERVATION = 32


def get_protocol(name: str) -> Protocol:
    """Return the protocol registered as `name`.

    Raises:
        ConfigError: if there is none.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"agent.protocol {name!r} is not known; choose one of: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]()


def prompt_ids(question: Question, config: AgentConfig, codec: Codec) -> list[int]:
    """Write the prompt of an episode as token ids.

    `plain` is the instruction, the worked examples and `Question: …` as text for base models; `chat` puts the same into
    one user message of the tokenizer's chat template.

    Raises:
        AgentRLError: if the prompt leaves no room for a turn within `max_episode_tokens`.
    """
    protocol = get_protocol(config.protocol)
    instruction = protocol.instruction() if config.instruction is None else config.instruction
    text = f"{instruction}{protocol.worked_examples(config.worked_examples)}Question: {question.text}\n"
    if config.prompt == "chat":
        if codec.tokenizer.chat_template is None:
            raise ConfigError("agent.prompt chat: this model's tokenizer has no chat template; use plain")
        text = codec.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    ids = codec.encode(text, control_tokens=config.prompt == "chat")
    if len(ids) + config.max_turn_tokens > config.max_episode_tokens:
        raise AgentRLError(
            f"question {question.id}: its prompt has {len(ids)} tokens and leaves no room for a turn of "
            f"{config.max_turn_tokens} within agent.max_episode_tokens {config.max_episode_tokens}; raise it"
        )
    return ids


@dataclass(frozen=True, slots=True)
class Agent:
    """What an episode needs: settings, tokenizer, engine and retriever. `k` passages come back for a search."""

    config: AgentConfig
    codec: Codec
    engine: Engine
    retriever: Retriever
    k: int

    async def run(
        self, question: Question, episode_id: str, *, temperature: float, seed: int, timeout: float
    ) -> Trajectory:
        """Run one episode of at most `timeout` seconds. Failures of engine or retriever end it as environment failure."""
        started = time.monotonic()
        prompt = prompt_ids(question, self.config, self.codec)
        turns: list[Turn] = []
        failure, answer = "", None
        try:
            async with asyncio.timeout(timeout):
                end, answer = await self._play(prompt, turns, episode_id, temperature, seed)
        except (EnvironmentFailure, RetrieverError) as error:
            end, failure = End.ENVIRONMENT_FAILURE, str(error)
        except TimeoutError:
            end, failure = End.ENVIRONMENT_FAILURE, f"the episode took longer than {timeout:g} s"
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

    async def _play(
        self, prompt: list[int], turns: list[Turn], episode_id: str, temperature: float, seed: int
    ) -> tuple[End, str | None]:
        """Append turns until the episode ends; return the end and the answer."""
        config, protocol = self.config, get_protocol(self.config.protocol)
        ids = list(prompt)
        searches = mistakes = 0
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
            text = self.codec.decode(generation.token_ids)
            action = protocol.parse(text)
            if action.kind is ActionKind.INVALID and generation.finish == "length":
                action = Action(ActionKind.INVALID, "the turn was too long")
            turn = Turn(generation.token_ids, generation.logprobs, text, action, generation.adapter_version)
            room -= len(generation.token_ids)

            if action.kind is ActionKind.ANSWER:
                turns.append(turn)
                return End.ANSWERED, action.argument
            limit = min(config.max_observation_tokens, room - _ANSWER_TOKENS)
            end = None
            if action.kind is ActionKind.SEARCH and searches == config.max_turns:
                end = End.TURN_LIMIT
            elif action.kind is ActionKind.INVALID and mistakes == config.max_invalid:
                end = End.INVALID
            elif limit < _SMALLEST_OBSERVATION:
                end = End.TRUNCATED
            if end is not None:
                turns.append(turn)
                return end, None

            search = None
            if action.kind is ActionKind.SEARCH:
                searches += 1
                started = time.monotonic()
                hits = (await self.retriever.search([action.argument], self.k))[0]
                search = SearchCall(
                    query=action.argument,
                    passage_ids=tuple(hit.id for hit in hits),
                    scores=tuple(hit.score for hit in hits),
                    seconds=time.monotonic() - started,
                )
                observation = protocol.observation(hits, self.codec, limit)
            else:
                mistakes += 1
                observation = protocol.correction(action.argument)
            observation_ids = self.codec.encode(observation)
            # An observation of passages fits, but a correction has a length of its own.
            if len(observation_ids) > room - _ANSWER_TOKENS:
                turns.append(dataclasses.replace(turn, search=search))
                return End.TRUNCATED, None
            turns.append(
                dataclasses.replace(
                    turn, search=search, observation_ids=tuple(observation_ids), observation=observation
                )
            )
            ids += [*turn.token_ids, *observation_ids]


def turn_seed(seed: int, episode_id: str, turn: int) -> int:
    """Derive a turn's sampling seed (32 bits) from the run's seed, so that episodes do not depend on their order."""
    digest = hashlib.blake2b(f"{seed}/{episode_id}/{turn}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")
