"""The work of benchmarks/rollout.py: scripted episodes, a slow retriever, turn barriers and two small worlds to run in."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from agentrl.agent.codec import Codec, Segment, Text
from agentrl.agent.episode import Agent, turn_seed
from agentrl.config import AgentConfig
from agentrl.engines.base import Generation, Sampling
from agentrl.engines.vllm import VllmEngine
from agentrl.types import End, Question, Trajectory
from retrievers.base import Hit

GROUP, PASSAGES, SEED = 8, 3, 0
END_TOKEN = "<|im_end|>"
# Longer than any episode here; a benchmark whose episodes time out has measured nothing.
TIMEOUT = 300.0


@dataclass(frozen=True, slots=True)
class Step:
    """What happens in one turn: `tokens` are sampled, then the episode acts; `latency` is its search's, mean 1."""

    episode: int
    turn: int
    tokens: int
    action: Text
    query: str
    latency: float


@dataclass(frozen=True, slots=True)
class Work:
    """Scripted episodes: a question and an id for each, and their steps by the seed with which an agent samples them."""

    questions: Sequence[Question]
    ids: Sequence[str]
    steps: Mapping[int, Step]

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps.values())


def in_tags(query: str | None) -> Text:
    """Write a search, or the answer for None, as protocol search_tags reads it."""
    return " <answer> it </answer>" if query is None else f" <search> {query} </search>"


def in_calls(query: str | None) -> Text:
    """Write the same as protocol chat_tools reads it, with the end token of `write_small_model`."""
    call = json.dumps({"name": "search", "arguments": {"query": query}})
    text = "<answer> it </answer>" if query is None else f"<tool_call>\n{call}\n</tool_call>"
    return Segment(text), Segment(END_TOKEN, True)


def make_work(
    questions: Sequence[Question],
    episodes: int,
    tokens: tuple[int, int],
    seed: int,
    write: Callable[[str | None], Text] = in_tags,
) -> Work:
    """Draw `episodes` episodes in groups of 8 with one to three searches each and `tokens` (least, most) a turn.

    Latencies are lognormal with mean 1 and sigma 1: one in a hundred is above 6. `write` writes a turn's action.
    """
    rng = random.Random(seed)
    first = rng.randrange(len(questions))
    steps = {}
    ids = [f"{seed}/{episode}" for episode in range(episodes)]
    for episode, name in enumerate(ids):
        searches = rng.randint(1, 3)
        for turn in range(searches + 1):
            # The query names its turn, by which the retriever finds the latency.
            query = f"passage for {seed} {episode} {turn}" if turn < searches else ""
            steps[turn_seed(SEED, name, turn)] = Step(
                episode, turn, rng.randint(*tokens), write(query or None), query, rng.lognormvariate(-0.5, 1.0)
            )
    own = [questions[(first + episode // GROUP) % len(questions)] for episode in range(episodes)]
    return Work(own, ids, steps)


@dataclass(frozen=True, slots=True)
class Produced:
    """A request that was answered. Of its prompt, `cached` tokens came from the engine's prefix cache."""

    seed: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    cached: int

    @property
    def computed(self) -> int:
        return len(self.prompt_ids) - self.cached


class Producer(Protocol):
    async def produce(self, prompt_ids: Sequence[int], tokens: int, seed: int) -> Produced:
        """Sample exactly `tokens` tokens."""
        ...

    async def forget(self) -> None:
        """Empty the prefix cache."""
        ...


class CountingEngine(VllmEngine):
    """agentrl's engine, which can also sample an exact number of tokens and tell what its cache held."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:

        super().__init__(*arguments, **settings)
        self.unsampled: dict[int, float] = {}
        """Logit biases of `produce`: ids with which a real model could write a tag that the script does not have."""

    async def produce(self, prompt_ids: Sequence[int], tokens: int, seed: int) -> Produced:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            # Before min_tokens the end token cannot be sampled.
            max_tokens=tokens,
            min_tokens=tokens,
            temperature=1.0,
            logprobs=0,
            logit_bias=self.unsampled,
            seed=seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tuple(prompt_ids)
        requests = self._llm.generate(
            {"prompt_token_ids": list(prompt)},
            parameters,
            request_id=f"p{next(self._requests)}",
            lora_request=self._current.adapter,
        )
        last = [output async for output in requests][-1]
        return Produced(seed, prompt, tuple(last.outputs[0].token_ids), last.num_cached_tokens)

    async def forget(self) -> None:
        await self._llm.reset_prefix_cache()

    async def close(self) -> None:
        await super().close()
        # Held any longer, it would be cleared away with the modules that it needs for that.
        del self._llm


class ScriptedEngine:
    """Samples as many tokens as the script says and ends the turn with the script's action, as if it had been sampled."""

    trainable: ClassVar[bool] = False

    def __init__(self, producer: Producer, work: Work, codec: Codec) -> None:
        self._producer = producer
        self._steps = work.steps
        self._actions = {seed: codec.encode(step.action) for seed, step in work.steps.items()}
        self.produced: dict[int, Produced] = {}
        """By seed, in the order in which they were asked for."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        seed = sampling.seed
        assert seed is not None, "an agent seeds every turn"
        self.produced[seed] = Produced(seed, (), (), 0)
        done = await self._producer.produce(prompt_ids, self._steps[seed].tokens, seed)
        self.produced[seed] = done
        ids = (*done.ids, *self._actions[seed])
        return Generation(ids, (0.0,) * len(ids), "stop", 0)

    async def load_adapter(self, version: int, files: Mapping[str, bytes]) -> None:
        raise NotImplementedError("scripted episodes use the model alone")

    async def close(self) -> None:
        pass


class SlowRetriever:
    """Finds any passages, after `mean` seconds times the latency that the script has for the query."""

    def __init__(self, passages: Sequence[Hit], work: Work, mean: float) -> None:
        self._passages = passages
        self._seconds = {step.query: mean * step.latency for step in work.steps.values() if step.query}

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        await asyncio.sleep(max(self._seconds[query] for query in queries))
        return [random.Random(query).sample(self._passages, k) for query in queries]


@dataclass(frozen=True, slots=True)
class Lab:
    """Where episodes run. `engine` runs `places` requests at once."""

    engine: Any
    codec: Codec
    agent: AgentConfig
    passages: Sequence[Hit]
    places: int


@dataclass(frozen=True, slots=True)
class Played:
    """Scripted episodes that were played: how long all of them took, and their requests in the order of asking."""

    seconds: float
    produced: dict[int, Produced]


def scripted_agent(lab: Lab, work: Work, mean_latency: float) -> tuple[Agent, ScriptedEngine]:
    """Return agentrl's agent on a scripted engine and retriever, and that engine; `mean_latency` in seconds."""
    scripted = ScriptedEngine(lab.engine, work, lab.codec)
    return Agent(lab.agent, lab.codec, scripted, SlowRetriever(lab.passages, work, mean_latency), PASSAGES), scripted


def check_script(work: Work, trajectories: Sequence[Trajectory]) -> None:
    """Raise RuntimeError unless every episode went as scripted."""
    strays = [t for t in trajectories if t.end is not End.ANSWERED]
    turns = sum(len(t.turns) for t in trajectories)
    if strays or turns != len(work.steps):
        what = f"{strays[0].end}: {strays[0].failure}" if strays else f"{turns} turns instead of {len(work.steps)}"
        raise RuntimeError(f"the episodes left their script, {what}")


def demo_world(folder: Path) -> tuple[list[Hit], list[Question]]:
    """Write the demo world into a new `folder`; return its passages and test questions."""
    from agentrl.data.questions import read_questions
    from agentrl.demo.world import write_demo

    write_demo(folder)
    rows = map(json.loads, (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
    return [Hit(row["id"], row["contents"], 1.0) for row in rows], read_questions(folder / "test.jsonl")


def write_small_model(folder: Path, passages: Sequence[Hit], sizes: Mapping[str, int]) -> int:
    """Write a Llama of random weights with a byte-level BPE of the passages; return its number of parameters.

    `sizes` are LlamaConfig's vocab_size, hidden_size, intermediate_size, num_hidden_layers and numbers of heads.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl.chat_template_utils import qwen2_5_chat_template

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes["vocab_size"],
        special_tokens=[END_TOKEN, "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((hit.contents for hit in passages), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END_TOKEN, pad_token=END_TOKEN)
    tokenizer.chat_template = qwen2_5_chat_template
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()
