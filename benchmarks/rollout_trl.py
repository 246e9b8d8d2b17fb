"""TRL's own tool loop for benchmarks/rollout.py: GRPOTrainer with an environment_factory, which plays scripted episodes.

The loop is TRL's (`GRPOTrainer._generate`, timed from prompts to finished completions). What a script fixes is the same as
for agentrl: the tokens of a turn, its action, the passages that come back and how long a search takes. Searches are
asynchronous methods of the environment, which TRL runs together where it can.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rollout_pool import Bench, unsampled
from rollout_work import PASSAGES, SlowRetriever, Work

from agentrl.agent.protocols import get_protocol

Backend = Literal["vllm", "transformers"]


@dataclass(frozen=True, slots=True)
class Looped:
    """Episodes that TRL played: seconds, and by episode and turn the tokens of the prompt and those sampled."""

    seconds: float
    sent: dict[tuple[int, int], int]
    sampled: dict[tuple[int, int], int]


class TrlLoop:
    """A GRPOTrainer whose generations follow a script. It is handed all `episodes` at once.

    It trains `policy`, by default the whole of `model`, in micro-batches of `rows` episodes, by default all. Every other
    episode has a reward of 1.
    """

    def __init__(
        self,
        bench: Bench,
        model: str,
        folder: Path,
        backend: Backend,
        episodes: int,
        policy: Any = None,
        rows: int | None = None,
    ) -> None:
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        self._bench, self._backend, self._unsampled = bench, backend, list(unsampled(bench.codec))
        self._protocol = get_protocol(bench.agent, bench.codec)
        self._work: Work | None = None
        self._retriever: SlowRetriever | None = None
        self._turn, self._seconds = 0, 0.0
        self._sent: dict[tuple[int, int], int] = {}
        self._sampled: dict[tuple[int, int], int] = {}
        loop = self

        class World:
            """What TRL calls tools on."""

            def reset(self, **row: Any) -> None:
                """Begin an episode."""

            # TRL shows the type of the result to the model, if one is given; agentrl does not.
            async def search(self, query: str):  # noqa: ANN202
                """Search an encyclopedia and get the best passages.

                Args:
                    query: What you want to find.
                """
                return await loop._search(query)

        class Scripted(GRPOTrainer):
            def _generate(self, prompts: list[Any]) -> Any:
                started = time.perf_counter()
                result = super()._generate(prompts)
                loop._seconds = time.perf_counter() - started
                return result

            def _generate_single_turn(self, prompt_ids: list[list[int]], *arguments: Any, **settings: Any) -> Any:
                return loop._scripted(super()._generate_single_turn, prompt_ids, *arguments, **settings)

        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        if backend == "vllm":
            _set_for_cpus(bench.places)
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = policy or AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._parts = episodes // (rows or episodes)
        self._trainer = Scripted(
            model=network,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": self._ask("?")}]),
            reward_funcs=lambda completions, **row: [float(number % 2) for number in range(len(completions))],
            environment_factory=World,
            args=GRPOConfig(
                output_dir=str(folder),
                per_device_train_batch_size=rows or episodes,
                gradient_accumulation_steps=self._parts,
                num_generations=8,
                max_completion_length=bench.agent.max_episode_tokens - 600,
                max_tool_calling_iterations=bench.agent.max_turns,
                use_vllm=backend == "vllm",
                vllm_mode="colocate",
                vllm_max_model_length=bench.agent.max_episode_tokens,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
            ),
        )
        # vLLM has loaded these weights itself, and on a CPU packed them, so that TRL cannot load them again.
        self._trainer._last_loaded_step = self._trainer.state.global_step
        self._script(network)

    def play(self, work: Work, mean_latency: float) -> Looped:
        """Play all episodes; `mean_latency` in seconds."""
        self._trainer._generate_and_score_completions(self._begin(work, mean_latency))
        return Looped(self._seconds, self._sent, self._sampled)

    def step(self, work: Work) -> Looped:
        """Play all episodes with searches that take no time, and take an optimizer step on them."""
        rows = self._begin(work, 0.0)
        trainer = self._trainer
        if trainer.optimizer is None:
            trainer.create_optimizer()
            # The loop of Trainer.train sets it.
            trainer.current_gradient_accumulation_steps = self._parts
        for _ in range(self._parts):
            trainer.training_step(trainer.model, rows, None)
        update(trainer)
        return Looped(self._seconds, self._sent, self._sampled)

    def _begin(self, work: Work, mean_latency: float) -> list[dict[str, Any]]:
        """Set the script, and return what TRL is to generate from."""
        self._work, self._turn = work, 0
        self._sent, self._sampled = {}, {}
        self._retriever = SlowRetriever(self._bench.passages, work, mean_latency)
        self._trainer.model.train()
        return [{"prompt": self._ask(q.text)} for q in work.questions]

    def _ask(self, question: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": self._protocol.ask(question)}]

    async def _search(self, query: str) -> str:
        assert self._retriever is not None
        hits = (await self._retriever.search([query], PASSAGES))[0]
        # TRL puts the frame of a result around it by itself.
        _, body, _ = self._protocol.observation(hits, self._bench.agent.max_observation_tokens, True)
        return body.text

    def _scripted(self, generate: Callable[..., Any], prompt_ids: list[list[int]], *arguments: Any, **more: Any) -> Any:
        assert self._work is not None
        steps = [step for step in self._work.steps.values() if step.turn == self._turn]
        assert len(steps) == len(prompt_ids), "TRL keeps the order of the episodes that go on"
        self._lengths = [step.tokens for step in steps]
        ids, logprobs = generate(prompt_ids, *arguments, **more)
        for step, prompt, made in zip(steps, prompt_ids, ids, strict=True):
            self._sent[step.episode, step.turn] = len(prompt)
            self._sampled[step.episode, step.turn] = len(made)
        actions = [self._bench.codec.encode(step.action) for step in steps]
        self._turn += 1
        if logprobs is not None:
            logprobs = [[*own, *[0.0] * len(action)] for own, action in zip(logprobs, actions, strict=True)]
        return [[*made, *action] for made, action in zip(ids, actions, strict=True)], logprobs

    def _script(self, network: Any) -> None:
        """Make the backend sample as many tokens as the script says."""
        if self._backend == "vllm":
            engine = self._trainer.vllm_generation.llm
            answer, bias = engine.generate, dict.fromkeys(self._unsampled, -100.0)

            def answer_scripted(prompts: Any, sampling_params: Any, **settings: Any) -> Any:
                each = [sampling_params.clone() for _ in self._lengths]
                for parameters, length in zip(each, self._lengths, strict=True):
                    parameters.min_tokens = parameters.max_tokens = length
                    parameters.logit_bias = bias
                return answer(prompts, sampling_params=each, **settings)

            engine.generate = answer_scripted
            return
        import torch
        from transformers import LogitsProcessor, LogitsProcessorList

        loop, end = self, network.config.eos_token_id

        class Lengths(LogitsProcessor):
            def __init__(self) -> None:
                self.start: int | None = None

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                if self.start is None:
                    self.start = input_ids.shape[1]
                scores[:, [end, *loop._unsampled]] = -torch.inf
                ends = torch.tensor(loop._lengths) <= input_ids.shape[1] - self.start + 1
                scores[ends] = -torch.inf
                scores[ends, end] = 0.0
                return scores

        make = network.generate

        def make_scripted(**settings: Any) -> Any:
            return make(**settings, logits_processor=LogitsProcessorList([Lengths()]))

        network.generate = make_scripted


def update(trainer: Any) -> None:
    """Have a trainer of transformers take the optimizer step that its loop takes after the gradients."""
    import torch

    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()


def _set_for_cpus(places: int) -> None:
    """Give TRL's vLLM the places and settings that agentrl's has on a CPU, for which GRPOConfig has no names."""
    from trl.generation import vllm_generation

    original = vllm_generation.LLM

    def make(**settings: Any) -> Any:
        return original(**settings | {"enforce_eager": True, "block_size": 32, "max_num_seqs": places})

    vllm_generation.LLM = make
