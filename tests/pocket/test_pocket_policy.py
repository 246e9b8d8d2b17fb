"""The packaged policy is what its card says, of the recipe and the config beside it, and can do what it is meant to."""

import asyncio
import hashlib
import json
import random
from dataclasses import asdict

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentrl.agent.codec import Codec
from agentrl.agent.scripted import ScriptPlayer
from agentrl.config import load_config
from agentrl.config.paths import packaged
from agentrl.pocket import demonstrations
from agentrl.pocket.making import Recipe
from agentrl.pocket.pretraining import score
from retrievers.base import Hit

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


def test_its_files_are_those_of_its_card(card):
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in POLICY.iterdir()}
    assert {name: found[name] for name in card["sha256"]} == card["sha256"]
    assert set(found) == {*card["sha256"], "card.json", "README.md"}


class ByTitle:
    """Finds the passage whose title a query is."""

    def __init__(self, passages):
        self._hits = {p.title: Hit(p.id, f'"{p.title}"\n{p.text}', 1.0) for p in passages}

    async def search(self, queries, k):
        return [[self._hits[query]] for query in queries]


def test_it_copies_queries_and_answers_in_a_world_that_it_never_saw(names):
    world = demonstrations.make_up(names, 1000)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    config = load_config("pocket.yaml", [])
    player = ScriptPlayer(config.agent, Codec(tokenizer), ByTitle(world.library.passages), 1)
    rng = random.Random(0)
    played = []
    for hops, structure in ((1, "title"), (2, "title, title")):
        questions = [question for question in world.questions if question.metadata["hops"] == hops][:20]
        played += [asyncio.run(demonstrations.play(question, structure, rng, player)) for question in questions]
    shares = score(AutoModelForCausalLM.from_pretrained(POLICY).eval(), [d for d in played if d is not None], tokenizer)
    assert set(shares) == {"1 hops, title: query 1", "1 hops, title: answer"} | {
        f"2 hops, title, title: {what}" for what in ("query 1", "query 2", "answer")
    }
    assert min(shares.values()) > 0.9
