"""Estimators and rules for alpha where the truth is known: bias, variance, and what training leads to.

    python benchmarks/estimators.py --json study.json --figure study.png     # about two minutes on two cores
    python benchmarks/estimators.py --quick                                  # K = 8 and 20 seeds, some seconds

In each scenario of `study_scenarios` and for K = 4, 8 and 16 rollouts of a prompt, it compares the rules of `study_rules`:

- at the initial policy, and after 300 steps with the exact gradient, the estimate of a step's gradient against the exact
  one: its bias |E g' - g| / |g|, the cosine of E g' and g, its variance, and the cosine of a single step's estimate.
  Sums over all compositions of a group, so without sampling error, except for single estimates and reinforce_pp.
- after 2,000 steps of 4 prompts with each of 200 seeds: J of the final policy as a share of the best possible, and how often
  its most likely structure is the best one, with 95 % intervals (normal and Wilson).
- the same over random scenarios, so that a rule is not fitted to a few.

Advantages come from `agentrl.advantages.compute`. mt_grpo is left out: the scenarios have no rewards before the end.
Everything is plain ascent at one learning rate, without clipping of ratios or KL, with one policy for all prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import study_training as training
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from study_rules import CLIP, CORE_RULES, ESTIMATOR_RULES, VARIANT_RULES, Rule, of_rollouts
from study_scenarios import SCENARIOS, Floats, Scenario, ascend, exact_gradient, policy, random_scenarios

from agentrl.scores import wilson

SIZES = (4, 8, 16)
MAIN_SIZE = 8
SINGLE_STEPS = 10_000
MIDDLE = 300
SOLVED, NEAR = 0.95, 0.98
RANDOM_RULES = ("grpo", "stratified 0.8", "step", "progress", "step + balance", "progress + balance", "grpo + balance")
RANDOM_RULES += ("grpo + balance 3", "grpo, clip", "step + balance, clip", "grpo + balance 3, clip")

Record = dict[str, Any]


def gradient_records(scenario: Scenario, k: int, at: str, seed: int) -> list[Record]:
    """Compare each estimator's gradient with the exact one at a policy, "initial" or "middle"."""
    theta, phi = ascend(scenario, 0 if at == "initial" else MIDDLE, training.RATE)
    truth = np.concatenate(exact_gradient(scenario, theta, phi)).ravel()
    norm, records = float(np.linalg.norm(truth)), []
    steps = single_steps(scenario, ESTIMATOR_RULES, k, theta, phi, SINGLE_STEPS, seed)
    for rule, drawn in zip(ESTIMATOR_RULES, steps, strict=True):
        mean, variance, error = drawn.mean(axis=0), float(drawn.var(axis=0).sum()), 0.0
        if rule.scope == "prompt":
            mean, variance = training.exact_moments(scenario, rule, k, theta, phi)
            variance /= training.PROMPTS
        else:
            error = (variance / len(drawn)) ** 0.5 / norm
        records.append(
            {
                "scenario": scenario.name,
                "k": k,
                "policy": at,
                "estimator": rule.name,
                "bias": float(np.linalg.norm(mean - truth)) / norm,
                "bias_standard_error": error,
                "variance": variance,
                "cosine": float(_cosine(mean, truth)),
                "cosine_of_a_step": _interval(_cosine(drawn, truth)),
            }
        )
    return records


def single_steps(
    scenario: Scenario, rules: Sequence[Rule], k: int, theta: Floats, phi: Floats, count: int, seed: int
) -> Floats:
    """Draw steps at the policy theta, phi [3, 1] and return the gradients that the rules estimate, [R, count, 6]."""
    shape = len(theta), len(rules), count
    p, q = (np.broadcast_to(x[:, None], shape) for x in policy(theta, phi))
    drawn = training.sample(scenario, p, q, k, np.random.default_rng(seed))
    parts = training.Tables(rules, scenario.levels, k).gradient(np.ones(shape[1:]), p, q, *drawn)
    return np.moveaxis(np.concatenate(parts), 0, -1)


def training_records(
    scenario: Scenario, rules: Sequence[Rule], k: int, seeds: int, steps: int, seed: int
) -> list[Record]:
    """Train with each rule and describe the final policies; `share` and `during` are J / best possible."""
    outcome, best = training.train(scenario, rules, k, seeds, steps, seed), float(scenario.best[0])
    right = (outcome.theta.argmax(axis=0) == scenario.best_structure).sum(axis=1)
    return [
        {
            "scenario": scenario.name,
            "k": k,
            "rule": rule.name,
            "best": best,
            "share": _interval(final / best),
            "picks_best": _proportion(int(hits), seeds),
            "during": float(during.mean() / best),
        }
        for rule, final, during, hits in zip(rules, outcome.final, outcome.during, right, strict=True)
    ]


def random_records(count: int, repeats: int, steps: int, seed: int) -> list[Record]:
    """Train on random scenarios; a record for each rule."""
    rules = [rule for rule in CORE_RULES + VARIANT_RULES if rule.name in RANDOM_RULES]
    scenario = random_scenarios(count, repeats, seed)
    outcome = training.train(scenario, rules, MAIN_SIZE, count * repeats, steps, seed)
    shares = (outcome.final / scenario.best).reshape(len(rules), count, repeats).mean(axis=2)
    near = (shares >= NEAR * shares.max(axis=0)).sum(axis=1)
    return [
        {
            "steps": steps,
            "rule": rule.name,
            "share": _interval(share),
            "worst": float(share.min()),
            "near_best_rule": _proportion(int(hits), count),
        }
        for rule, share, hits in zip(rules, shares, near, strict=True)
    ]


def verdicts(records: Sequence[Record], k: int) -> list[Record]:
    """Say of each rule in how many of the solved scenarios its interval lies within 2 % of the best rule's J.

    A scenario is solved if some rule reaches 95 % of the best possible J. `worst` is the least ratio of the interval's
    lower end to the best rule's mean.
    """
    cells = [record for record in records if record["k"] == k]
    leader: dict[str, float] = {}
    for cell in cells:
        leader[cell["scenario"]] = max(leader.get(cell["scenario"], 0.0), cell["share"][0])
    ratios: dict[str, list[float]] = {cell["rule"]: [] for cell in cells}
    for cell in cells:
        if leader[cell["scenario"]] >= SOLVED:
            ratios[cell["rule"]].append(cell["share"][1] / leader[cell["scenario"]])
    return [
        {
            "k": k,
            "rule": rule,
            "near": sum(ratio >= NEAR for ratio in found),
            "solved": len(found),
            "worst": min(found, default=0.0),
        }
        for rule, found in ratios.items()
    ]


def check_pooled(levels: Floats) -> None:
    """Raise unless advantages from pooled counts are those that `compute` gives the same rollouts."""
    category = np.random.default_rng(0).integers(0, levels.size, 32)
    counts = np.bincount(category, minlength=levels.size).reshape(levels.shape)
    for name, options in (("reinforce_pp", {}), ("stratified", {"alpha": 1.0, "scope": "batch"})):
        expected = of_rollouts(name, options, levels.ravel(), category, np.arange(32) // 8)[:, 0]
        found = training.pooled(counts, levels, name == "stratified").ravel()[category]
        np.testing.assert_allclose(found, expected, atol=1e-9)


def run(seeds: int, sizes: Sequence[int], scenarios: int, repeats: int, steps: int, seed: int, workers: int) -> Record:
    """Run the whole study and return what `--json` writes; `scenarios` random ones, each `repeats` times."""
    started = time.perf_counter()
    for scenario in SCENARIOS:
        check_pooled(scenario.levels)
    results: dict[str, list[Record]] = {"training": [], "random": [], "gradients": []}
    with ProcessPoolExecutor(workers) as pool:
        # The longest first, so that no core waits at the end.
        jobs = {pool.submit(random_records, scenarios, repeats, n, seed): "random" for n in (steps, steps // 4)}
        for k in sorted(sizes, key=lambda k: -len(_rules(k)) * k):
            for scenario in SCENARIOS:
                jobs[pool.submit(training_records, scenario, _rules(k), k, seeds, steps, seed)] = "training"
        for k in sizes:
            for scenario in SCENARIOS:
                for at in ("initial", "middle"):
                    jobs[pool.submit(gradient_records, scenario, k, at, seed)] = "gradients"
        for job in as_completed(jobs):
            results[jobs[job]] += job.result()
    # Jobs end in any order.
    results["training"].sort(key=_place)
    results["gradients"].sort(key=_place)
    results["random"].sort(key=lambda record: record["steps"])
    settings = {"seeds": seeds, "sizes": list(sizes), "seed": seed, "steps": steps, "rate": training.RATE}
    settings |= {"prompts": training.PROMPTS, "random_scenarios": scenarios, "random_repeats": repeats}
    settings |= {"clip": CLIP, "scenarios": [asdict(scenario) for scenario in SCENARIOS]}
    verdict = [entry for k in sizes for entry in verdicts(results["training"], k)]
    return {"settings": settings, "seconds": time.perf_counter() - started, "verdicts": verdict, **results}


def _place(record: Record) -> tuple[int, int]:
    return record["k"], [scenario.name for scenario in SCENARIOS].index(record["scenario"])


def _rules(k: int) -> tuple[Rule, ...]:
    return CORE_RULES + VARIANT_RULES if k == MAIN_SIZE else CORE_RULES


def _cosine(found: Floats, truth: Floats) -> Floats:
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(truth)
    # A step without signal points nowhere: cosine 0.
    return np.divide(found @ truth, norms, out=np.zeros_like(norms), where=norms > 1e-12)


def _interval(values: Floats) -> list[float]:
    """Return the mean and its normal 95 % interval."""
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return [mean, mean - half, mean + half]


def _proportion(hits: int, of: int) -> list[float]:
    """Return hits / of and its Wilson 95 % interval."""
    return [hits / of, *wilson(hits, of)]


def show(study: Record, console: Console) -> None:
    """Print the study as tables."""
    console.print(_gradient_table(study["gradients"]))
    for k in study["settings"]["sizes"]:
        console.print(_training_table(study, k))
        console.print(_choice_table(study["training"], k))
    for steps in sorted({record["steps"] for record in study["random"]}):
        console.print(_random_table([record for record in study["random"] if record["steps"] == steps]))
    console.print(f"{study['settings']['seeds']} seeds; {study['seconds']:.0f} s")


def _gradient_table(records: Sequence[Record]) -> Table:
    table = Table(title=f"gradient of a step, K = {MAIN_SIZE}: means over the scenarios (least cosine of them)")
    columns = [
        (at, what) for at in ("initial", "middle") for what in ("bias", "variance", "cosine", "cosine_of_a_step")
    ]
    for name in ("estimator", *(f"{at} {what}".replace("_", " ") for at, what in columns)):
        table.add_column(name)
    for rule in ESTIMATOR_RULES:
        row = []
        for at, what in columns:
            of = [r for r in records if (r["estimator"], r["k"], r["policy"]) == (rule.name, MAIN_SIZE, at)]
            values = [r[what][0] if what == "cosine_of_a_step" else r[what] for r in of]
            row.append(f"{np.mean(values):.3f}" + (f" ({min(values):.2f})" if "cosine" in what else ""))
        table.add_row(rule.name, *row)
    return table


def _training_table(study: Record, k: int) -> Table:
    table = _by_scenario(
        f"K = {k}: J / best possible (± 95 %); bold: within 2 % of the best rule in all solved scenarios"
    )
    table.caption = (
        "step, linear, cosine, progress: from pure SAN to GRPO. balance: 0.5 unless said. worst: least ratio to the best rule; "
        "near: scenarios within 2 % of it, of those solved; during: J averaged over the run"
    )
    for name in ("worst", "near", "during"):
        table.add_column(name, justify="right")
    for verdict in (v for v in study["verdicts"] if v["k"] == k):
        cells = [r for r in study["training"] if (r["k"], r["rule"]) == (k, verdict["rule"])]
        shares = (f"{mean:.3f} ±{f'{mean - low:.3f}'[1:]}" for mean, low, _ in (r["share"] for r in cells))
        near = f"{verdict['near']}/{verdict['solved']}"
        during = f"{np.mean([r['during'] for r in cells]):.3f}"
        style = "bold" if verdict["near"] == verdict["solved"] else ""
        table.add_row(verdict["rule"], *shares, f"{verdict['worst']:.3f}", near, during, style=style)
    return table


def _choice_table(records: Sequence[Record], k: int) -> Table:
    table = _by_scenario(f"K = {k}: how often the most likely structure is the best one, in % (95 %)")
    for rule in _rules(k):
        cells = (r["picks_best"] for r in records if (r["k"], r["rule"]) == (k, rule.name))
        table.add_row(rule.name, *("{:.0f} ({:.0f}-{:.0f})".format(*(100 * x for x in cell)) for cell in cells))
    return table


def _random_table(records: Sequence[Record]) -> Table:
    table = Table(title=f"random scenarios, K = {MAIN_SIZE}, {records[0]['steps']} steps: J / best possible")
    for name in ("rule", "mean (95 %)", "worst scenario", "within 2 % of the best rule (95 %)"):
        table.add_column(name)
    for r in records:
        mean, low, high = r["share"]
        share, least, most = (100 * x for x in r["near_best_rule"])
        table.add_row(
            r["rule"],
            f"{mean:.3f} ({low:.3f}-{high:.3f})",
            f"{r['worst']:.3f}",
            f"{share:.0f} % ({least:.0f}-{most:.0f})",
        )
    return table


def _by_scenario(title: str) -> Table:
    table = Table(title=title)
    table.add_column("rule", no_wrap=True)
    for scenario in SCENARIOS:
        table.add_column(scenario.name, justify="right", no_wrap=True)
    return table


def draw(study: Record, path: Path) -> None:
    """Write J / best possible of every rule and scenario for the main K as a figure."""
    cells = [record for record in study["training"] if record["k"] == MAIN_SIZE]
    rules, names = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("rule", "scenario"))
    shares = np.array([cell["share"][0] for cell in cells]).reshape(len(names), len(rules)).T
    figure = Figure(figsize=(9, 0.27 * len(rules) + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="viridis", vmin=0.3, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(rules)), rules)
    for (row, place), share in np.ndenumerate(shares):
        axes.text(
            place, row, f"{100 * share:.1f}", ha="center", va="center", fontsize=8, color="k" if share > 0.7 else "w"
        )
    axes.set_title(
        f"100 J / best possible after {study['settings']['steps']} steps, K = {MAIN_SIZE}, {study['settings']['seeds']} seeds"
    )
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="trained policies for each rule, scenario and K (200)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--quick", action="store_true", help=f"only K = {MAIN_SIZE}, 20 seeds and few random scenarios")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--figure", type=Path, help="write a PNG or SVG here")
    options = parser.parse_args(arguments)
    seeds, sizes, scenarios, repeats = (20, (MAIN_SIZE,), 20, 2) if options.quick else (200, SIZES, 100, 8)
    seeds = options.seeds or seeds
    study = run(seeds, sizes, scenarios, repeats, training.STEPS, options.seed, options.workers)
    show(study, Console(width=max(Console().width, 200)))
    if options.json:
        options.json.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    if options.figure:
        draw(study, options.figure)


if __name__ == "__main__":
    main()
