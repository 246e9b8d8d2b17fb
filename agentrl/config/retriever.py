"""The section `retriever`: what is searched, and what stands between it and the agent."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from agentrl.config.base import PlugInOptions, Section
from agentrl.config.paths import DataPath, IndexPath, ModelPath, model_path


class IndexConfig(Section):
    """An index folder that `agentrl index build` made, or `prebuilt:NAME`, and options of the retriever that searches it.

    The options are those of `LuceneRetriever` or `DenseRetriever`, whichever the index is for: k1, b, scoring, rm3, heap …
    """

    index: IndexPath
    options: dict[str, bool | int | float | str | None] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _has_its_encoder_by_an_absolute_path(cls, options: dict[str, Any]) -> dict[str, Any]:
        return _with_encoder(options)


def _with_encoder(options: dict[str, Any]) -> dict[str, Any]:
    """Make the option `model` absolute, by which a dense index is told where its encoder is."""
    encoder = options.get("model")
    return options | {"model": model_path(encoder)} if isinstance(encoder, str) else options


class RerankConfig(Section):
    """The cross-encoder that ranks the `depth` best hits anew: a folder or a hub name. It runs beside each engine.

    With `device: cuda` it takes memory of its engine's card, which `engine.gpu_memory_utilization` must leave it.
    """

    model: ModelPath
    depth: int = Field(50, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"


class RetrieverConfig(Section):
    """What is searched, and what stands between it and the agent.

    `kind: index` searches `index`; with `fuse`, further indexes of the same corpus by reciprocal rank fusion. `kind: http`
    asks the server at `url`, in Search-R1's format or the one of `wire` (`package.module:Class`, see retrievers.clients.wire).
    `kind: object` is what `target` (`package.module:attribute`) makes of `options`: a web search, tools behind MCP, your own.
    `token_env` names the environment variable that holds the server's token. A search that fails is tried again `retries`
    times; six retries last longer than the restart of a server's process.

    `gpus` is the number or share of cards that each index gets for its encoder. With 0 it computes on the CPU.

    `cache` is a folder in which hits are kept, up to `cache_mib`. `record` is the new file that a run's searches are
    recorded in, and `replay` such a file, which then stands in for the retriever. Paths as in the section data.
    """

    kind: Literal["index", "http", "object"] = "index"
    index: IndexPath | None = None
    options: PlugInOptions = Field(default_factory=dict)
    fuse: list[IndexConfig] = Field(default_factory=list)
    gpus: float = Field(0, ge=0)
    url: str | None = None
    wire: str | None = None
    token_env: str | None = None
    target: str | None = None
    rerank: RerankConfig | None = None
    cache: DataPath | None = None
    cache_mib: int = Field(1024, ge=1)
    record: DataPath | None = None
    replay: DataPath | None = None
    k: int = Field(3, ge=1, le=100)
    timeout_seconds: float = Field(30.0, gt=0)
    retries: int = Field(6, ge=0)

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
