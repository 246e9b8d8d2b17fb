"""Which cards engines and trainer ask for, and which settings of them exclude one another."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.config import ConfigError, parse_config


def config(engine=(), rollout=(), **sections):
    tree = {
        "name": "t",
        "device": "cuda",
        "model": {"path": "x/y"},
        "engine": dict(engine),
        "rollout": dict(rollout),
        "training": {"steps": 1},
    }
    return parse_config(tree | sections, "test")


def test_engines_with_cards_of_their_own_leave_the_trainer_one():
    made = config({"gpus": 2}, {"workers": 3})
    assert (made.trainer_gpus, made.engine.cards, made.engine.shares_card) == (1.0, 2, False)
    assert made.engine.memory_utilization == 0.85


@given(st.integers(1, 8), st.floats(0.01, 0.99))
def test_engines_and_trainer_have_one_card_together(workers, gpus):
    if workers * gpus > 0.999:
        with pytest.raises(ConfigError, match="leaves the trainer n"):
            config({"gpus": 1 / workers}, {"workers": workers} if workers > 1 else {"workers": 2})
        return
    made = config({"gpus": gpus}, {"workers": workers})
    assert made.trainer_gpus + workers * gpus == pytest.approx(1, abs=1e-4)
    assert made.engine.cards == 1
    assert workers * made.engine.memory_utilization < 1


def test_a_cpu_needs_no_card():
    assert config({"gpus": 0.5}, device="cpu").trainer_gpus == 0


def test_an_engine_on_a_gpu_has_longer_to_start_unless_the_config_says_how_long():
    assert config(device="cpu").start_seconds == 300
    assert config().start_seconds == 900
    assert config({"start_timeout_seconds": 7}).start_seconds == 7


@pytest.mark.parametrize(
    ("engine", "rollout", "sections", "words"),
    [
        ({"gpus": 1.5}, {}, {}, r"engine\.gpus: .*whole number of cards, or a share"),
        ({"gpus": 0}, {}, {}, r"engine\.gpus"),
        ({"gpus": 0.5}, {"workers": 2}, {}, r"engine\.gpus 0\.5 x rollout\.workers 2 leaves the trainer nothing"),
        (
            {"gpus": 0.4, "gpu_memory_utilization": 0.5},
            {"workers": 2},
            {},
            r"engine\.gpu_memory_utilization 0\.5 x rollout\.workers 2 leaves the trainer no memory",
        ),
        ({"sleep": True}, {}, {"device": "cpu"}, r"engine\.sleep .* device cpu"),
        ({"sleep": True, "gpus": 1}, {}, {}, r"engine\.sleep .* engine\.gpus 1 .*below 1"),
        ({"sleep": True, "gpus": 0.5}, {"max_staleness": 1}, {}, r"engine\.sleep needs rollout\.max_staleness 0"),
        (
            {},
            {},
            {"device": "cpu", "retriever": {"index": "i", "rerank": {"model": "x/y", "device": "cuda"}}},
            r"retriever\.rerank\.device cuda",
        ),
    ],
)
def test_devices_that_cannot_be_are_refused_with_the_settings(engine, rollout, sections, words):
    with pytest.raises(ConfigError, match=words):
        config(engine, rollout, **sections)


def test_engines_of_a_shared_card_may_sleep():
    made = config({"sleep": True, "gpus": 0.5})
    assert made.engine.sleep


def test_an_evaluation_may_give_its_engines_a_whole_card_together():
    assert config({"gpus": 0.5}, {"workers": 2}, training=None).training is None
