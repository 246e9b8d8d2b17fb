"""A new model already copies: a token that it has seen before is followed by what followed it then."""

import torch

from agentrl.pocket.model import keep_copying, make_model

VOCABULARY = 600


def guesses_of(model, seed):
    """The likeliest token after the second half of a random text that repeats its first half."""
    half = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:30]
    text = torch.cat([half, half])
    with torch.no_grad():
        logits = model(input_ids=text[None]).logits[0]
    return logits[30:59].argmax(-1), text[31:60]


def test_a_new_model_repeats_what_it_read():
    model = make_model(VOCABULARY, 0, seed=1).eval()
    guessed, repeated = zip(*(guesses_of(model, seed) for seed in range(5)), strict=True)
    assert (torch.cat(guessed) == torch.cat(repeated)).float().mean() > 0.5


def test_a_seed_makes_one_model():
    one, two, other = (make_model(VOCABULARY, 0, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_training_that_keeps_the_copying_heads_leaves_them_as_they_were():
    model = make_model(VOCABULARY, 0, seed=1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    keep_copying(model)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    size = model.config.head_dim
    for layer in range(2):
        for projection in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{projection}.weight"
            weight = model.get_parameter(name)
            assert torch.equal(weight[:size], before[name][:size])
            assert not torch.equal(weight[size:], before[name][size:])
