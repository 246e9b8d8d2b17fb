"""A process computes on the cards that Ray gave it, and on no others."""

import asyncio
import re
from types import SimpleNamespace

import pytest
import ray
from scripted import make_config

from agentrl.config import ConfigError
from agentrl.rollout.devices import check_granted, granted_problem
from agentrl.rollout.retriever import index_options
from agentrl.rollout.worker import RolloutWorker


@pytest.mark.parametrize(
    ("granted", "visible", "gpus"),
    [(["0"], "0", 1), (["3"], "3", 0.5), (["2", "1"], "1,2", 2), (["GPU-ab"], "GPU-ab", 0.25)],
)
def test_cards_that_were_asked_for_and_are_shown_are_right(granted, visible, gpus):
    assert granted_problem(granted, visible, gpus) is None


@pytest.mark.parametrize(
    ("granted", "visible", "gpus", "words"),
    [
        ([], None, 1, "asked Ray for 1 GPU.* was given 0"),
        (["0"], "0", 2, "asked Ray for 2 GPU.* was given 1"),
        (["1"], None, 1, "shows it every GPU; start Ray without RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"),
        (["1"], "0,1", 0.5, "was given GPU 1 by Ray, and CUDA_VISIBLE_DEVICES shows it 0,1"),
        (["1"], "", 1, "shows it none"),
    ],
)
def test_what_is_wrong_with_the_cards_of_a_process_is_named(granted, visible, gpus, words):
    assert re.search(words, granted_problem(granted, visible, gpus))


def test_a_process_is_asked_what_it_was_given(monkeypatch):
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": ["1"], "TPU": []})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    check_granted("the trainer", 0.5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match="the trainer was given GPU 1 by Ray"):
        check_granted("the trainer", 0.5)


def test_an_engine_does_not_start_on_cards_that_are_not_its_own(monkeypatch, tmp_path, tokenizer):
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": ["1"]})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    worker = RolloutWorker(make_config(tmp_path, tokenizer, device="cuda"), "", [])
    with pytest.raises(
        ConfigError, match="a rollout worker was given GPU 1 by Ray, and CUDA_VISIBLE_DEVICES shows it 0,1"
    ):
        asyncio.run(worker.prepare())


@pytest.fixture
def configured(tmp_path, tokenizer, monkeypatch):
    """A config whose index is of a kind, and the options with which the index is opened."""

    def make(backend, gpus=0, **options):
        monkeypatch.setattr("agentrl.rollout.retriever.has_encoder", lambda folder: backend == "dense")
        config = make_config(tmp_path, tokenizer, retriever={"index": "i", "gpus": gpus, "options": options})
        return index_options(config, config.retriever.indexes[0])

    return make


def test_an_encoder_computes_on_the_cpu_unless_its_index_has_a_card(configured):
    assert configured("dense") == {"device": "cpu"}
    assert configured("dense", gpus=0.5) == {"device": "cuda"}
    assert configured("dense", gpus=1, device="cpu", threads=4) == {"device": "cpu", "threads": 4}
    assert configured("lucene", gpus=0, threads=4) == {"threads": 4}


def test_an_encoder_on_a_card_that_nobody_gave_it_is_refused(configured):
    with pytest.raises(ConfigError, match=r"index i has the option device cuda:0, and retriever\.gpus is 0; set"):
        configured("dense", device="cuda:0")
