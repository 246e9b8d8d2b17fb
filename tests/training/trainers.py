"""Small trainers with random weights, and the trajectories that they train on."""

import dataclasses

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from trl import GRPOTrainer

from agentrl.training.ranks import ALONE
from agentrl.training.sampling import ScoredBatch
from agentrl.training.scoring import Scorer
from agentrl.training.settings import grpo_config
from agentrl.training.trainer import StratifiedTrainer
from agentrl.training.updates import NOTHING_ADDED, Updates
from agentrl.types import ANSWER, Action, End, Question, Trajectory, Turn

VOCABULARY = 300


LENGTH_LIMIT = 64

ONE_UPDATE = Updates(group_size=1)


def make_model():
    return tiny_llama(VOCABULARY, hidden=32, max_position_embeddings=512, tie_word_embeddings=True)


def make_policy():
    model = make_model()
    policy = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return policy


def make_trajectories(count, rng):
    question = Question("q", "?", ("a",))
    return [
        Trajectory(
            id=str(i),
            question=question,
            prompt_ids=tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 9))),
            turns=tuple(make_turn(rng, last=turn == 2) for turn in range(3)),
            end=End.ANSWERED,
            reward=float(rng.random() < 0.5),
        )
        for i in range(count)
    ]


def make_turn(rng, last):
    ids = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12)))
    observation = () if last else tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20)))
    logprobs = tuple(-rng.random() for _ in ids)
    return Turn(ids, logprobs, "", Action(ANSWER, "a"), 0, (), observation)


def make_trainer(
    tmp_path,
    tokenizer,
    batch,
    policy=None,
    *,
    tokens=10_000,
    packing="prefix_tree",
    merge=True,
    dtype=None,
    updates=ONE_UPDATE,
    additions=NOTHING_ADDED,
    on_trained=lambda episodes: None,
    ranks=ALONE,
    prove_weights=True,
    reference=None,
    kind=StratifiedTrainer,
    optimizer=None,
    **settings,
):
    """A trainer that gets `batch` for each step, which all of its episodes share one update on unless `updates` says else."""
    return kind(
        model=policy or make_policy(),
        processing_class=tokenizer,
        sample=lambda: batch,
        scorer=lambda model: Scorer(model, tokens=tokens, packing=packing, merge=merge, dtype=dtype),
        updates=updates,
        additions=additions,
        on_trained=on_trained,
        ranks=ranks,
        prove_weights=prove_weights,
        reference=reference,
        optimizer=optimizer,
        args=make_args(tmp_path, **settings),
    )


def make_args(tmp_path, **settings):
    chosen = {"max_steps": 1, "max_completion_length": LENGTH_LIMIT, "logging_steps": 1} | settings
    return grpo_config(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, **chosen)


def loss_and_gradients(trainer, whole):
    """Loss and all gradients of one minibatch."""
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.backward(whole)
    return loss.item(), gradients_of(trainer.model)


def trls_loss_and_gradients(tmp_path, tokenizer, whole, policy=None, **settings):
    """The same by TRL alone, which pads every episode and computes every logit."""
    plain = GRPOTrainer(
        model=policy or make_policy(),
        processing_class=tokenizer,
        reward_funcs=lambda **_: [],
        train_dataset=Dataset.from_dict({"prompt": [""]}),
        args=make_args(tmp_path, **settings),
    )
    plain.model.train()
    plain.current_gradient_accumulation_steps = 1
    loss = plain._compute_loss(plain.model, whole.tensors | {"num_items_in_batch": whole.own.sum()})
    loss.backward()
    return loss.item(), gradients_of(plain.model)


def gradients_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def likelihoods(trainer, trajectories):
    """The trainer's log-probabilities [B, C] of the model's own tokens."""
    return trainer._logps_of_all_ranks(trainer.whole_batch(ScoredBatch(trajectories, [1.0] * len(trajectories), {})))


def logged(trainer):
    """What the trainer adds to a step's metrics."""
    logs = {"loss": 0.0}
    trainer.log(logs)
    return logs


def sampled_earlier(trajectories, policy_logps, falls):
    """The trajectories as sampled by a policy under which each token of row r, turn t was falls[r][t] likelier (in nats)
    than it is in `policy_logps`."""
    changed = []
    for trajectory, logps, by_turn in zip(trajectories, policy_logps.tolist(), falls, strict=True):
        old = [value + by_turn[t] for value, t in zip(logps, trajectory.turn_index, strict=False)]
        turns, start = [], 0
        for turn in trajectory.turns:
            turns.append(dataclasses.replace(turn, logprobs=tuple(old[start : start + len(turn.token_ids)])))
            start += len(turn.token_ids) + len(turn.observation_ids)
        changed.append(dataclasses.replace(trajectory, turns=tuple(turns)))
    return changed


def tokens_of(trajectory, turn):
    return len(trajectory.turns[turn].token_ids)
