"""The whole method on one page: sample, score, stratify, compare, update. No Ray, no vLLM, no trainer.

    python examples/loop.py [--steps 12] [--seed 0] [--out ADAPTER]

It trains the pocket policy to search the demo world on one idle CPU core, in about two minutes, with a search engine of
twenty lines.
`agentrl train --config pocket.yaml` takes the same steps with vLLM, Lucene, checkpoints and evaluation.
"""

import argparse
import asyncio
import json
import math
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from agentrl.advantages import compute
from agentrl.advantages.strata import get_stratifier
from agentrl.agent.codec import Codec
from agentrl.agent.episode import Agent
from agentrl.config import Config, load_config
from agentrl.data.questions import read_questions
from agentrl.demo.world import write_demo
from agentrl.engines import make_engine
from agentrl.models import load_tokenizer, resolve_model
from agentrl.rewards import exact_match
from agentrl.training.adapter import adapter_files, load_adapted, save_adapter
from agentrl.training.batch import batch_tensors
from agentrl.types import Question, Trajectory, TrajectoryGroup
from retrievers.base import Hit

QUESTIONS_PER_STEP, GROUP_SIZE = 8, 8
ALPHA = 0.8
LEARNING_RATE = 1e-3
# So many episodes are in one forward pass.
ROWS = 16


class WordIndex:
    """BM25 over passages in memory (Robertson and Zaragoza 2009), with k1 0.9 and b 0.4; see `retrievers.base.Retriever`."""

    def __init__(self, corpus: Path) -> None:
        self.passages = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
        words = [Counter(words_of(passage["contents"])) for passage in self.passages]
        mean = sum(count.total() for count in words) / len(words)
        self.weights: dict[str, dict[int, float]] = defaultdict(dict)
        for number, count in enumerate(words):
            for word, times in count.items():
                self.weights[word][number] = times / (times + 0.9 * (0.6 + 0.4 * count.total() / mean))

    async def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [self.best(query, k) for query in queries]

    def best(self, query: str, k: int) -> list[Hit]:
        scores: Counter[int] = Counter()
        for word in words_of(query):
            found = self.weights.get(word, {})
            rarity = math.log(1 + (len(self.passages) - len(found) + 0.5) / (len(found) + 0.5))
            for number, weight in found.items():
                scores[number] += rarity * weight
        return [Hit(self.passages[n]["id"], self.passages[n]["contents"], s) for n, s in scores.most_common(k)]


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


async def sample_group(agent: Agent, question: Question, step: int, seed: int) -> TrajectoryGroup:
    """Sample the episodes of one question that are compared with one another."""
    episodes = await asyncio.gather(
        *(
            # The temperature is 1, so that what is sampled is what is trained.
            agent.run(question, f"{step}/{question.id}/{number}", temperature=1.0, seed=seed, timeout=120.0)
            for number in range(GROUP_SIZE)
        )
    )
    # An episode whose environment failed has no reward; one that answered wrongly or not at all has 0.
    scored = [episode.with_reward(exact_match(episode)) if episode.valid else episode for episode in episodes]
    return TrajectoryGroup(question, tuple(scored), GROUP_SIZE)


def log_probabilities(policy: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the policy's log-probabilities [B, C] of the completion's tokens."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = policy(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    width = batch["completion_ids"].shape[1]
    # The logits at a token are about the next one.
    return logits[:, -width - 1 : -1].log_softmax(-1).gather(2, batch["completion_ids"][:, :, None]).squeeze(2)


def update(
    policy: Any,
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Trajectory],
    advantages: Sequence[float],
    pad_id: int,
) -> float:
    """Take one optimizer step on N episodes and their advantages [N].

    Each of the model's own tokens pulls with its episode's advantage, and a passage that was read with none. All tokens
    weigh the same (arXiv 2503.14476). The policy is the one that sampled, so the ratio of PPO is 1 and nothing is clipped.

    Returns:
        the largest difference between the sampler's log-probability of a token and the trainer's, in nats.
    """
    total = sum(episode.model_tokens for episode in episodes if episode.valid)
    largest = 0.0
    optimizer.zero_grad()
    for start in range(0, len(episodes), ROWS):
        batch = batch_tensors(episodes[start : start + ROWS], pad_id)
        own = batch["tool_mask"].bool()
        logps = log_probabilities(policy, batch)
        earned = torch.tensor(advantages[start : start + ROWS])[:, None]
        (-(earned * logps * own).sum() / total).backward()
        largest = max(largest, (logps.detach() - batch["sampling_per_token_logps"])[own].abs().max().item())
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return largest


async def train(config: Config, data: Path, steps: int, seed: int, report: Callable[[str], None] = print) -> Any:
    """Train the policy of `config` on the demo world in `data`; return it, a PeftModel. `report` gets a line for each step."""
    model = resolve_model(config.model.path)
    tokenizer = load_tokenizer(model)
    questions = read_questions(data / "train.jsonl")
    draw = random.Random(seed)
    torch.manual_seed(seed)
    # What is trained: a LoRA adapter over the pocket policy. The engine has the same weights for sampling.
    policy = load_adapted(config, model)
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), LEARNING_RATE, weight_decay=0.0)
    engine = make_engine(config, model)
    agent = Agent(config.agent, Codec(tokenizer), engine, WordIndex(data / "corpus.jsonl"), config.retriever.k)
    stratify = get_stratifier("searches")
    try:
        for step in range(1, steps + 1):
            # 1. Sample groups of episodes: a group is one question, answered GROUP_SIZE times by the present policy.
            await engine.load_adapter(step, adapter_files(policy))
            asked = draw.sample(questions, QUESTIONS_PER_STEP)
            groups = await asyncio.gather(*(sample_group(agent, question, step, seed) for question in asked))
            episodes = [episode for group in groups for episode in group.trajectories]

            # 2. Sort each group into strata: episodes that searched equally often.
            strata = [key for group in groups for key in stratify(group.trajectories)]

            # 3. Compare each episode with its own kind, and with a share of 1 - ALPHA with its whole group.
            advantages = compute(
                [math.nan if episode.reward is None else episode.reward for episode in episodes],
                groups=[episode.question.id for episode in episodes],
                strata=strata,
                estimator="stratified",
                alpha=ALPHA,
                group_size=GROUP_SIZE,
            )

            # 4. Make what was better than its kind more likely, and what was worse less.
            off = update(policy, optimizer, episodes, advantages.values, tokenizer.pad_token_id)

            shares = "  ".join(
                f"{stratum.key}: {stratum.rollouts} episodes, reward {stratum.reward:.2f}"
                for stratum in advantages.report.per_stratum
            )
            rewards = [episode.reward for episode in episodes if episode.valid]
            report(f"step {step}/{steps}  reward {sum(rewards) / len(rewards):.3f}  by searches  {shares}")
            # Sampler and trainer compute the same policy, or the update would be another than the one that is meant.
            assert off < 1e-3, f"the sampler's log-probabilities are {off} nats away from the trainer's"
    finally:
        await engine.close()
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the pocket policy to search, on one page.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the adapter")
    asked = parser.parse_args()
    config = load_config("pocket.yaml", ["engine.kind=transformers", f"seed={asked.seed}"])
    with tempfile.TemporaryDirectory() as folder:
        data = write_demo(Path(folder) / "demo").folder
        policy = asyncio.run(train(config, data, asked.steps, asked.seed))
    if asked.out is not None:
        save_adapter(policy, asked.out)


if __name__ == "__main__":
    main()
