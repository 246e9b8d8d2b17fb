"""agentrl's advantages in a GRPOTrainer of TRL that is otherwise its own: its rollouts, rewards, loss and schedules.

    trainer = StratifiedGRPOTrainer(model, reward_funcs=exact_match, strata=count_tool_results, train_dataset=questions)

TRL 1.16 has no documented place for advantages, so two of its private methods are extended here. A test names all that is
relied on, so that an upgrade fails there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from agentrl.advantages import ESTIMATORS, AdvantageError, compute, get_estimator
from agentrl.advantages.estimators import check_options
from agentrl.integrations import ESTIMATORS_OF_ROLLOUTS

Strata = Callable[..., Sequence[Hashable]]
"""strata(prompts, completions, completion_ids, **columns) -> a key for each of the n completions"""


def count_tool_results(completions: Sequence[Sequence[Mapping[str, Any]]], **unused: Any) -> list[int]:
    """Return for each of n conversational completions the number of results that tools gave in it.

    With a search as the only tool, that is the number of searches (arXiv 2510.06214).

    Raises:
        AdvantageError: if a completion is text and not a list of messages.
    """
    if any(isinstance(completion, str) for completion in completions):
        raise AdvantageError(
            "count_tool_results needs conversational completions, and these are text: give the trainer `strata` of your own"
        )
    return [sum(message["role"] == "tool" for message in completion) for completion in completions]


class StratifiedAdvantages:
    """Gives a GRPOTrainer agentrl's advantages in the place of TRL's; stands before it among the bases of a class.

    TRL's `scale_rewards` then has no effect: the estimator decides what advantages are divided by. The rewards are TRL's,
    weighed and summed; a completion that all reward functions gave None is excluded. Each process sees the rollouts of all.
    """

    def __init__(
        self,
        *args: Any,
        strata: str | Strata,
        estimator: str = "stratified",
        estimator_options: Mapping[str, Any] | None = None,
        scope: Literal["prompt", "batch"] = "prompt",
        **kwargs: Any,
    ) -> None:
        """Set up a trainer.

        Args:
            args: the trainer's own.
            strata: gives n completions a key each; it is called as TRL calls reward functions. Or the name of a column of
                the data set, or of a field that a `rollout_func` returns.
            estimator: one of `agentrl.integrations.ESTIMATORS_OF_ROLLOUTS`, or an import path.
            estimator_options: the estimator's own, such as {"alpha": 0.6}.
            scope: what a rollout is compared with, as `agentrl.advantages.compute` says.
            kwargs: the trainer's own.

        Raises:
            AdvantageError: if the estimator or an option is unknown, the estimator needs turns or a past, or TRL's settings
                give each reward function advantages of its own.
        """
        self._strata, self._estimator, self._scope = strata, estimator, scope
        self._estimator_options = dict(estimator_options or {})
        check_options(estimator, get_estimator(estimator), self._estimator_options)
        if estimator in ESTIMATORS.keys() - set(ESTIMATORS_OF_ROLLOUTS):
            raise AdvantageError(
                f"estimator {estimator!r} needs more than whole rollouts; in TRL's trainer there are: "
                f"{', '.join(ESTIMATORS_OF_ROLLOUTS)}"
            )
        super().__init__(*args, **kwargs)
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise AdvantageError(
                f"multi_objective_aggregation is {self.multi_objective_aggregation}, which normalises each reward function; "
                "stratified advantages are those of their sum: set it to sum_then_normalize"
            )
        self._scored: tuple[torch.Tensor, list[Hashable]] | None = None

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        by_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards = (by_function * self.reward_weights.to(by_function.device)).nansum(1)
        rewards[by_function.isnan().all(1)] = torch.nan
        strata = self._stratify(inputs, prompts, completions, completion_ids_list)
        self._scored = rewards, gather_object(strata)
        return by_function

    def _stratify(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> list[Hashable]:
        """Return the strata of this process's completions."""
        columns = {name: [row[name] for row in inputs] for name in inputs[0]}
        if isinstance(self._strata, str):
            if self._strata not in columns:
                raise AdvantageError(f"strata names the column {self._strata!r}; there are: {', '.join(columns)}")
            return columns[self._strata]
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        columns = {name: values for name, values in columns.items() if name not in ("prompt", "completion", *given)}
        strata = list(self._strata(**given, **columns))
        if len(strata) != len(completions):
            raise AdvantageError(
                f"strata must give {len(completions)} keys, one for each completion, got {len(strata)}"
            )
        return strata

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        rewards, strata = self._scored
        mode = "train" if self.model.training else "eval"
        size = self.num_generations if mode == "train" else self.num_generations_eval
        own = output["completion_mask"] * output.get("tool_mask", 1)
        found = compute(
            rewards,
            groups=[row // size for row in range(len(rewards))],
            strata=strata,
            estimator=self._estimator,
            # A length is a weight, which cannot be 0.
            lengths=self.accelerator.gather(own.sum(1).clamp(min=1)),
            scope=self._scope,
            **self._estimator_options,
        )
        local = len(output["advantages"])
        first = self.accelerator.process_index * local
        output["advantages"] = found.values[first : first + local]
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(rewards))):
            logged.pop()
        logged.extend(found.values.tolist())
        for name, value in found.report.metrics().items():
            self._metrics[mode][f"advantages/{name}"].append(value)
        return output


class StratifiedGRPOTrainer(StratifiedAdvantages, GRPOTrainer):
    """TRL's GRPOTrainer with agentrl's advantages; `StratifiedAdvantages` says which arguments it takes beside TRL's."""
