"""The section `engine`: what samples, and on which devices engines and trainer compute."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from agentrl.config.base import Section


class EndpointConfig(Section):
    """An OpenAI-compatible server, for evaluation."""

    url: str = Field(pattern=r"^https?://[^/]")
    """Its base, such as http://127.0.0.1:8000/v1."""
    model: str
    """The model's name there."""
    key_env: str | None = None
    """The environment variable that holds the API key on the engine's machine; null sends none."""
    prompt: Literal["ids", "text"] = "text"
    """`ids` sends token ids and asks for them, which vLLM's server understands; `text` sends text and OpenAI's own fields alone.
    """
    timeout_seconds: float = Field(120.0, gt=0)
    """Of one request."""
    retries: int = Field(4, ge=0)
    """How often a request that failed is sent again."""


class EngineConfig(Section):
    """One engine for each rollout worker."""

    kind: Literal["vllm", "transformers", "openai"] = "vllm"
    """vllm; transformers, where there is no vLLM; or openai, an endpoint, for evaluation only."""
    endpoint: EndpointConfig | None = None
    """The server of kind openai."""
    kv_cache_gib: int = Field(2, ge=1)
    """On a CPU, what vLLM takes for its cache alone."""
    gpu_memory_utilization: float | None = Field(None, gt=0, lt=1)
    """The part of a card's memory that vLLM takes, weights and cache together; null is 0.85 of its share."""
    gpus: float = Field(1, gt=0)
    """The number of cards of an engine, or the share of one card that all engines and the trainer have together: the trainer gets
    what the engines leave.
    """
    sleep: bool = False
    """Whether the engines of a shared card give their memory back while the trainer trains."""
    threads: int = Field(2, ge=1)
    """Of an engine on a CPU."""
    max_concurrent: int = Field(48, ge=1)
    """The most episodes under way on an engine."""
    token_budget: int | None = Field(None, ge=1)
    """The most that the lengths of the generations under way may reach together. null takes what vLLM's cache holds; with more,
    vLLM would interrupt generations and compute them again.
    """
    start_timeout_seconds: float | None = Field(None, gt=0)
    """How long an engine may take to start, the download of a model not counted. null is 300 on a CPU and 900 on a GPU, where
    vLLM compiles and captures graphs first.
    """

    @field_validator("gpus")
    @classmethod
    def _is_whole_or_a_share(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("must be a whole number of cards, or a share of one card below 1")
        return gpus

    @property
    def shares_card(self) -> bool:
        """Whether the engines and the trainer have one card together."""
        return self.gpus < 1

    @property
    def cards(self) -> int:
        """The cards that one engine computes on, whole or in part."""
        return max(1, int(self.gpus))

    @property
    def memory_utilization(self) -> float:
        """The part of each card's memory that one engine takes."""
        return 0.85 * min(1.0, self.gpus) if self.gpu_memory_utilization is None else self.gpu_memory_utilization

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.kind == "openai") != (self.endpoint is not None):
            raise ValueError("kind openai and the section `endpoint` go together: set both or neither")
        if self.kind == "transformers" and self.gpus > 1:
            raise ValueError("kind transformers runs on one GPU; use vllm for tensor parallelism")
        return self


def trainer_share(engine: EngineConfig, workers: int) -> float:
    """Return how many cards are the trainer's: one of its own, or what `workers` engines leave of the card that all share."""
    # Ray counts shares in ten-thousandths.
    return round(1 - workers * engine.gpus, 4) if engine.shares_card else 1.0


def device_problem(device: str, engine: EngineConfig, *, workers: int, max_staleness: int, trains: bool) -> str | None:
    """Return why engines and trainer cannot have the devices that the settings give them, and what to set; None if they can.

    Args:
        device: of the whole configuration.
        workers, max_staleness: of the section `rollout`.
        trains: whether there is a trainer.
    """
    if engine.sleep and (device == "cpu" or engine.kind == "openai"):
        return "engine.sleep frees memory of a card, and with device cpu or engine.kind openai there is none; set it to false"
    if engine.sleep and not engine.shares_card:
        return (
            f"engine.sleep makes room for a trainer on the same card, and with engine.gpus {engine.gpus:g} the trainer has "
            "another; set engine.gpus below 1, or engine.sleep to false"
        )
    if engine.sleep and max_staleness:
        return (
            f"engine.sleep needs rollout.max_staleness 0, and it is {max_staleness}: engines that sample ahead of the trainer "
            "cannot sleep while it trains; set max_staleness to 0, or sleep to false"
        )
    if device == "cpu" or not engine.shares_card or not trains:
        return None
    if trainer_share(engine, workers) <= 0:
        return (
            f"engine.gpus {engine.gpus:g} x rollout.workers {workers} leaves the trainer nothing of the card that they share; "
            "lower one of them, or give each engine whole cards"
        )
    if workers * engine.memory_utilization >= 1:
        return (
            f"engine.gpu_memory_utilization {engine.memory_utilization:g} x rollout.workers {workers} leaves the trainer no "
            "memory of the card that they share; lower one of them"
        )
    return None
