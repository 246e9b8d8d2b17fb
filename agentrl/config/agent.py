"""The section `agent`: how an episode runs, and which tools the model may call."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from agentrl.config.base import PlugInOptions, Section
from agentrl.config.paths import absolute


class ToolConfig(Section):
    """A tool that the model may call. Where it has nothing but `kind`, that alone may stand in its place."""

    kind: str
    """`search`, `open`, or `package.module:Class`, see agentrl.agent.tools.Tool."""
    options: PlugInOptions = Field(default_factory=dict)
    """What the class is made with."""
    timeout_seconds: float | None = Field(None, gt=0)
    """A call that takes longer is stopped; the model is told so, and the episode goes on. null sets no limit."""
    max_tokens: int | None = Field(None, ge=32)
    """The most of the model's tokens that come back, and never more than `agent.max_observation_tokens`."""
    on_error: str | None = None
    """What the model is told where the tool refuses a call or is stopped; null tells it why."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, tree: Any) -> Any:
        return {"kind": tree} if isinstance(tree, str) else tree

    @model_serializer(mode="wrap")
    def _shortest(self, write: SerializerFunctionWrapHandler) -> dict[str, Any] | str:
        return self.kind if self == ToolConfig(kind=self.kind) else write(self)

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in ("search", "open") and ":" not in kind:
            raise ValueError(
                f"{kind!r} is neither `search` nor `open`; write a tool of your own as package.module:Class"
            )
        return kind


class AgentConfig(Section):
    """How an episode runs."""

    protocol: str = "search_tags"
    """How the model is asked and its turns are read: search_tags, json_tools, chat_tools, search_r1, or `package.module:Class`.
    """
    prompt: Literal["plain", "chat"] = "plain"
    """`plain` writes the prompt as text, `chat` through the tokenizer's chat template."""
    tools: list[ToolConfig] = Field(["search"], min_length=1, validate_default=True)
    """The tools that the model may call."""
    instruction: str | None = None
    """Replaces the protocol's own wording; the question stands where it has `{question}`, else below it. An empty one leaves the
    question alone, which suits a model whose adapter knows the protocol already.
    """
    instruction_file: str | None = None
    """A file with the wording, which the resolved configuration holds as `instruction`."""
    worked_examples: int = Field(0, ge=0, le=2)
    """Complete episodes that the prompt shows, for a model that has never seen the protocol."""
    max_turns: int = Field(3, ge=0)
    """The most calls of tools that an episode executes. It then has one more turn to answer."""
    max_invalid: int = Field(1, ge=0)
    """The most mistakes that the model is told of; one more ends the episode."""
    mistakes_are_turns: bool = False
    """Whether each mistake counts towards `max_turns` in place of `max_invalid`."""
    max_turn_tokens: int = Field(96, ge=8)
    """The most tokens of one turn, in ids of the model's tokenizer."""
    max_observation_tokens: int = Field(240, ge=32)
    """The most tokens that one call brings back."""
    max_episode_tokens: int = Field(1024, ge=64)
    """The most tokens of an episode, prompt included."""
    temperature: float = Field(1.0, ge=0.01)
    """Of sampling in training. vLLM samples no colder than at 0.01."""

    @property
    def most_own_tokens(self) -> int:
        """The most tokens of an episode that the model itself can write."""
        # After the last turn that acts comes one that answers.
        return min((self.max_turns + self.max_invalid + 1) * self.max_turn_tokens, self.max_episode_tokens)

    @model_validator(mode="before")
    @classmethod
    def _reads_its_instruction(cls, tree: Any) -> Any:
        file = tree.get("instruction_file") if isinstance(tree, dict) else None
        if not isinstance(file, str):
            return tree
        if tree.get("instruction") is not None:
            raise ValueError("set `instruction` or `instruction_file`, not both")
        try:
            text = Path(absolute(file)).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"instruction_file {absolute(file)} cannot be read: {error}") from error
        # The file may change, or be missing on another machine; what a run was told stands in its resolved configuration.
        return tree | {"instruction": text, "instruction_file": None}

    @field_validator("tools")
    @classmethod
    def _has_each_tool_once(cls, tools: list[ToolConfig]) -> list[ToolConfig]:
        packaged = [tool.kind for tool in tools if ":" not in tool.kind]
        if len(set(packaged)) < len(packaged):
            raise ValueError("name each tool once")
        return tools

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_turn_tokens >= self.max_episode_tokens:
            raise ValueError(
                f"max_turn_tokens {self.max_turn_tokens} must be below max_episode_tokens {self.max_episode_tokens}"
            )
        if self.max_observation_tokens >= self.max_episode_tokens:
            raise ValueError(
                f"max_observation_tokens {self.max_observation_tokens} must be below max_episode_tokens {self.max_episode_tokens}"
            )
        return self
