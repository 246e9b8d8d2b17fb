"""Which engine a config means, and what of it can be known before anything is loaded."""

import subprocess
import sys

import pytest

from agentrl.config import ConfigError, parse_config
from agentrl.engines import engine_class, environment, require_trainable

ENDPOINT = {"url": "http://server/v1", "model": "m"}


def config(device="cpu", **engine):
    return parse_config({"name": "t", "device": device, "model": {"path": "x/y"}, "engine": engine}, "test")


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_engines_that_return_what_they_sampled_can_be_trained_on(kind):
    require_trainable(config(kind=kind))


def test_an_endpoint_is_refused_for_training():
    with pytest.raises(ConfigError, match=r"engine\.kind openai is for evaluation only.*vllm, transformers"):
        require_trainable(config(kind="openai", endpoint=ENDPOINT))


def test_each_kind_has_its_environment():
    assert environment(config(threads=3))["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert environment(config(kind="transformers", threads=3))["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in environment(config("cuda", kind="transformers"))
    assert not any(name.startswith("VLLM") for name in environment(config(kind="openai", endpoint=ENDPOINT)))


@pytest.mark.parametrize(
    "engine", [{"kind": "openai"}, {"endpoint": ENDPOINT}, {"kind": "transformers", "gpus": 2}], ids=str
)
def test_settings_that_contradict_one_another_are_refused(engine):
    with pytest.raises(ConfigError, match=r"engine: kind"):
        config(**engine)


def test_choosing_an_engine_loads_neither_torch_nor_vllm():
    code = (
        "import sys\n"
        "from agentrl.engines import engine_class\n"
        "for kind in ('vllm', 'transformers', 'openai'): engine_class(kind)\n"
        "print(*{'torch', 'vllm', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_kind_names_a_class():
    assert [engine_class(kind).__name__ for kind in ("vllm", "transformers", "openai")] == [
        "VllmEngine",
        "TransformersEngine",
        "OpenAIEngine",
    ]
