"""The section `evaluation`: when questions are asked that are not trained on, how, and what their scores decide."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from agentrl.config.base import Section


class EvaluationConfig(Section):
    """Evaluates over `data.eval`."""

    before: bool = True
    """Whether to evaluate before training."""
    after: bool = True
    """Whether to evaluate after training."""
    every: int | None = Field(None, ge=1)
    """Evaluates during training after every so many steps; null does not."""
    limit: int | None = Field(None, ge=1)
    """The evaluations during training ask the first so many questions of each set; those before and after ask all."""
    temperature: float = Field(0.0, ge=0)
    """Of sampling; 0 is greedy."""
    samples: int = Field(1, ge=1)
    """Episodes that answer each question, above temperature 0. The scores of a question are the means over them (avg@n)."""
    best: Literal["exact_match", "f1"] = "exact_match"
    """The score whose mean over sets decides which checkpoint is the best; the other decides where that is the same."""
    patience: int | None = Field(None, ge=1)
    """After so many evaluations during training in a row that are not better than the best before them, the run ends."""
    keep: Literal["last", "best"] | None = None
    """Which weights a run leaves, those of the last step or of the best checkpoint; null is best with `patience`, and last
    without.
    """
    ceiling: bool = False
    """Adds what a perfect searcher would score through the same retriever, see agentrl.evaluation.ceiling. It takes questions
    with `metadata.supporting_titles` and `metadata.gold_passage_ids`.
    """

    @property
    def keeps_best(self) -> bool:
        """Whether a run leaves the weights of its best checkpoint, and not those of its last step."""
        return self.keep == "best" or (self.keep is None and self.patience is not None)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        during = {"limit": self.limit, "patience": self.patience, "keep": "best" if self.keep == "best" else None}
        asked = [f"{key} {value}" for key, value in during.items() if value is not None]
        if asked and self.every is None:
            raise ValueError(
                f"{asked[0]} is about evaluations during training, and there are none; set every, or leave it out"
            )
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples {self.samples} at temperature 0 would all be the same episode; set temperature above 0, or samples to 1"
            )
        if 0 < self.temperature < 0.01:
            raise ValueError("temperature must be 0 or at least 0.01, below which vLLM does not sample")
        return self
