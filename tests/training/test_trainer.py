"""The trainer against TRL's own pass: same loss, same gradients.

Also what agentrl adds to it: advantages of turns, episodes that do not run, several updates and the metrics of a step.
"""

import dataclasses
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainers import (
    likelihoods,
    loss_and_gradients,
    make_model,
    make_policy,
    make_trainer,
    make_trajectories,
    trls_loss_and_gradients,
)

from agentrl.training.batch import batch_tensors, spread_over_tokens
from agentrl.training.sampling import ScoredBatch
from agentrl.training.settings import LOSSES, grpo_config
from agentrl.training.updates import Additions
from agentrl.types import SEARCH, Action, End, FailureCause, Trajectory, Turn


def one_token_turns(count, rng):
    made = []
    for trajectory in make_trajectories(count, rng):
        turns = [dataclasses.replace(t, token_ids=t.token_ids[:1], logprobs=t.logprobs[:1]) for t in trajectory.turns]
        made.append(dataclasses.replace(trajectory, turns=tuple(turns)))
    return made


def deep_sharing(count, rng):
    """Episodes of one prompt whose first turn is the same, and of some the second as well."""
    first, *others = make_trajectories(count, rng)
    made = [first]
    for number, other in enumerate(others):
        shared = 1 + number % 2
        made.append(
            dataclasses.replace(
                other, prompt_ids=first.prompt_ids, turns=(*first.turns[:shared], *other.turns[shared:])
            )
        )
    return made


SHAPES = {
    "no sharing": lambda rng: make_trajectories(6, rng),
    "deep sharing": lambda rng: deep_sharing(6, rng),
    "one-token turns": lambda rng: one_token_turns(5, rng),
    "one episode": lambda rng: make_trajectories(1, rng),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_those_of_trls_padded_pass(tmp_path, tokenizer, loss, shape):
    """With ratios on both sides of the clip, a KL term, and packs of any size."""
    rng = random.Random(1)
    trajectories = SHAPES[shape](rng)
    batch = ScoredBatch(trajectories, [rng.gauss(0, 1) for _ in trajectories], {})
    settings = {"loss": loss, "beta": 0.1, "epsilon_high": 5.0 if loss == "cispo" else 0.28, "delta": 1.6}
    trainer = make_trainer(tmp_path, tokenizer, batch, tokens=90, **settings)
    whole = trainer.whole_batch(batch)
    # vespo weighs an episode by the product of its ratios, which must not be next to 0.
    spread = 0.05 if loss == "vespo" else 0.3
    noise = torch.randn(whole.own.shape, generator=torch.Generator().manual_seed(2)) * spread
    whole.tensors["old_per_token_logps"] = (likelihoods(trainer, trajectories) + noise) * whole.own

    expected_loss, expected = trls_loss_and_gradients(tmp_path, tokenizer, whole, **settings)
    found_loss, found = loss_and_gradients(trainer, whole)
    assert expected.norm() > 0
    assert found_loss == pytest.approx(expected_loss, abs=1e-5, rel=1e-5)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("packing", ["prefix_tree", "episodes", "none"])
@pytest.mark.parametrize("tokens", [1, 70, 10_000])
def test_it_makes_no_difference_which_episodes_share_a_pass_nor_in_which_order_they_stand(
    tmp_path, tokenizer, packing, tokens
):
    rng = random.Random(12)
    trajectories = deep_sharing(7, rng)
    advantages = [rng.gauss(0, 1) for _ in trajectories]
    found = []
    for order in (list(range(7)), rng.sample(range(7), 7)):
        batch = ScoredBatch(
            [trajectories[i] for i in order],
            [advantages[i] for i in order],
            {},
            trained=[i != 3 for i in order],
        )
        settings = {"tokens": 10_000, "packing": "none"} if not found else {"tokens": tokens, "packing": packing}
        trainer = make_trainer(tmp_path, tokenizer, batch, loss="bnpo", **settings)
        found.append(loss_and_gradients(trainer, trainer.whole_batch(batch)))
    (one, expected), (other, gradients) = found
    assert other == pytest.approx(one, rel=1e-5)
    assert ((gradients - expected).norm() / expected.norm()).item() < 1e-5


def test_episodes_of_advantage_0_do_not_run_and_count_in_normalisers_alone(tmp_path, tokenizer):
    rng = random.Random(30)
    trajectories = make_trajectories(6, rng)
    batch = ScoredBatch(trajectories, [0.0, 1.0, 0.0, -1.0, 0.0, 0.5], {})
    for loss in LOSSES:
        trainer = make_trainer(tmp_path, tokenizer, batch, packing="none", loss=loss)
        whole = trainer.whole_batch(batch)
        assert whole.runs.tolist() == [False, True, False, True, False, True]
        everyone = dataclasses.replace(whole, runs=torch.ones(6, dtype=torch.bool))
        loss_of_all, of_all = loss_and_gradients(trainer, everyone)
        loss_of_some, of_some = loss_and_gradients(trainer, whole)
        assert torch.equal(of_some, of_all), loss
        assert loss_of_some == pytest.approx(loss_of_all, abs=1e-7)
    for additions, beta in ((Additions(entropy_bonus=0.1), 0.0), (Additions(llds_weight=0.1), 0.0), (Additions(), 0.1)):
        trainer = make_trainer(tmp_path, tokenizer, batch, additions=additions, beta=beta)
        assert trainer.whole_batch(batch).runs.all(), "a term of the loss acts on them"


def test_tokens_of_the_environment_do_not_touch_the_gradient_as_targets(tmp_path, tokenizer):
    """Changing the last observation token of an episode, which nothing of the model's follows, changes nothing."""
    rng = random.Random(2)
    (base,) = make_trajectories(1, rng)
    tail = Turn((5, 6), (-0.1, -0.2), "", Action(SEARCH, "q"), 0, (), (7, 8, 9))
    changed_tail = Turn((5, 6), (-0.1, -0.2), "", Action(SEARCH, "q"), 0, (), (200, 201, 202))
    results = []
    for last in (tail, changed_tail):
        episode = Trajectory("a", base.question, base.prompt_ids, (*base.turns, last), End.TRUNCATED, reward=0.0)
        other = Trajectory("b", base.question, base.prompt_ids, base.turns, End.ANSWERED, reward=1.0)
        batch = ScoredBatch([episode, other], [1.0, -1.0], {})
        trainer = make_trainer(tmp_path, tokenizer, batch)
        results.append(loss_and_gradients(trainer, trainer.whole_batch(batch)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_an_episode_whose_environment_failed_adds_nothing_to_loss_or_normaliser(tmp_path, tokenizer):
    rng = random.Random(3)
    good = make_trajectories(2, rng)
    failed = Trajectory(
        "x", good[0].question, good[0].prompt_ids, (), End.ENVIRONMENT_FAILURE, cause=FailureCause.RETRIEVER
    )
    assert batch_tensors([*good, failed], pad_id=0)["tool_mask"][2].sum() == 0
    results = []
    for batch in (ScoredBatch([*good, failed], [1.0, -1.0, 0.0], {}), ScoredBatch(good, [1.0, -1.0], {})):
        trainer = make_trainer(tmp_path, tokenizer, batch)
        results.append(loss_and_gradients(trainer, trainer.whole_batch(batch)))
    (loss, gradients), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert torch.allclose(gradients, expected, atol=1e-6)


def test_the_reference_of_the_kl_term_is_the_model_as_it_was_when_training_began(tmp_path, tokenizer):
    rng = random.Random(4)
    trajectories = make_trajectories(2, rng)
    batch = ScoredBatch(trajectories, [1.0, -1.0], {})
    expected, plain = [], make_policy()
    with torch.no_grad():
        for trajectory in trajectories:
            ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
            logps = plain(input_ids=ids).logits[0].log_softmax(-1)
            start = len(trajectory.prompt_ids)
            expected.append(
                [
                    logps[start + offset - 1, token].item() if own else 0.0
                    for offset, (token, own) in enumerate(
                        zip(trajectory.completion_ids, trajectory.action_mask, strict=True)
                    )
                ]
            )
    trainer = make_trainer(tmp_path, tokenizer, batch, beta=0.1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.3)
    reference = trainer.whole_batch(batch).tensors["ref_per_token_logps"]
    for row, scores in enumerate(expected):
        assert reference[row, : len(scores)].tolist() == pytest.approx(scores, abs=1e-5)


def test_a_step_makes_rewarded_episodes_likelier_than_unrewarded_ones(tmp_path, tokenizer):
    rng = random.Random(6)
    trajectories = make_trajectories(4, rng)
    advantages = [1.0, -1.0, 1.0, -1.0]
    trainer = make_trainer(tmp_path, tokenizer, ScoredBatch(trajectories, advantages, {}), learning_rate=1e-3)
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


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"vespo"}))
def test_advantages_that_agree_over_an_episodes_turns_equal_one_for_the_episode(tmp_path, tokenizer, loss):
    rng = random.Random(7)
    trajectories = make_trajectories(4, rng)
    by_episode = [rng.gauss(0, 1) for _ in trajectories]
    results = []
    for advantages in (by_episode, [[advantage] * 3 for advantage in by_episode]):
        batch = ScoredBatch(trajectories, advantages, {})
        trainer = make_trainer(tmp_path, tokenizer, batch, loss=loss)
        results.append(loss_and_gradients(trainer, trainer.whole_batch(batch)))
    (found, gradients), (expected_loss, expected) = results
    assert gradients.norm() > 0
    assert found == pytest.approx(expected_loss, abs=1e-6)
    assert torch.allclose(gradients, expected, atol=1e-7)


def test_the_advantage_of_a_turn_acts_on_that_turns_tokens_only(tmp_path, tokenizer):
    trajectories = make_trajectories(3, random.Random(8))
    # The second episode has two turns, the third one; their rows are padded.
    trajectories = [dataclasses.replace(t, turns=t.turns[: 3 - i]) for i, t in enumerate(trajectories)]
    advantages = [[0.0, 2.0, -1.0], [0.5, 0.0, 0.0], [-3.0, 0.0, 0.0]]
    batch = ScoredBatch(trajectories, advantages, {})
    trainer = make_trainer(tmp_path, tokenizer, batch, packing="none")
    whole = trainer.whole_batch(batch)
    assert whole.tensors["advantages"].shape == whole.own.shape
    _, gradients = loss_and_gradients(trainer, whole)

    policy = make_policy()
    total = torch.zeros(())
    tokens = sum(sum(t.action_mask) for t in trajectories)
    for row, trajectory in enumerate(trajectories):
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
        logps = policy(input_ids=ids).logits[0].log_softmax(-1)
        for offset, (turn, own) in enumerate(zip(trajectory.turn_index, trajectory.action_mask, strict=True)):
            at = len(trajectory.prompt_ids) + offset
            if own:
                total = total - advantages[row][turn] * logps[at - 1, ids[0, at]] / tokens
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    assert ((gradients - expected).norm() / expected.norm()).item() < 1e-5


def test_an_episode_that_is_not_trained_adds_nothing_and_is_not_run(tmp_path, tokenizer):
    rng = random.Random(9)
    trajectories = make_trajectories(4, rng)
    batch = ScoredBatch(trajectories, [1.0, 2.0, -1.0, 5.0], {}, trained=[True, False, True, False])
    trainer = make_trainer(tmp_path, tokenizer, batch, beta=0.1)
    whole = trainer.whole_batch(batch)
    assert whole.runs.tolist() == [True, False, True, False]
    assert whole.own[[1, 3]].sum() == 0
    assert whole.tensors["ref_per_token_logps"][[1, 3]].abs().sum() == 0
    loss, gradients = loss_and_gradients(trainer, whole)

    pair = ScoredBatch(trajectories[::2], [1.0, -1.0], {})
    trainer = make_trainer(tmp_path, tokenizer, pair, beta=0.1)
    expected_loss, expected = loss_and_gradients(trainer, trainer.whole_batch(pair))
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert torch.allclose(gradients, expected, atol=1e-7)


def test_a_step_without_a_trained_episode_changes_no_weight(tmp_path, tokenizer):
    trajectories = make_trajectories(2, random.Random(11))
    batch = ScoredBatch(trajectories, [1.0, -1.0], {}, trained=[False, False])
    additions = Additions(llds_weight=1.0)
    trainer = make_trainer(tmp_path, tokenizer, batch, additions=additions, learning_rate=1e-2, weight_decay=0.1)
    trainer.model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    logs = trainer.state.log_history[0]
    assert logs["llds/loss"] == 0.0
    assert not any(name.startswith(("ratio/", "logprobs/", "llds/actions")) for name in logs)


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
        grpo_config(output_dir=str(tmp_path), loss="dr_grpo", use_cpu=True, bf16=False)


def test_turns_beyond_those_that_are_trained_have_no_advantage():
    """An episode that failed, or that fills up the batch, may have more turns than any other."""
    advantages = torch.tensor([[2.0, 3.0], [0.0, 0.0]])
    turn_index = torch.tensor([[0, 1, 1, 0], [0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    expected = torch.tensor([[2.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(spread_over_tokens(advantages, turn_index, mask), expected)


def test_weight_decay_leaves_vectors_alone_such_as_the_lengths_of_dora(tmp_path, tokenizer):
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    trainer = make_trainer(tmp_path, tokenizer, None, get_peft_model(make_model(), settings), weight_decay=0.1)
    decayed, kept = [group["params"] for group in trainer.create_optimizer().param_groups]
    assert {p.dim() for p in decayed} == {2}
    assert {p.dim() for p in kept} == {1}
    lengths = sum("magnitude" in name for name, _ in trainer.model.named_parameters())
    assert len(kept) == lengths > 0


def test_dropout_that_a_model_applies_by_itself_is_off(tmp_path, tokenizer):
    policy = make_policy()
    attentions = [module for module in policy.modules() if hasattr(module, "attention_dropout")]
    for module in attentions:
        module.attention_dropout = 0.5
    make_trainer(tmp_path, tokenizer, None, policy)
    assert attentions
    assert {module.attention_dropout for module in attentions} == {0.0}
