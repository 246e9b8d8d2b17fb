"""Every metric of a step: its name, its unit, what it means and what in it should worry. docs/metrics.md is made of this.

python -m agentrl.training.metrics_reference > docs/metrics.md
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_PLACEHOLDER = re.compile(r"[A-Z]+")


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, or several that belong together.

    Attributes:
        names: what it is called in metrics.jsonl. A word in capitals stands for whatever is there, as in `strata/KEY/share`.
        unit: what it counts, such as tokens or nats a token.
        meaning: what it says.
        worry: what in it should worry, and what to do; empty where nothing does.
    """

    names: tuple[str, ...]
    unit: str
    meaning: str
    worry: str = ""


@dataclass(frozen=True, slots=True)
class Chapter:
    """Metrics of one subject, and what holds for all of them."""

    title: str
    text: str
    metrics: tuple[Metric, ...]


def described(name: str) -> Metric | None:
    """Return the description of a metric by its name in metrics.jsonl; None where there is none."""
    return next(
        (
            metric
            for chapter in CHAPTERS
            for metric in chapter.metrics
            if any(matches(known, name) for known in metric.names)
        ),
        None,
    )


def matches(known: str, name: str) -> bool:
    """Tell whether a metric of metrics.jsonl is the one that is known so, or one of those."""
    # What stands for a placeholder, such as the key of a stratum, may hold slashes.
    pattern = ".+".join(map(re.escape, _PLACEHOLDER.split(known)))
    return re.fullmatch(pattern, name, re.DOTALL) is not None


def page(chapters: Sequence[Chapter]) -> str:
    """Return the reference as a page of Markdown."""
    lines = [
        "# Metrics",
        "",
        "Each step writes one line of `metrics.jsonl`, and the loggers of `logging` show the same numbers. A metric is left out",
        "where it is not finite or nothing computes it. Words in capitals stand for whatever is there, such as the key of a",
        "stratum. `training.watch` looks at some of them by itself, see [training.md](training.md#watching-for-a-collapse).",
        "",
        "This page is made by `python -m agentrl.training.metrics_reference > docs/metrics.md`.",
    ]
    for chapter in chapters:
        lines += ["", f"## {chapter.title}", ""]
        if chapter.text:
            lines += [chapter.text, ""]
        lines += ["| metric | unit | meaning | what should worry you |", "|---|---|---|---|"]
        lines += [
            f"| {', '.join(f'`{name}`' for name in metric.names)} | {metric.unit} | {metric.meaning} | {metric.worry} |"
            for metric in chapter.metrics
        ]
    return "\n".join(lines) + "\n"


CHAPTERS = (
    Chapter(
        "What episodes earned",
        "Of the valid episodes that a step sampled, those that selection drops included.",
        (
            Metric(
                ("reward/mean",),
                "reward",
                "mean reward of an episode: the weighted sum of the rewards in the config",
                "a fall that lasts: the policy collapses, or learning_rate is too high. One step says little, since questions "
                "differ: look at the mean of five",
            ),
            Metric(
                ("rewards/NAME", "rewards/NAME/PART"),
                "as the reward",
                "mean of what the reward of that name, or its part, came to before its weight",
                "one that rises while `correct/share` does not: the policy learns to please that reward",
            ),
            Metric(
                ("reward/penalty",),
                "reward",
                "mean of what rewards below 0, such as one for length, took off an episode",
                "a rise: episodes do more and more of what is punished",
            ),
            Metric(
                ("correct/share",),
                "share",
                "episodes whose answer is an accepted one",
                "a fall that lasts, while the reward does not fall",
            ),
            Metric(
                ("groups/reward_varies",),
                "share",
                "groups whose episodes did not all earn the same",
                "near 0: there is nothing to learn from; take other questions, larger groups, or advantages.selection",
            ),
            Metric(
                ("groups/several_strata",),
                "share",
                "groups whose episodes are in more than one stratum",
                "near 0: stratified advantages are those of GRPO",
            ),
            Metric(
                ("strata/KEY/rollouts", "strata/KEY/share"),
                "episodes, share",
                "how many episodes are in the stratum, and their share of all",
                "one stratum with nearly all: the policy searches in one way alone",
            ),
            Metric(
                ("strata/KEY/reward", "strata/KEY/reward_variance"),
                "reward, its square",
                "mean and variance of the stratum's rewards",
                "",
            ),
        ),
    ),
    Chapter(
        "How episodes went",
        "Of all episodes that a step sampled. Searches are those of valid ones.",
        (
            Metric(("episodes",), "episodes", "how many were sampled", ""),
            Metric(
                ("searches/mean",),
                "searches",
                "searches that an episode executed",
                "near 0 after more: the policy has stopped searching",
            ),
            Metric(
                ("calls/TOOL",),
                "calls",
                "calls of a tool other than `search` that an episode executed",
                "near 0: the policy does not use the tool",
            ),
            Metric(
                ("refused/share",),
                "share",
                "calls of any tool that it refused, or that were stopped",
                "near 1: the model does not know how to call the tool, or the tool is down",
            ),
            Metric(
                ("ends/END",),
                "share",
                "episodes that ended so: `answered`, `turn_limit`, `truncated`, `invalid`, `timed_out`, `prompt_too_long` or "
                "`environment_failure`",
                "`answered` falls; `invalid` stays high: the protocol was never learned, and a warm start helps; `truncated`: "
                "agent.max_episode_tokens is too low",
            ),
            Metric(
                ("failures/CAUSE",),
                "episodes",
                "episodes that the environment failed, by cause: `retriever`, `engine`, `code`, `worker`, `timeout` or `stale`",
                "anything above 0 again and again; the episodes say why, see `agentrl rollout --show`",
            ),
            Metric(
                ("overlong/share",),
                "share",
                "episodes whose turns, tokens or time ran out",
                "a rise, above all with training.mask_overlong, which takes no gradient from them",
            ),
            Metric(
                ("overlong/masked_share",), "share", "episodes of the batch that training.mask_overlong leaves out", ""
            ),
            Metric(
                ("repetition",),
                "share",
                "the model's 4-grams of tokens that came before in their episode",
                "above one half, or well above its start: the policy loops",
            ),
            Metric(
                ("tokens/model", "tokens/environment", "tokens/prompt"),
                "tokens",
                "what the model sampled, what observations held, and what prompts held",
                "`tokens/model` grows without more reward",
            ),
        ),
    ),
    Chapter(
        "Sampler and policy",
        "",
        (
            Metric(
                ("logprobs/mean", "logprobs/correct_mean"),
                "nats a token",
                "the sampler's log-probability of the model's tokens, and of those in episodes whose answer earned 1",
                "`correct_mean` falls by half a nat: right episodes become unlikely; see training.llds",
            ),
            Metric(
                ("logprobs/difference_mean", "logprobs/difference_max"),
                "nats a token",
                "how far the sampler's log-probabilities are from the trainer's before the batch",
                "a mean above 0.02 in fp32 or 0.25 in bf16: engine and trainer compute different policies",
            ),
            Metric(
                ("ratio/positive_q01", "ratio/positive_q50", "ratio/positive_q99"),
                "ratio",
                "quantiles of the trainer's probability before the batch to the sampler's, over tokens of advantage 0 or more",
                "a median away from 1, or a wide spread: see training.importance",
            ),
            Metric(
                ("importance/mean", "importance/cut_share"),
                "ratio, share",
                "the weights that correct for the sampler, and the share of them that importance.cap cuts",
                "`cut_share` of more than a few percent",
            ),
            Metric(
                ("staleness/mean", "staleness/max"),
                "steps",
                "how many steps old the weights were that sampled a turn",
                "",
            ),
        ),
    ),
    Chapter(
        "The update",
        "Over the tokens of the episodes that the model runs for: without a KL term, LLDS or a bonus for entropy, those of "
        "advantage 0 are not among them.",
        (
            Metric(
                ("loss",),
                "loss",
                "the loss; with one update a batch its value says nothing about progress",
                "",
            ),
            Metric(
                ("grad_norm",),
                "norm",
                "the norm of the gradient before training.max_grad_norm cuts it",
                "a rise by orders of magnitude; above max_grad_norm in every step the rate is in truth a lower one",
            ),
            Metric(("learning_rate",), "rate", "the rate of the step's last update", ""),
            Metric(("epoch",), "share", "the share of the run's updates that are done, as TRL counts", ""),
            Metric(
                ("entropy",),
                "nats a token",
                "the entropy of the policy",
                "near 0 while answers are wrong: nothing new is tried any more; thrice its start: the policy falls apart",
            ),
            Metric(
                ("kl",),
                "nats a token",
                "the KL divergence from the model that training began with, by k3, where one is computed",
                "above 1: the policy is far from the model; raise kl.coefficient or lower learning_rate",
            ),
            Metric(("kl/penalty",), "advantage", "what a KL term in the reward took off a token's advantage", ""),
            Metric(
                ("clip_ratio/low", "clip_ratio/high"),
                "share",
                "tokens whose ratio to the policy before the batch clipping cuts; 0 with one update a batch",
                "above a fifth: fewer updates a batch, or a lower learning_rate",
            ),
            Metric(
                ("llds/loss", "llds/actions_fallen_share"),
                "loss, share",
                "the LLDS term before its weight, and the good actions that became less likely",
                "",
            ),
        ),
    ),
    Chapter(
        "Advantages",
        "Of the batch that was trained on; [algorithm.md](algorithm.md) defines them.",
        (
            Metric(
                (
                    "advantages/rollouts",
                    "advantages/excluded",
                    "advantages/groups",
                    "advantages/strata",
                ),
                "count",
                "episodes that count and that do not, groups, and strata of groups",
                "",
            ),
            Metric(
                ("advantages/degenerate_share",),
                "share",
                "episodes alone in their stratum or in one whose rewards are all the same, to which stratified advantages give 0",
                "near 1 with a high `alpha`: too many strata for groups of this size; see advantages.max_strata",
            ),
            Metric(
                ("advantages/between_strata_share",),
                "share",
                "of the variance of rewards in a group, what lies between its strata",
                "",
            ),
            Metric(
                (
                    "advantages/no_signal_share",
                    "advantages/no_signal_share_gn",
                    "advantages/no_signal_share_san",
                ),
                "share",
                "groups whose advantages are all 0: as trained, under GRPO, and under pure stratified ones",
                "near 1: nothing is learned; advantages.selection samples other questions in their place",
            ),
            Metric(
                ("advantages/effective_rollouts",),
                "episodes",
                "how many episodes of equal weight would carry as much (Kish)",
                "a small part of `advantages/rollouts`: few episodes decide the update",
            ),
            Metric(
                ("advantages/sign_flip_share",), "share", "episodes whose advantage has the other sign than GRPO's", ""
            ),
            Metric(
                ("advantages/variance_between_strata", "advantages/variance_within_strata"),
                "advantage squared",
                "the variance of advantages in a group between and within its strata",
                "much between: the update favours ways of searching more than good episodes among them",
            ),
            Metric(
                ("advantages/strata/KEY/rollouts", "advantages/strata/KEY/reward", "advantages/strata/KEY/advantage"),
                "episodes, reward, advantage",
                "the stratum's episodes, their mean reward and their mean advantage",
                "",
            ),
            Metric(
                (
                    "advantages/strata/KEY/san_mean",
                    "advantages/strata/KEY/san_variance",
                    "advantages/strata/KEY/gn_mean",
                    "advantages/strata/KEY/gn_variance",
                ),
                "advantage",
                "moments of stratified and of global advantages in the stratum; a global mean other than 0 is what GRPO says "
                "about having searched so at all",
                "",
            ),
            Metric(
                ("advantages/option/NAME",),
                "as the option",
                "the value that an option of the estimator had in this step, if it changes during the run",
                "",
            ),
            Metric(("estimator/NAME",), "its own", "what the estimator noted for later steps, such as sums", ""),
        ),
    ),
    Chapter(
        "Questions",
        "",
        (
            Metric(("questions/used",), "questions", "how many were taken from the sets since the run began", ""),
            Metric(
                (
                    "selection/sampled_groups",
                    "selection/dropped_groups",
                    "selection/unfilled_groups",
                    "selection/surplus_groups",
                ),
                "groups",
                "with advantages.selection: sampled, without a signal, missing in the batch, and begun but not needed",
                "`unfilled_groups` above 0: selection.max_extra is too low, or the questions are too hard or too easy",
            ),
        ),
    ),
    Chapter(
        "Time and memory",
        "",
        (
            Metric(
                ("seconds/rollout", "seconds/train", "seconds/publish"),
                "seconds",
                "sampling the batch, all updates on it, and loading new weights into the engines",
                "",
            ),
            Metric(
                ("seconds/wait",),
                "seconds",
                "how long the trainer waited for the batch",
                "most of a step: more engines, or rollout.max_staleness, which samples ahead",
            ),
            Metric(
                ("seconds/search",),
                "seconds a search",
                "how long an episode waited for the retriever",
                "a rise: the retriever is overloaded",
            ),
            Metric(("tokens/trained",), "tokens", "tokens of the episodes that were trained on", ""),
            Metric(
                ("tokens_per_second/rollout", "tokens_per_second/train"),
                "tokens a second",
                "of the model and the environment while sampling, and of what was trained on",
                "",
            ),
            Metric(
                ("memory/trainer_gib",),
                "GiB",
                "the most memory that the trainer has held: of its card on CUDA, else of its process",
                "a rise from step to step",
            ),
            Metric(
                ("rollout/restarts", "rollout/retried_groups"),
                "count",
                "workers that were started again, and groups that were handed out again, since the latest start",
                "anything above 0 again and again; logs/ says why",
            ),
        ),
    ),
)


if __name__ == "__main__":
    print(page(CHAPTERS), end="")
