"""The packaged policy is what its card says, and what the code and the config beside it would make today."""

import json
from dataclasses import asdict

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from agentrl.config import load_config
from agentrl.config.paths import packaged
from agentrl.pocket import demonstrations
from agentrl.pocket.making import Recipe

POLICY = packaged("pocket_policy")


@pytest.fixture(scope="module")
def card():
    return json.loads((POLICY / "card.json").read_text(encoding="utf-8"))


def test_it_is_small():
    assert sum(file.stat().st_size for file in POLICY.iterdir()) < 10 * 2**20


def test_its_weights_are_as_many_as_its_card_says_in_bf16(card):
    with safe_open(POLICY / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118, no dict
    assert sum(tensor.numel() for tensor in tensors) == card["parameters"]
    assert {str(tensor.dtype) for tensor in tensors} == {"torch.bfloat16"}


def test_it_was_made_by_this_recipe_for_this_config(card):
    config = load_config("pocket.yaml", [])
    today = {
        "recipe": asdict(Recipe()),
        "mix": {
            "questions": demonstrations.QUESTIONS,
            "structures": demonstrations.STRUCTURES,
            "countries": demonstrations.COUNTRIES,
        },
        "agent": config.agent.model_dump(mode="json"),
        "k": config.retriever.k,
    }
    assert {key: card[key] for key in today} == json.loads(json.dumps(today))


def test_every_name_of_the_demo_world_is_one_piece(names):
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    of, *rest = tokenizer(["of", *(f"of {name}" for name in names.all)], add_special_tokens=False)["input_ids"]
    assert [name for name, ids in zip(names.all, rest, strict=True) if len(ids) != len(of) + 1] == []


def test_it_copies_in_a_world_that_it_never_saw(card):
    wrong = {name: share for name, share in card["held_out"].items() if share < 0.8}
    assert not wrong
