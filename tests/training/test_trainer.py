"""The trainer against TRL's own pass: same loss, same gradients.

Also what agentrl adds to it: advantages of turns, episodes that are not trained, LLDS and the metrics of a step.
"""

import dataclasses
import random

import numpy as np
import pytest
import torch
from trainers import (
    LENGTH_LIMIT,
    LOSSES,
    likelihoods,
    loss_and_gradients,
    make_policy,
    make_trainer,
    make_trajectories,
    sampled_earlier,
    score,
    tokens_of,
)
from trl import GRPOTrainer

from agentrl.training.batch import batch_tensors, spread_over_tokens
from agentrl.training.sampling import ScoredBatch
from agentrl.training.trainer import NotFiniteError, StratifiedTrainer, grpo_config
from agentrl.types import Action, ActionKind, End, FailureCause, Trajectory, Turn


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradients_equal_those_of_trls_padded_pass(tmp_path, tokenizer, monkeypatch, loss_type):
    rng = random.Random(1)
    trajectories = make_trajectories(6, rng)
    advantages = [rng.gauss(0, 1) for _ in trajectories]
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        ScoredBatch(trajectories, advantages, {}),
        6,
        loss_type=loss_type,
        max_completion_length=LENGTH_LIMIT,
    )
    tensors = trainer._generate_and_score_completions([{"prompt": "0"}] * 6)

    loss, gradients = loss_and_gradients(trainer, tensors, trainer._compute_loss)
    monkeypatch.setattr(
        StratifiedTrainer, "_get_per_token_logps_and_entropies", GRPOTrainer._get_per_token_logps_and_entropies
    )
    expected_loss, expected = loss_and_gradients(trainer, tensors, trainer._compute_loss)

    assert gradients.norm() > 0
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert ((gradients - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("tokens", [1, 70, 200])
def test_it_makes_no_difference_which_episodes_share_a_pass(tmp_path, tokenizer, monkeypatch, tokens):
    rng = random.Random(12)
    trajectories = make_trajectories(7, rng)
    batch = ScoredBatch(trajectories, [rng.gauss(0, 1) for _ in trajectories], {}, trained=[True] * 6 + [False])
    trainer = make_trainer(tmp_path, tokenizer, batch, 7)
    tensors = score(trainer, 7)
    passes, found = [], []
    hook = {
        "hook": lambda model, arguments, named, output: passes.append(named["input_ids"].shape),
        "with_kwargs": True,
    }
    trainer.model.register_forward_hook(**hook)
    for limit in (1_000_000, tokens):
        monkeypatch.setattr("agentrl.training.trainer._PASS_TOKENS", limit)
        found.append(loss_and_gradients(trainer, tensors, trainer._compute_loss))
    assert passes[0][0] == 6
    assert len(passes) > 2
    assert all(episodes == 1 or episodes * length <= tokens for episodes, length in passes[1:])
    (one, expected), (other, gradients) = found
    assert other == pytest.approx(one, rel=1e-5)
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
    failed = Trajectory(
        "x", good[0].question, good[0].prompt_ids, (), End.ENVIRONMENT_FAILURE, cause=FailureCause.RETRIEVER
    )
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

    before = likelihoods(trainer, trajectories).sum(1)
    trainer.train()
    change = likelihoods(trainer, trajectories).sum(1) - before
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
        assert tensors["turn_index"][row][completion].tolist() == trajectory.turn_index
        assert tensors["tool_mask"][row][~completion].sum() == 0
        assert tensors["turn_index"][row][~completion].sum() == 0


@pytest.mark.parametrize("loss_type", LOSSES)
def test_advantages_that_agree_over_an_episodes_turns_equal_one_for_the_episode(tmp_path, tokenizer, loss_type):
    rng = random.Random(7)
    trajectories = make_trajectories(4, rng)
    by_episode = [rng.gauss(0, 1) for _ in trajectories]
    results = []
    for advantages in (by_episode, [[advantage] * 3 for advantage in by_episode]):
        batch = ScoredBatch(trajectories, advantages, {})
        trainer = make_trainer(tmp_path, tokenizer, batch, 4, loss_type=loss_type, max_completion_length=LENGTH_LIMIT)
        results.append(loss_and_gradients(trainer, score(trainer, 4), trainer._compute_loss))
    (loss, gradients), (expected_loss, expected) = results
    assert gradients.norm() > 0
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert torch.allclose(gradients, expected, atol=1e-7)


def test_the_advantage_of_a_turn_acts_on_that_turns_tokens_only(tmp_path, tokenizer):
    trajectories = make_trajectories(3, random.Random(8))
    # The second episode has two turns, the third one; their rows are padded.
    trajectories = [dataclasses.replace(t, turns=t.turns[: 3 - i]) for i, t in enumerate(trajectories)]
    advantages = [[0.0, 2.0, -1.0], [0.5, 0.0, 0.0], [-3.0, 0.0, 0.0]]
    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch(trajectories, advantages, {}), 3, loss_type="dapo")
    tensors = score(trainer, 3)
    assert tensors["advantages"].shape == tensors["completion_ids"].shape
    assert tensors["advantages"][~tensors["completion_mask"].bool()].abs().sum() == 0

    scored = []
    original = trainer._get_per_token_logps_and_entropies

    def keep(*arguments, **options):
        scored.append(original(*arguments, **options))
        scored[0][0].retain_grad()
        return scored[0]

    trainer._get_per_token_logps_and_entropies = keep
    loss_and_gradients(trainer, tensors, trainer._compute_loss)
    tokens = sum(sum(t.action_mask) for t in trajectories)
    for row, trajectory in enumerate(trajectories):
        expected = [
            -advantages[row][turn] / tokens if own else 0.0
            for turn, own in zip(trajectory.turn_index, trajectory.action_mask, strict=True)
        ]
        assert scored[0][0].grad[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-8)


def test_an_episode_that_is_not_trained_adds_nothing_and_is_not_run(tmp_path, tokenizer):
    rng = random.Random(9)
    trajectories = make_trajectories(4, rng)
    batch = ScoredBatch(trajectories, [1.0, 2.0, -1.0, 5.0], {}, trained=[True, False, True, False])
    trainer = make_trainer(tmp_path, tokenizer, batch, 4, beta=0.1)
    run = []
    trainer.model.register_forward_hook(
        lambda model, arguments, named, output: run.append(len(named["input_ids"])), with_kwargs=True
    )
    tensors = score(trainer, 4)
    assert tensors["tool_mask"][[1, 3]].sum() == 0
    assert tensors["num_items_in_batch"] == sum(sum(trajectories[i].action_mask) for i in (0, 2))
    assert sum(run) == 2, "the reference's pass"
    loss, gradients = loss_and_gradients(trainer, tensors, trainer._compute_loss)
    assert sum(run) == 4

    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch(trajectories[::2], [1.0, -1.0], {}), 2, beta=0.1)
    expected_loss, expected = loss_and_gradients(trainer, score(trainer, 2), trainer._compute_loss)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert torch.allclose(gradients, expected, atol=1e-7)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_micro_batch_without_a_trained_episode_leaves_every_gradient_as_it_is(tmp_path, tokenizer, loss_type):
    trajectories = make_trajectories(2, random.Random(10))
    batch = ScoredBatch(trajectories, [1.0, -1.0], {}, trained=[True, False])
    trainer = make_trainer(
        tmp_path, tokenizer, batch, 2, llds_weight=1.0, loss_type=loss_type, max_completion_length=LENGTH_LIMIT
    )
    tensors = score(trainer, 2)
    rows = [{k: v[i : i + 1] if v.dim() else v for k, v in tensors.items()} for i in range(2)]
    _, gradients = loss_and_gradients(trainer, rows[0], trainer._compute_loss)
    trainer.model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    loss = trainer._compute_loss(trainer.model, rows[1])
    loss.backward()
    assert loss.item() == 0.0
    after = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    assert torch.equal(after, gradients)
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, rows[1]).backward()
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_step_without_a_trained_episode_changes_no_weight(tmp_path, tokenizer):
    trajectories = make_trajectories(2, random.Random(11))
    batch = ScoredBatch(trajectories, [1.0, -1.0], {}, trained=[False, False])
    trainer = make_trainer(
        tmp_path, tokenizer, batch, 2, micro_batch=1, llds_weight=1.0, learning_rate=1e-2, weight_decay=0.1
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    logs = trainer.state.log_history[0]
    assert logs["llds/loss"] == 0.0
    assert not any(name.startswith(("ratio/", "logprobs/", "llds/actions")) for name in logs)


def test_the_means_that_a_step_logs_leave_out_episodes_that_are_not_trained(tmp_path, tokenizer):
    trajectories = make_trajectories(4, random.Random(12))
    whole = ScoredBatch(trajectories, [1.0, 1.0, -1.0, 1.0], {}, trained=[True, False, True, False])
    half = ScoredBatch(trajectories[::2], [1.0, -1.0], {})
    logs = []
    for batch in (whole, half):
        trainer = make_trainer(tmp_path, tokenizer, batch, len(batch.trajectories), micro_batch=1, beta=0.1)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    names = {"entropy", "kl", "logprobs/difference_max", "logprobs/difference_mean"}
    names |= {name for name in logs[1] if name.startswith(("clip_ratio/", "ratio/"))}
    assert len(names) == 12
    for name in names:
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-6), name


def test_a_mean_over_tokens_does_not_depend_on_the_micro_batches(tmp_path, tokenizer):
    batch = ScoredBatch(make_trajectories(4, random.Random(13)), [1.0, 1.0, -1.0, 1.0], {})
    logs = []
    for micro_batch in (1, 4):
        trainer = make_trainer(tmp_path, tokenizer, batch, 4, micro_batch=micro_batch)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["logprobs/difference_mean"] == pytest.approx(logs[1]["logprobs/difference_mean"], abs=1e-5)


def test_an_episode_that_failed_after_its_first_turn_is_not_trained_even_if_the_batch_says_so():
    good, failed = make_trajectories(2, random.Random(21))
    failed = dataclasses.replace(failed, end=End.ENVIRONMENT_FAILURE, cause=FailureCause.RETRIEVER, reward=None)
    mask = batch_tensors([good, failed], 0, trained=[True, True])["tool_mask"]
    assert mask.sum(1).tolist() == [sum(good.action_mask), 0]


def test_trained_must_have_an_entry_for_each_trajectory():
    with pytest.raises(ValueError, match="shorter"):
        batch_tensors(make_trajectories(2, random.Random(0)), 0, trained=[True])


def test_dr_grpo_is_refused_without_the_length_that_it_divides_by(tmp_path):
    with pytest.raises(ValueError, match="max_completion_length"):
        grpo_config(output_dir=str(tmp_path), loss_type="dr_grpo", use_cpu=True, bf16=False)


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        ("advantage", r"step 1: an advantage is nan; the optimizer did not .*: check the estimator and its rewards"),
        ("loss", r"step 1: the loss is -?inf; .* lower training.learning_rate or training.max_grad_norm"),
        ("gradient", r"step 1: the gradient norm is nan; .* lower training.learning_rate"),
    ],
)
def test_a_number_that_is_not_finite_stops_the_training_before_any_weight_changes(
    tmp_path, tokenizer, monkeypatch, poison, message
):
    advantages = [1.0, float("nan") if poison == "advantage" else -1.0]
    batch = ScoredBatch(make_trajectories(2, random.Random(24)), advantages, {})
    trainer = make_trainer(tmp_path, tokenizer, batch, 2, micro_batch=1, learning_rate=1e-2)
    if poison == "loss":
        compute_loss = GRPOTrainer._compute_loss
        monkeypatch.setattr(
            GRPOTrainer, "_compute_loss", lambda self, *arguments: compute_loss(self, *arguments) * float("inf")
        )
    if poison == "gradient":
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trained[-1].register_hook(lambda gradient: gradient * float("nan"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(NotFiniteError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(p.equal(before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize("by_turn", [False, True])
def test_ratio_quantiles_are_over_the_tokens_of_advantage_at_least_0_in_the_whole_step(tmp_path, tokenizer, by_turn):
    rng = random.Random(19)
    advantages = [[rng.choice([-1.0, 0.0, 1.0])] * 3 for _ in range(6)]
    if by_turn:
        advantages = [[rng.choice([-1.0, 0.0, 1.0]) for _ in range(3)] for _ in range(6)]
    falls = [[rng.gauss(0, 0.3) for _ in range(3)] for _ in range(6)]
    trajectories = make_trajectories(6, rng)
    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch([], [], {}), 2)
    trajectories = sampled_earlier(trajectories, likelihoods(trainer, trajectories), falls)
    batch = ScoredBatch(
        trajectories, advantages if by_turn else [row[0] for row in advantages], {}, trained=[True] * 5 + [False]
    )
    trainer = make_trainer(tmp_path, tokenizer, batch, 6, micro_batch=2)
    trainer.train()
    ratios = [
        np.exp(-falls[row][turn])
        for row in range(5)
        for turn in range(3)
        if advantages[row][turn] >= 0
        for _ in range(tokens_of(trajectories[row], turn))
    ]
    logs = trainer.state.log_history[0]
    found = [logs[f"ratio/positive_{name}"] for name in ("q01", "q50", "q99")]
    assert found == pytest.approx(np.quantile(ratios, (0.01, 0.5, 0.99)).tolist(), rel=1e-4)
    assert "ratio/positive_q50" not in trainer.state.log_history[1], "a later log holds only what came since"


def test_without_a_token_of_advantage_at_least_0_no_ratio_is_logged(tmp_path, tokenizer):
    batch = ScoredBatch(make_trajectories(2, random.Random(20)), [-1.0, -2.0], {})
    trainer = make_trainer(tmp_path, tokenizer, batch, 2)
    trainer.train()
    assert not any(name.startswith("ratio/") for name in trainer.state.log_history[0])
    assert "logprobs/difference_max" in trainer.state.log_history[0]


def test_turns_beyond_those_that_are_trained_have_no_advantage():
    """An episode that failed, or that fills up the batch, may have more turns than any other."""
    advantages = torch.tensor([[2.0, 3.0], [0.0, 0.0]])
    turn_index = torch.tensor([[0, 1, 1, 0], [0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    expected = torch.tensor([[2.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(spread_over_tokens(advantages, turn_index, mask), expected)
