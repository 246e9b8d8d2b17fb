"""The warm start trains on the model's own tokens alone, and leaves an adapter that training can start from."""

import dataclasses
import json
import operator

import pytest
import torch
from fakes import make_episode
from tiny import tiny_llama

from agentrl.adapters import adapter_folder
from agentrl.config import ConfigError, parse_config
from agentrl.data.errors import DataError
from agentrl.training import demonstrations, warmstart
from agentrl.training.policy import load_policy
from agentrl.training.sft import OwnTokensTrainer, SupervisedTraining
from agentrl.training.warmstart import warm_start
from agentrl.types import AgentRLError


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(len(tokenizer), hidden=32, max_position_embeddings=256, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(model, tmp_path):
    return parse_config(
        {
            "name": "warm",
            "model": {"path": str(model), "lora": {"rank": 4, "alpha": 8}},
            "warmstart": {
                "sources": [{"questions": "q.jsonl", "index": "words", "count": 6}],
                "out": str(tmp_path / "out" / "adapter"),
                "batch": 2,
                "epochs": 6,
                "learning_rate": 0.01,
                "threads": 1,
            },
        },
        "a test",
    )


DEMONSTRATIONS = [make_episode(f"d{i}", searches=1 + i % 2, sampled=5, answer="x") for i in range(6)]


@pytest.fixture
def collected(monkeypatch):
    """Stand in for the process that writes demonstrations, which needs an index and Java."""
    monkeypatch.setattr(warmstart, "collect_apart", lambda config, on_progress: list(DEMONSTRATIONS))


def test_an_adapter_is_trained_and_saved_with_its_card(config, collected):
    told = []
    result = warm_start(config, told.append)
    assert [(p.phase, p.done, p.total) for p in told] == [("training", step, 18) for step in range(19)]
    assert (result.demonstrations, result.searches) == (6, {"1": 3, "2": 3})
    # A prompt of 2, and of each search 5 tokens of the model and 3 of the environment, and a last turn of 5.
    assert (result.tokens, result.trained_tokens) == (6 * 7 + 9 * 8, 6 * 5 + 9 * 5)
    start = config.model_copy(update={"model": config.model.model_copy(update={"adapter": config.warmstart.out})})
    folder = adapter_folder(start)
    card = json.loads((folder / "card.json").read_text())
    assert card["result"] == dataclasses.asdict(result)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == config.model.path
    weights = dict(load_policy(start, config.model.path).named_parameters())
    assert any(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_loss_falls(config):
    losses = SupervisedTraining(config, DEMONSTRATIONS, lambda progress: None).run()
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5


def test_the_loss_is_the_mean_cross_entropy_of_the_models_own_tokens(config):
    training = SupervisedTraining(config, DEMONSTRATIONS[:1], lambda progress: None)
    trainer = training._trainer
    assert isinstance(trainer, OwnTokensTrainer)
    policy = trainer.model.eval()
    episode = DEMONSTRATIONS[0]
    tokens = torch.tensor([[*episode.prompt_ids, *episode.completion_ids]])
    own = torch.tensor([[False] * len(episode.prompt_ids) + episode.action_mask])
    labels = torch.where(own, tokens, -100)
    with torch.no_grad():
        plain = policy(input_ids=tokens, labels=labels).loss
        inputs = {"input_ids": tokens, "labels": labels}
        torch.testing.assert_close(trainer.compute_loss(policy, inputs), plain)
        halved = trainer.compute_loss(policy, inputs, num_items_in_batch=2 * int(own.sum()))
        torch.testing.assert_close(halved, plain / 2)


def test_a_folder_that_exists_is_refused_before_anything_is_written(config, monkeypatch, tmp_path):
    monkeypatch.setattr(warmstart, "collect_apart", lambda *_: pytest.fail("demonstrations were collected"))
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"warmstart\.out .*: exists already"):
        warm_start(config, lambda progress: None)


def test_an_error_of_the_process_that_writes_demonstrations_is_raised_here(config):
    with pytest.raises(DataError, match=r"q\.jsonl: no such file"):
        warm_start(config, lambda progress: None)


def test_a_process_that_ends_before_it_is_done_is_an_error_with_its_status(config, monkeypatch):
    monkeypatch.setattr(demonstrations, "_send_demonstrations", operator.add)
    with pytest.raises(AgentRLError, match="the process that writes demonstrations ended with status 1"):
        warm_start(config, lambda progress: None)
