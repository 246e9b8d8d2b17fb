"""The section `retriever`: what is searched, and what stands between it and the agent."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from agentrl.config.base import PlugInOptions, Section
from agentrl.config.paths import DataPath, IndexPath, ModelPath, model_path


class IndexConfig(Section):
    """A further index."""

    index: IndexPath
    """A folder that `agentrl index build` made, or `prebuilt:NAME`."""
    options: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Of the retriever that searches it, LuceneRetriever or DenseRetriever: k1, b, scoring, rm3, heap and others."""

    @field_validator("options")
    @classmethod
    def _has_its_encoder_by_an_absolute_path(cls, options: dict[str, Any]) -> dict[str, Any]:
        return _with_encoder(options)


def _with_encoder(options: dict[str, Any]) -> dict[str, Any]:
    """Make the option `model` absolute, by which a dense index is told where its encoder is."""
    encoder = options.get("model")
    return options | {"model": model_path(encoder)} if isinstance(encoder, str) else options


class RerankConfig(Section):
    """A cross-encoder that ranks the best hits anew. It runs beside each engine."""

    model: ModelPath
    """A folder or a hub name."""
    depth: int = Field(50, ge=1)
    """How many of the best hits it ranks."""
    device: Literal["cpu", "cuda"] = "cpu"
    """With cuda it takes memory of its engine's card, which `engine.gpu_memory_utilization` must leave it."""


class RetrieverConfig(Section):
    """What is searched, and what stands between it and the agent. Paths are as in the section data."""

    kind: Literal["index", "http", "object"] = "index"
    """`index` searches `index`, `http` asks the server at `url`, `object` is what `target` makes."""
    index: IndexPath | None = None
    """A folder that `agentrl index build` made, or `prebuilt:NAME`."""
    options: PlugInOptions = Field(default_factory=dict)
    """Of the retriever: k1, b, scoring, rm3, heap and others; of kind object, what `target` is made with."""
    fuse: list[IndexConfig] = Field(default_factory=list)
    """Further indexes of the same corpus, fused with the first by reciprocal rank."""
    gpus: float = Field(0, ge=0)
    """The number or share of cards that each index gets for its encoder. With 0 it computes on the CPU."""
    url: str | None = None
    """The server's address, such as http://127.0.0.1:8000/retrieve."""
    wire: str | None = None
    """The server's format, as `package.module:Class` (see retrievers.clients.wire); null is Search-R1's."""
    token_env: str | None = None
    """The environment variable that holds the server's token."""
    target: str | None = None
    """`package.module:attribute` of a retriever of your own: a web search, tools behind MCP."""
    rerank: RerankConfig | None = None
    """Ranks the best hits anew."""
    cache: DataPath | None = None
    """A folder in which hits are kept, for every run with the same index and options."""
    cache_mib: int = Field(1024, ge=1)
    """The most that it holds."""
    record: DataPath | None = None
    """The new file that a run's searches are recorded in."""
    replay: DataPath | None = None
    """Such a file, which then stands in for the retriever."""
    k: int = Field(3, ge=1, le=100)
    """How many passages a search brings."""
    timeout_seconds: float = Field(30.0, gt=0)
    """Of one search."""
    retries: int = Field(6, ge=0)
    """How often a search that failed is tried again; six retries last longer than the restart of a server's process."""

    @property
    def indexes(self) -> list[IndexConfig]:
        """The indexes that are searched, the main one first; none where something else is, or a recording."""
        if self.kind != "index" or self.replay is not None or self.index is None:
            return []
        # Not validated again: paths are made absolute where the configuration is read, and nowhere else.
        return [IndexConfig.model_construct(index=self.index, options=self.options), *self.fuse]

    @field_validator("options")
    @classmethod
    def _has_its_encoder_by_an_absolute_path(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _with_encoder(options) if info.data.get("kind") == "index" else options

    @field_validator("url")
    @classmethod
    def _is_of_http(cls, url: str | None) -> str | None:
        if url is not None and re.match(r"https?://[^/?#]", url) is None:
            raise ValueError("must be an HTTP URL, such as http://127.0.0.1:8000/retrieve")
        return url

    @model_validator(mode="after")
    def _has_its_source(self) -> Self:
        needed = {
            "index": ("index", "the folder that `agentrl index build` made"),
            "http": ("url", "such as http://127.0.0.1:8000/retrieve"),
            "object": ("target", "the package.module:attribute that makes the retriever"),
        }
        for kind, (key, what) in needed.items():
            if self.kind == kind and getattr(self, key) is None:
                raise ValueError(f"kind {kind} needs `{key}`, {what}")
        if self.fuse and self.kind != "index":
            raise ValueError("`fuse` fuses indexes, with kind index")
        # `index` may stand beside another kind, so that a command line can replace the index of a config by a server.
        for key, kind in {"url": "http", "wire": "http", "token_env": "http", "target": "object"}.items():
            if getattr(self, key) is not None and self.kind != kind:
                raise ValueError(
                    f"`{key}` belongs to kind {kind}, and kind is {self.kind}; leave it out, or set the kind"
                )
        if self.record is not None and self.replay is not None:
            raise ValueError("set `record` or `replay`, not both")
        return self
