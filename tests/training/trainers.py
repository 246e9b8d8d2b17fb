"""Small trainers with random weights, and the trajectories that they train on."""

import dataclasses

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from agentrl.training.batch import batch_tensors
from agentrl.training.trainer import StratifiedTrainer, grpo_config
from agentrl.types import Action, ActionKind, End, Question, Trajectory, Turn

VOCABULARY = 300


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo"]


LENGTH_LIMIT = 64


def make_policy():
    model = tiny_llama(VOCABULARY, hidden=32, max_position_embeddings=512, tie_word_embeddings=True)
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
    return Turn(ids, logprobs, "", Action(ActionKind.ANSWER, "a"), 0, None, observation)


def make_trainer(
    tmp_path,
    tokenizer,
    batch,
    episodes,
    policy=None,
    micro_batch=None,
    llds_weight=0.0,
    llds_tolerance=1e-3,
    **settings,
):
    return StratifiedTrainer(
        model=policy or make_policy(),
        processing_class=tokenizer,
        questions=4,
        sample=lambda episodes: batch,
        llds_weight=llds_weight,
        llds_tolerance=llds_tolerance,
        args=grpo_config(
            output_dir=str(tmp_path),
            per_device_train_batch_size=micro_batch or episodes,
            gradient_accumulation_steps=episodes // (micro_batch or episodes),
            num_generations=episodes,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        ),
    )


def loss_and_gradients(trainer, tensors, compute_loss):
    trainer.model.zero_grad()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = compute_loss(trainer.model, dict(tensors))
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return loss.item(), gradients.clone()


def score(trainer, episodes):
    return trainer._generate_and_score_completions([{"prompt": "0"}] * episodes)


def likelihoods(trainer, trajectories):
    """The trainer's log-probabilities [B, C] of the model's own tokens."""
    tensors = batch_tensors(trajectories, 0)
    trainer._scored_mask = tensors["tool_mask"]
    ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1)
    attended = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1)
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attended, tensors["completion_ids"].size(1)
        )[0]


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
