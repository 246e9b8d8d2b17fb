"""The trainer against TRL's own pass: same loss, same gradients, and every private name that it relies on."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOTrainer

from agentrl.training.sampling import ScoredBatch
from agentrl.training.trainer import PRIVATE_HOOKS, StratifiedTrainer, batch_tensors, grpo_config
from agentrl.types import Action, ActionKind, End, Question, Trajectory, Turn

VOCABULARY = 300


def make_policy(dropout=0.0):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )
    policy = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    )
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


def make_trainer(tmp_path, tokenizer, batch, episodes, policy=None, **settings):
    return StratifiedTrainer(
        model=policy or make_policy(),
        processing_class=tokenizer,
        questions=4,
        sample=lambda positions: batch,
        args=grpo_config(
            output_dir=str(tmp_path),
            per_device_train_batch_size=episodes,
            num_generations=episodes,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
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


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_loss_and_gradients_equal_those_of_trls_padded_pass(tmp_path, tokenizer, monkeypatch, loss_type):
    rng = random.Random(1)
    trajectories = make_trajectories(6, rng)
    advantages = [rng.gauss(0, 1) for _ in trajectories]
    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch(trajectories, advantages, {}), 6, loss_type=loss_type)
    tensors = trainer._generate_and_score_completions([{"prompt": "0"}] * 6)

    loss, gradients = loss_and_gradients(trainer, tensors, trainer._compute_loss)
    monkeypatch.setattr(
        StratifiedTrainer, "_get_per_token_logps_and_entropies", GRPOTrainer._get_per_token_logps_and_entropies
    )
    expected_loss, expected = loss_and_gradients(trainer, tensors, trainer._compute_loss)

    assert gradients.norm() > 0
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert ((gradients - expected).norm() / expected.norm()).item() < 1e-5


def test_tokens_of_the_environment_do_not_touch_the_gradient_as_targets(tmp_path, tokenizer):
    """Changing the last observation token of an episode, which nothing of the model's follows, changes nothing."""
    rng = random.Random(2)
    (base,) = make_trajectories(1, rng)
    tail = Turn((5, 6), (-0.1, -0.2), "", Action(ActionKind.SEARCH, "q"), 0, None, (7, 8, 9))
    changed_tail = Turn((5, 6), (-0.1, -0.2), "", Action(ActionKind.SEARCH, "q"), 0, None, (200, 201, 202))
    results = []
    for last in (tail, changed_tail):
        episode = Trajectory("a", base.question, base.prompt_ids, (*base.turns, last), End.TRUNCATED, reward=0.0)
        other = Trajectory("b", base.question, base.prompt_ids, base.turns, End.ANSWERED, reward=1.0)
        trainer = make_trainer(tmp_path, tokenizer, ScoredBatch([episode, other], [1.0, -1.0], {}), 2)
        tensors = trainer._generate_and_score_completions([{"prompt": "0"}] * 2)
        results.append(loss_and_gradients(trainer, tensors, trainer._compute_loss))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_an_episode_whose_environment_failed_adds_nothing_to_loss_or_normaliser(tmp_path, tokenizer):
    rng = random.Random(3)
    good = make_trajectories(2, rng)
    failed = Trajectory("x", good[0].question, good[0].prompt_ids, (), End.ENVIRONMENT_FAILURE, failure="retriever")
    tensors = batch_tensors([*good, failed], pad_id=0)
    assert tensors["tool_mask"][2].sum() == 0
    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch([*good, failed], [1.0, -1.0, 0.0], {}), 3)
    with_failed = trainer._generate_and_score_completions([{"prompt": "0"}] * 3)
    loss, gradients = loss_and_gradients(trainer, with_failed, trainer._compute_loss)
    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch(good, [1.0, -1.0], {}), 2)
    without = trainer._generate_and_score_completions([{"prompt": "0"}] * 2)
    expected_loss, expected = loss_and_gradients(trainer, without, trainer._compute_loss)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert torch.allclose(gradients, expected, atol=1e-6)


def test_the_reference_of_the_kl_term_is_the_model_as_it_was_when_training_began(tmp_path, tokenizer):
    rng = random.Random(4)
    trajectories = make_trajectories(2, rng)
    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch(trajectories, [1.0, -1.0], {}), 2, beta=0.1)
    expected = []
    with torch.no_grad():
        for trajectory in trajectories:
            ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
            logps = trainer.model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(trajectory.prompt_ids)
            scores = [
                logps[start + offset - 1, token].item() if own else 0.0
                for offset, (token, own) in enumerate(
                    zip(trajectory.completion_ids, trajectory.action_mask, strict=True)
                )
            ]
            expected.append(scores)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.3)
    tensors = trainer._generate_and_score_completions([{"prompt": "0"}] * 2)
    for row, scores in enumerate(expected):
        assert tensors["ref_per_token_logps"][row, : len(scores)].tolist() == pytest.approx(scores, abs=1e-5)


def test_a_step_makes_rewarded_episodes_likelier_than_unrewarded_ones(tmp_path, tokenizer):
    rng = random.Random(6)
    trajectories = make_trajectories(4, rng)
    advantages = [1.0, -1.0, 1.0, -1.0]
    policy = make_policy()
    trainer = make_trainer(
        tmp_path, tokenizer, ScoredBatch(trajectories, advantages, {}), 4, policy, learning_rate=1e-3, weight_decay=0.0
    )

    def likelihoods():
        tensors = batch_tensors(trajectories, 0)
        trainer._scored_mask = tensors["tool_mask"]
        ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1)
        attended = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1)
        with torch.no_grad():
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, attended, tensors["completion_ids"].size(1)
            )
        return logps.sum(1)

    before = likelihoods()
    trainer.train()
    change = likelihoods() - before
    assert (change * torch.tensor(advantages)).sum() > 0
    assert change[[0, 2]].mean() > change[[1, 3]].mean()


def test_batch_tensors_align_ids_masks_and_sampler_logprobs():
    rng = random.Random(5)
    trajectories = make_trajectories(3, rng)
    tensors = batch_tensors(trajectories, pad_id=299)
    for row, trajectory in enumerate(trajectories):
        prompt, completion = tensors["prompt_mask"][row].bool(), tensors["completion_mask"][row].bool()
        assert tensors["prompt_ids"][row][prompt].tolist() == list(trajectory.prompt_ids)
        assert tensors["completion_ids"][row][completion].tolist() == trajectory.completion_ids
        assert tensors["tool_mask"][row][completion].bool().tolist() == trajectory.action_mask
        assert torch.allclose(
            tensors["sampling_per_token_logps"][row][completion], torch.tensor(trajectory.logprobs), atol=1e-6
        )
        assert tensors["tool_mask"][row][~completion].sum() == 0


@pytest.mark.parametrize("name", PRIVATE_HOOKS)
def test_trl_still_has_the_private_name_that_the_trainer_relies_on(tmp_path, tokenizer, name):
    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch([], [], {}), 2)
    assert hasattr(GRPOTrainer, name) or hasattr(trainer, name)
