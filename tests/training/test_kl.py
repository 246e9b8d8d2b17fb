"""The KL divergence: what each estimator and its gradient are on average, by sums over all tokens of a small vocabulary, and
the term inside the trainer beside a padded pass in plain torch."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainers import likelihoods, logged, loss_and_gradients, make_policy, make_trainer, make_trajectories

from agentrl.training.batch import deal
from agentrl.training.kl import kl_estimates
from agentrl.training.sampling import ScoredBatch
from agentrl.training.settings import LOSSES
from agentrl.training.updates import NOTHING_ADDED, Additions, Updates

COEFFICIENT = 0.3
ESTIMATORS = ["k1", "k2", "k3"]
TERMS = {
    "k2 in the loss": Additions(kl_estimator="k2"),
    "k3 in the loss": Additions(kl_estimator="k3"),
    "k1 in the reward": Additions(kl_estimator="k1", kl_in_reward=True),
    "k2 in the reward": Additions(kl_estimator="k2", kl_in_reward=True),
    "k3 in the reward": Additions(kl_estimator="k3", kl_in_reward=True),
}

LOGITS = st.lists(st.floats(-2, 2), min_size=5, max_size=5)


def policies(logits, reference):
    """Logits that have gradients, and the log-probabilities [V] of policy and reference in float64."""
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    return logits, logits.log_softmax(0), torch.tensor(reference, dtype=torch.float64).log_softmax(0)


def divergence(logps, other):
    return (logps.exp() * (logps - other)).sum()


def gradient(value, logits):
    (found,) = torch.autograd.grad(value, logits, retain_graph=True)
    return found


@given(LOGITS, LOGITS)
def test_k1_and_k3_are_the_divergence_on_average_and_k3_is_never_below_0(logits, reference):
    _, logps, ref = policies(logits, reference)
    for estimator in ("k1", "k3"):
        mean = (logps.exp() * kl_estimates(logps, ref, estimator)).sum()
        torch.testing.assert_close(mean, divergence(logps, ref), rtol=0, atol=1e-10)
    assert kl_estimates(logps, ref, "k3").min() >= -1e-15
    assert kl_estimates(logps, ref, "k2").min() >= 0


@given(LOGITS, LOGITS, LOGITS)
def test_in_the_loss_k2_and_k3_have_the_gradient_of_the_divergence_and_k1_none(logits, reference, before):
    """For tokens that another policy sampled, too. The weight of k3 has a gradient of its own; those of the others have none."""
    logits, logps, ref = policies(logits, reference)
    old = torch.tensor(before, dtype=torch.float64).log_softmax(0)
    weights, forward = (logps - old).exp(), gradient(divergence(logps, ref), logits)
    for estimator, expected in (("k1", torch.zeros_like(logits)), ("k2", forward), ("k3", forward)):
        weighed = weights if estimator == "k3" else weights.detach()
        term = (old.exp() * weighed * kl_estimates(logps, ref, estimator)).sum()
        torch.testing.assert_close(gradient(term, logits), expected, rtol=0, atol=1e-10)


@given(LOGITS, LOGITS, LOGITS)
def test_in_the_reward_k1_has_the_gradient_of_the_divergence_and_k3_that_less_the_reverse(logits, reference, before):
    logits, logps, ref = policies(logits, reference)
    old = torch.tensor(before, dtype=torch.float64).log_softmax(0)
    forward, reverse = (gradient(d, logits) for d in (divergence(logps, ref), divergence(ref, logps)))
    for estimator, expected in (("k1", forward), ("k3", forward - reverse)):
        rewards = kl_estimates(logps.detach(), ref, estimator)
        found = gradient((old.exp() * rewards * (logps - old).exp()).sum(), logits)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@given(LOGITS, LOGITS)
def test_near_the_reference_k2_and_k3_in_the_reward_hold_next_to_nothing(reference, direction):
    """Ten times nearer, the gradient of k1 is ten times smaller, and theirs at least fifty times."""
    sizes = {}
    for distance in (1e-2, 1e-3):
        logits, logps, ref = policies([r + distance * d for r, d in zip(reference, direction, strict=True)], reference)
        for estimator in ESTIMATORS:
            estimates = kl_estimates(logps.detach(), ref, estimator)
            found = gradient((logps.detach().exp() * estimates * logps).sum(), logits)
            sizes[estimator, distance] = found.norm().item()
    for estimator, factor in (("k1", 9), ("k2", 50), ("k3", 50)):
        assert sizes[estimator, 1e-3] <= sizes[estimator, 1e-2] / factor + 1e-12


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=8), st.sampled_from(ESTIMATORS))
def test_a_token_that_is_as_likely_as_under_the_reference_has_no_divergence(logps, estimator):
    assert kl_estimates(torch.tensor(logps), torch.tensor(logps), estimator).abs().max() == 0


def scored(trainer, batch, seed=2, spread=0.3):
    """The batch with a policy before it and a reference that differ from the present policy, both drawn."""
    generator = torch.Generator().manual_seed(seed)
    whole = trainer.whole_batch(batch)
    now = likelihoods(trainer, batch.trajectories)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        whole.tensors[name] = (now + spread * torch.randn(now.shape, generator=generator)) * whole.own
    return whole


def plain_loss(minibatch, loss, additions, coefficient, low=0.2, high=0.28):
    """The loss of a minibatch by one padded pass, written down from the formulas, with all gradients."""
    policy = make_policy()
    tensors, own = minibatch.tensors, minibatch.own
    ids = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1)
    mask = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1)
    logits = policy(input_ids=ids, attention_mask=mask).logits
    width = tensors["completion_ids"].shape[1]
    logps = logits[:, -width - 1 : -1].log_softmax(-1).gather(2, tensors["completion_ids"][:, :, None])[:, :, 0]
    old, ref = tensors["old_per_token_logps"], tensors["ref_per_token_logps"]

    def estimates(values):
        change = ref - values
        return {"k1": -change, "k2": change**2 / 2, "k3": change.exp() - 1 - change}[additions.kl_estimator]

    advantages = tensors["advantages"][:, None].expand_as(logps)
    if additions.kl_in_reward:
        advantages = advantages - coefficient * estimates(old)
    ratios = (logps - old).exp()
    terms = -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    if not additions.kl_in_reward:
        weights = ratios if additions.kl_estimator == "k3" else ratios.detach()
        terms = terms + coefficient * weights * estimates(logps)
    terms = torch.where(own, terms, 0.0)
    by_episode = terms.sum(1) / own.sum(1).clamp(min=1)
    value = {"dapo": terms.sum() / own.sum(), "grpo": by_episode.mean(), "dr_grpo": terms.sum() / (len(own) * 64)}[loss]
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("tokens", [1, 90])
@pytest.mark.parametrize("term", TERMS)
def test_loss_and_gradients_equal_a_padded_pass_in_plain_torch_for_packs_and_minibatches_of_any_size(
    tmp_path, tokenizer, loss, tokens, term
):
    rng = random.Random(3)
    trajectories = make_trajectories(6, rng)
    trained = [i != 2 for i in range(6)]
    batch = ScoredBatch(trajectories, [rng.choice([0.0, rng.gauss(0, 1)]) for _ in trajectories], {}, trained)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        batch,
        tokens=tokens,
        additions=TERMS[term],
        loss=loss,
        beta=COEFFICIENT,
        epsilon_high=0.28,
    )
    whole = scored(trainer, batch)
    for part in (whole, *deal(whole, 2, 2, torch.Generator().manual_seed(0))):
        expected_value, expected = plain_loss(part, loss, TERMS[term], COEFFICIENT)
        value, found = loss_and_gradients(trainer, part)
        assert value == pytest.approx(expected_value, rel=1e-5, abs=1e-6)
        assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("term", ["k2 in the loss", "k1 in the reward"])
@pytest.mark.parametrize("loss", LOSSES)
def test_twice_the_coefficient_is_twice_the_term_under_every_loss(tmp_path, tokenizer, loss, term):
    rng = random.Random(4)
    batch = ScoredBatch(make_trajectories(4, rng), [1.0, -1.0, 0.5, -0.5], {})
    found = []
    for coefficient in (0.0, 0.1, 0.2):
        settings = {"loss": loss, "epsilon": 0.9, "epsilon_high": 50.0, "prove_weights": False}
        trainer = make_trainer(tmp_path, tokenizer, batch, additions=TERMS[term], beta=coefficient, **settings)
        found.append(loss_and_gradients(trainer, scored(trainer, batch, spread=0.05))[1])
    without, once, twice = found
    change = (once - without).norm()
    assert change > 0
    assert ((twice - without) - 2 * (once - without)).norm() < 0.02 * change


@pytest.mark.parametrize("term", TERMS)
def test_a_coefficient_of_0_leaves_it_out_to_the_bit(tmp_path, tokenizer, term):
    batch = ScoredBatch(make_trajectories(4, random.Random(5)), [1.0, -1.0, 0.0, 0.5], {})
    results = []
    for additions in (TERMS[term], NOTHING_ADDED):
        trainer = make_trainer(tmp_path, tokenizer, batch, additions=additions, beta=0.0)
        results.append((*loss_and_gradients(trainer, trainer.whole_batch(batch)), logged(trainer)))
    (loss, gradients, logs), (expected_loss, expected, expected_logs) = results
    assert loss == expected_loss
    assert torch.equal(gradients, expected)
    assert logs == expected_logs
    assert not any(name.startswith("kl") for name in logs)


@pytest.mark.parametrize("term", TERMS)
def test_while_the_policy_is_its_reference_nothing_holds_it(tmp_path, tokenizer, term):
    batch = ScoredBatch(make_trajectories(4, random.Random(6)), [1.0, -1.0, 0.0, 0.5], {})
    results = []
    for coefficient in (COEFFICIENT, 0.0):
        trainer = make_trainer(tmp_path, tokenizer, batch, additions=TERMS[term], beta=coefficient)
        results.append((*loss_and_gradients(trainer, trainer.whole_batch(batch)), logged(trainer)))
    (loss, gradients, logs), (expected_loss, expected, _) = results
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert ((gradients - expected).norm() / expected.norm()).item() < 1e-5
    assert logs["kl"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_in_the_first_update_k1_in_the_reward_has_the_gradient_of_k2_in_the_loss(tmp_path, tokenizer, loss):
    """Token by token, and not on average alone (arXiv 2510.01555)."""
    batch = ScoredBatch(make_trajectories(4, random.Random(7)), [1.0, -1.0, 0.0, 0.5], {})
    found = []
    for term in ("k1 in the reward", "k2 in the loss"):
        trainer = make_trainer(tmp_path, tokenizer, batch, additions=TERMS[term], loss=loss, beta=COEFFICIENT)
        whole = scored(trainer, batch)
        del whole.tensors["old_per_token_logps"]
        found.append(loss_and_gradients(trainer, whole)[1])
    assert ((found[0] - found[1]).norm() / found[1].norm()).item() < 1e-5


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_what_is_taken_off_is_logged_and_changes_neither_llds_nor_the_quantiles_of_ratios(tmp_path, tokenizer, tokens):
    batch = ScoredBatch(make_trajectories(4, random.Random(8)), [1.0, -1.0, 0.0, 0.5], {})
    logs = []
    for in_reward, estimator in ((True, "k1"), (False, "k2")):
        additions = Additions(kl_estimator=estimator, kl_in_reward=in_reward, llds_weight=0.1)
        settings = {"additions": additions, "tokens": tokens, "beta": COEFFICIENT}
        trainer = make_trainer(tmp_path, tokenizer, batch, updates=Updates(group_size=2, epochs=2), **settings)
        whole = scored(trainer, batch)
        loss_and_gradients(trainer, whole)
        logs.append(logged(trainer))
    estimates = kl_estimates(whole.tensors["old_per_token_logps"], whole.tensors["ref_per_token_logps"], "k1")
    assert logs[0]["kl/penalty"] == pytest.approx(COEFFICIENT * estimates[whole.own].mean().item(), abs=1e-6)
    assert "kl/penalty" not in logs[1]
    same = [name for name in logs[0] if name.startswith(("llds/", "ratio/")) or name == "kl"]
    assert len(same) == 6
    for name in same:
        assert logs[0][name] == logs[1][name], name


def test_a_penalty_and_the_advantages_of_turns_go_together(tmp_path, tokenizer):
    trajectories = make_trajectories(2, random.Random(9))
    by_turn = ScoredBatch(trajectories, [[1.0] * 3, [-1.0] * 3], {})
    by_episode = dataclasses.replace(by_turn, advantages=[1.0, -1.0])
    found = []
    for batch in (by_turn, by_episode):
        additions = TERMS["k1 in the reward"]
        trainer = make_trainer(tmp_path, tokenizer, batch, additions=additions, beta=COEFFICIENT)
        found.append(loss_and_gradients(trainer, scored(trainer, batch))[1])
    assert torch.allclose(*found, atol=1e-7)
