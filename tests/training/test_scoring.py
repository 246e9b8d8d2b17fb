"""The scoring pass against plain PyTorch: values and gradients."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from token_sequences import VOCABULARY, branching, in_trunk
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, StableLmConfig, StableLmForCausalLM

from agentrl.training.scoring import Scorer, ScoringError, TokenSequence, head, pack
from agentrl.training.scoring.attention import Tree, tree_attention
from agentrl.training.scoring.head import head_scores
from agentrl.training.scoring.lora import merge_lora
from agentrl.training.scoring.trunk import Trunk


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "shared_by"), [(4, 1), (6, 3)])
def test_attention_over_a_tree_equals_dense_attention_with_a_mask(window, heads, shared_by):
    (found,) = pack(branching(np.random.default_rng(1)), 10_000)
    size, torch_rng = len(found), torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, size, count, 8, generator=torch_rng).transpose(1, 2).requires_grad_()
        for count in (heads, heads // shared_by, heads // shared_by)
    )
    weights = torch.randn(1, size, heads, 8, generator=torch_rng)
    at = torch.arange(size)
    sees = (at <= at[:, None]) & (at[:, None] < found.ends)
    if window is not None:
        sees &= found.position_ids[0][:, None] - found.position_ids[0] < window
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=sees[None, None], scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    got, _ = tree_attention(torch.nn.Module(), query, key, value, None, 0.3, window, Tree.of(found))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    one = torch.autograd.grad((got * weights).sum(), (query, key, value))
    other = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("entropy", ["none", "values", "gradients"])
def test_head_scores_equal_those_of_whole_logits(monkeypatch, with_bias, entropy):
    # Three tokens at a time.
    monkeypatch.setitem(head._LOGITS, "cpu", 3 * 50)
    rng = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 12, generator=rng, dtype=torch.float32).requires_grad_() for n in (20, 50))
    bias = torch.randn(50, generator=rng).requires_grad_() if with_bias else None
    targets, by_logp, by_entropy = torch.randint(0, 50, (20,), generator=rng), *torch.randn(2, 20, generator=rng)
    inputs = [t for t in (hidden, weight, bias) if t is not None]

    logits = torch.nn.functional.linear(hidden, weight, bias) / 0.7
    log_probabilities = logits.log_softmax(-1)
    expected = log_probabilities[torch.arange(20), targets]
    spread = -(log_probabilities.exp() * log_probabilities).sum(-1)
    loss = (expected * by_logp).sum() + ((spread * by_entropy).sum() if entropy == "gradients" else 0.0)
    wanted = torch.autograd.grad(loss, inputs)

    logps, entropies = head_scores(hidden, weight, bias, targets, 0.7, entropy=entropy)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    assert (entropies is None) == (entropy == "none")
    loss = (logps * by_logp).sum()
    if entropies is not None:
        torch.testing.assert_close(entropies, spread, atol=1e-5, rtol=1e-5)
        loss = loss + (entropies * by_entropy).sum()
    for got, want in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def make_model(**settings):
    torch.manual_seed(0)
    return tiny_llama(VOCABULARY, hidden=32, max_position_embeddings=512, tie_word_embeddings=True, **settings)


def with_adapter(model, **settings):
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    policy = get_peft_model(model, LoraConfig(**chosen))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return policy


def scores_and_gradients(model, made, **settings):
    """The log-probabilities of each sequence, and the gradients of a sum in which each token has a weight of its own."""
    scorer = Scorer(model, **settings)
    model.zero_grad()
    logps, widths = {}, {i: len(s.scored) for i, s in enumerate(made)}
    for found in scorer.packs(made):
        scores = scorer.score(found)
        parts = scores.logps.split([widths[i] for i in found.members])
        logps |= {i: part.detach() for i, part in zip(found.members, parts, strict=True)}
        total = sum(
            (part * torch.linspace(-1, 1 + i, widths[i])).sum() for i, part in zip(found.members, parts, strict=True)
        )
        total.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()
    return torch.cat([logps[i] for i in range(len(made))]), gradients


SHAPES = {
    "no sharing": lambda rng: branching(rng, groups=5, members=1),
    "deep sharing": lambda rng: branching(rng, groups=1, members=8, shared=100),
    "an instruction that all share": lambda rng: in_trunk(branching(rng, groups=3, members=3)),
    "one-token turns": lambda rng: [
        TokenSequence(rng.integers(0, VOCABULARY, 12), np.arange(1, 12, 2)) for _ in range(6)
    ],
    "one episode": lambda rng: branching(rng, groups=1, members=1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("merge", [False, True])
def test_packing_merging_and_budget_change_neither_values_nor_gradients(shape, merge):
    made = SHAPES[shape](np.random.default_rng(5))
    expected, wanted = scores_and_gradients(with_adapter(make_model()), made, tokens=64, packing="none")
    assert wanted.norm() > 0
    for packing in ("prefix_tree", "episodes"):
        for tokens in (1, 150, 100_000):
            logps, gradients = scores_and_gradients(
                with_adapter(make_model()), made, tokens=tokens, packing=packing, merge=merge
            )
            torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
            assert (gradients - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("packing", ["prefix_tree", "episodes", "none"])
def test_layers_that_are_computed_again_in_the_backward_pass_give_the_same_gradients(packing):
    made = branching(np.random.default_rng(7))
    expected, wanted = scores_and_gradients(with_adapter(make_model()), made, tokens=300, packing=packing)
    policy = with_adapter(make_model())
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()
    policy.train()
    logps, gradients = scores_and_gradients(policy, made, tokens=300, packing=packing)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    assert (gradients - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("packing", ["prefix_tree", "episodes"])
def test_a_model_in_bf16_gives_the_same_up_to_its_precision(packing):
    made = branching(np.random.default_rng(8))

    def policy():
        adapted = with_adapter(make_model().to(torch.bfloat16))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        return adapted

    expected, wanted = scores_and_gradients(policy(), made, tokens=64, packing="none")
    logps, gradients = scores_and_gradients(policy(), made, tokens=300, packing=packing)
    assert logps.dtype == torch.float32
    assert (logps - expected).abs().max() < 0.1
    assert (gradients - wanted).norm() <= 0.1 * wanted.norm()
    Scorer(policy(), tokens=300, packing=packing).check()


def test_the_last_mlp_computes_only_the_tokens_that_predict():
    made = in_trunk(branching(np.random.default_rng(3), groups=1, members=4), size=100)
    policy = with_adapter(make_model())
    scorer, rows = Scorer(policy, tokens=150), {}
    for place, layer in enumerate(policy.get_base_model().model.layers):
        layer.mlp.down_proj.register_forward_hook(
            lambda module, inputs, output, place=place: rows.setdefault(place, []).append(output.shape[1])
        )
    packs = []
    for found in scorer.packs(made):
        packs.append(found)
        scorer.score(found).logps.sum().backward()
    (shared,) = {found.shared for found in packs}
    assert shared >= 100
    assert rows[0] == [shared, *(len(found) - shared for found in packs)]
    own = [len({source for source in found.sources.tolist() if source >= shared}) for found in packs]
    assert rows[max(rows)] == [len(packs[0].trunk.asked), *own]
    assert sum(own) < sum(rows[0]) / 2


def test_a_model_without_an_adapter_gets_the_gradients_of_all_its_weights():
    made = branching(np.random.default_rng(6))
    expected, wanted = scores_and_gradients(make_model(), made, tokens=64, packing="none")
    logps, gradients = scores_and_gradients(make_model(), made, tokens=300)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    assert (gradients - wanted).norm() <= 1e-5 * wanted.norm()


def test_merged_layers_follow_the_adapter_and_step_aside_while_it_is_off():
    policy = with_adapter(make_model())
    ids = torch.arange(20)[None]
    plain = with_adapter(make_model())
    assert merge_lora(policy) == 7 * policy.config.num_hidden_layers
    with torch.no_grad():
        for model in (policy, plain):
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(3.0)
        torch.testing.assert_close(policy(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
        with policy.disable_adapter(), plain.disable_adapter():
            assert policy(ids).logits.equal(plain(ids).logits)
            assert not policy(ids).logits.allclose(plain.base_model.model(ids).logits * 1.01)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_layers_that_are_no_plain_lora_keep_pefts_path(settings):
    model = make_model(attention_bias=True, mlp_bias=True) if "lora_bias" in settings else make_model()
    assert merge_lora(with_adapter(model, **settings)) == 0


def test_a_model_that_computes_something_else_in_packs_is_refused():
    policy = with_adapter(make_model())
    scorer = Scorer(policy, tokens=100)
    scorer.check()
    # Such as a model that scales what its head returns.
    policy.get_output_embeddings().register_forward_hook(lambda module, arguments, logits: logits * 1.5)
    with pytest.raises(
        ScoringError, match=r"LlamaForCausalLM does not compute in packs .* set training.packing to none"
    ):
        scorer.check()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type dynamic"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ],
)
def test_a_model_whose_config_says_that_packs_differ_is_refused_however_little_that_shows(settings, named):
    model = make_model(**settings)
    with pytest.raises(ScoringError, match=f"LlamaForCausalLM has {named}.* set training.packing to none"):
        Scorer(model, tokens=100)
    Scorer(model, tokens=100, packing="none").check()


def test_a_model_that_cannot_be_computed_in_packs_is_refused_and_stays_in_training():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    # Its layers do not hand on what attention is told about a pass.
    model = StableLmForCausalLM(StableLmConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).train()
    with pytest.raises(
        ScoringError, match=r"StableLmForCausalLM cannot be computed in packs .* training.packing to none"
    ):
        Scorer(model, tokens=100).check()
    assert model.training


def test_a_trunk_that_is_done_keeps_nothing_when_its_layers_are_computed_again():
    trunk, keys = Trunk(torch.arange(3)[None], torch.arange(3)), torch.zeros(1, 1, 3, 4)
    trunk.keep(0, keys, keys)
    assert trunk.before(0, keys, keys)[0].shape == (1, 1, 6, 4)
    trunk.close()
    trunk.keep(0, keys, keys)
    with pytest.raises(KeyError):
        trunk.before(0, keys, keys)


def test_a_scored_token_needs_one_before_it():
    with pytest.raises(ValueError, match="within 1 to 2, got 0 to 1"):
        TokenSequence(np.arange(3), np.array([0, 1]))


def test_scores_that_go_backward_after_the_next_pack_was_taken_are_refused():
    scorer = Scorer(with_adapter(make_model()), tokens=1)
    made = branching(np.random.default_rng(3), groups=1)
    first, *_ = scorer.packs(made)
    with pytest.raises(RuntimeError, match="one after another"):
        scorer.score(first)
    scores = [scorer.score(found).logps.sum() for found in scorer.packs(made)]
    with pytest.raises(RuntimeError, match="one after another"):
        sum(scores).backward()


def test_a_model_that_is_prepared_twice_gives_the_same():
    made = branching(np.random.default_rng(4))
    policy = with_adapter(make_model())
    expected, wanted = scores_and_gradients(policy, made, tokens=300)
    policy.zero_grad()
    logps, gradients = scores_and_gradients(policy, made, tokens=300)
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(gradients, wanted)


def test_models_whose_layers_run_twice_are_refused_for_packs():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    twice = DiffLlamaForCausalLM(DiffLlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)).float()
    with pytest.raises(ScoringError, match="does not compute in packs what it computes of each episode alone"):
        Scorer(twice, tokens=64).check()
    looped = make_model()
    looped.model.layers[-1] = looped.model.layers[0]
    with pytest.raises(ScoringError, match="in packs"):
        Scorer(looped, tokens=64).check()


def test_the_check_at_the_start_meets_trunks_and_tokens_that_predict_nothing(monkeypatch):
    scorer, packs = Scorer(make_model(), tokens=64), []
    score = scorer.score
    monkeypatch.setattr(scorer, "score", lambda pack, **how: packs.append(pack) or score(pack, **how))
    scorer.check()
    assert {found.shared > 0 for found in packs} == {True, False}
    assert any(len(found.sources) < len(found) - found.shared for found in packs)
