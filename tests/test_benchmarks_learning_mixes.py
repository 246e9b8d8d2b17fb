"""A study of several mixes of questions: the order of its runs, its report, and how variants are compared."""

import dataclasses
import json
import math
from pathlib import Path

import learning
import learning_cells
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learning import Report, read_arguments, run_study, show_results
from learning_cells import Study, make_cells, model_hash, read_study
from learning_pairs import compare_pairs, holm
from rich.console import Console
from scipy import stats

from agentrl.advantages import compute
from agentrl.config import ConfigError
from agentrl.runs import RunFolder

CONFIG = """
name: small
model: {path: model}
data: {root: .}
retriever: {kind: http, url: "http://127.0.0.1:9/retrieve"}
training: {steps: 6, learning_rate: 1.0e-3}
evaluation: {before: false, after: false}
"""
CLAIM = Path(learning.__file__).with_name("claim.yaml")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Two variants and two seeds on two mixes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learning, "console", Console(width=200, highlight=False))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    (tmp_path / "one.yaml").write_text(CONFIG)
    (tmp_path / "two.yaml").write_text("extends: one.yaml\ntraining: {learning_rate: 2.0e-3}\n")
    return Study("s", {"one": "one.yaml", "two": "two.yaml"}, [0, 1], [], {"a": [], "b": [], "c": []}, first=["b"])


def finish(cell):
    """Leave behind what a finished run would."""
    folder = RunFolder.create(cell.config)
    folder.close()
    lines = [{"event": "start", "time": 100.0, "model": model_hash(cell.config)}]
    for step in range(1, 7):
        metrics = {"reward/mean": 0.5, "searches/mean": 1.5, "episodes": 8.0, "tokens/model": 80.0, "entropy": 1 / step}
        variances = {"advantages/variance_between_strata": 0.25, "advantages/variance_within_strata": 0.75}
        folder.append_metrics(step, {**metrics, **variances, "grad_norm": 0.1, "strata/1/share": 1.0})
        lines.append({"event": "step", "time": 100.0 + step, "step": step})
    cell.times.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.adapter.mkdir()


def test_first_variants_come_first_on_every_mix_and_each_part_seed_by_seed(study, tmp_path):
    cells = make_cells(study, tmp_path / "out")
    assert [(cell.variant, cell.seed, cell.mix) for cell in cells[:6]] == [
        ("b", 0, "one"),
        ("b", 0, "two"),
        ("b", 1, "one"),
        ("b", 1, "two"),
        ("a", 0, "one"),
        ("c", 0, "one"),
    ]
    assert cells[1].config.folder == tmp_path / "out/two/b/seed-0"
    assert cells[1].config.training.learning_rate == 2e-3
    assert len({cell.config.folder for cell in cells}) == len(cells) == 12


def test_runs_in_known_results_are_not_trained_again_if_they_are_the_same(study, tmp_path, monkeypatch, capsys):
    for cell in make_cells(study, tmp_path / "out"):
        finish(cell)
    results, again = tmp_path / "results.json", tmp_path / "again.json"
    assert run_study(study, tmp_path / "out", results)
    monkeypatch.setattr(learning_cells, "TRAIN", [str(tmp_path / "missing")])
    assert run_study(study, tmp_path / "elsewhere", again, results)
    assert json.loads(again.read_text()) == json.loads(results.read_text())
    assert "taken from" in capsys.readouterr().out
    other = dataclasses.replace(study, overrides=[*study.overrides, "training.llds.tolerance=0.5"])
    with pytest.raises(FileNotFoundError):
        run_study(other, tmp_path / "other", again, results)


def test_a_report_keeps_mixes_apart_and_is_shown_again_without_a_run(study, tmp_path, capsys):
    cells = make_cells(study, tmp_path / "out")
    for cell in cells:
        finish(cell)
    results = tmp_path / "results.json"
    assert run_study(study, tmp_path / "out", results)
    report = json.loads(results.read_text())
    assert {mix: found["config"] for mix, found in report["mixes"].items()} == study.mixes
    assert report["mixes"]["two"]["summary"]["a"]["seeds"] == [0, 1]
    assert len(report["runs"]) == 12
    pictures = [tmp_path / "results_one.png", tmp_path / "results_two.png"]
    for picture in pictures:
        picture.unlink()
    before = capsys.readouterr().out
    show_results(results, None)
    again = capsys.readouterr().out
    assert again.partition("one")[2] in before
    assert "0.250 to 0.250" in again  # the share of the variance between strata
    assert all(picture.exists() for picture in pictures)
    with pytest.raises(ConfigError, match="no run of d"):
        show_results(results, "d")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"other\.json: no results of a study"):
        show_results(tmp_path / "other.json", None)
    assert read_arguments(["report", "results.json", "--against", "a"]) == Report(Path("results.json"), "a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mixes: {}", "mixes is empty"),
        ("mixes: {a: 1}", "mixes must hold a config"),
        ("{config: a.yaml, mixes: {a: b.yaml}}", "not both"),
        ("first: a", "first must be a list"),
    ],
)
def test_unsound_mixes_of_a_study_file_are_refused(tmp_path, text, expected):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        read_study(tmp_path / "study.yaml")


def test_what_is_to_come_first_must_be_a_variant(study, tmp_path):
    wrong = Study("s", study.mixes, [0], [], study.variants, first=["d"])
    with pytest.raises(ConfigError, match="no variant 'd'"):
        make_cells(wrong, tmp_path)


def test_the_shipped_study_has_sound_configs(tmp_path):
    study, _, results, _ = read_arguments(["sweep", str(CLAIM)])
    cells = make_cells(study, tmp_path)
    assert len(cells) == len(study.mixes) * len(study.seeds) * len(study.variants) == 195
    assert {cell.variant for cell in cells[:45]} == {"grpo", "san", "alpha 0.8"}
    assert results.name == "learning_claim.json"
    assert {cell.mix: cell.config.name for cell in cells}.keys() == {"plain", "practise", "distract"}


def records(**outcomes):
    return [
        {"variant": variant, "seed": seed, "right": right}
        for variant, by_seed in outcomes.items()
        for seed, right in enumerate(by_seed)
    ]


def test_pairs_count_what_one_alone_has_right_and_leave_out_what_one_has_no_score_for():
    found = compare_pairs(records(a=["1100-", "1000-"], b=["10111", "1100-"], c=[None, None]), "a")
    assert found.keys() == {"b"}
    (b,) = found.values()
    assert (b["pairs"], b["gained"], b["lost"]) == (8, 3, 1)
    assert b["difference"] == pytest.approx(2 / 8)
    assert b["p"] == pytest.approx(stats.binomtest(3, 4).pvalue)
    with pytest.raises(ConfigError, match="cannot be paired"):
        compare_pairs(records(a=["11"], b=["1"]), "a")


def test_the_interval_of_a_difference_is_wider_where_seeds_disagree():
    agree = compare_pairs(records(a=["0" * 100] * 4, b=["1" * 50 + "0" * 50] * 4), "a")["b"]
    differ = compare_pairs(records(a=["0" * 100] * 4, b=["1" * 100, "1" * 100, "0" * 100, "0" * 100]), "a")["b"]
    assert agree["difference"] == differ["difference"] == 0.5
    assert differ["high"] - differ["low"] > 2 * (agree["high"] - agree["low"])
    # Over questions alone it is that of a mean: 1.96 * sqrt(.25 / 100).
    assert agree["high"] - agree["difference"] == pytest.approx(0.098, abs=0.015)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_value_keeps_their_order_and_multiplies_the_least_by_their_number(values):
    corrected = holm(values)
    assert all(value <= other <= 1 for value, other in zip(values, corrected, strict=True))
    assert sorted(corrected) == [corrected[place] for place in np.argsort(values)]
    if values:
        assert min(corrected) == pytest.approx(min(1.0, len(values) * min(values)))


def test_the_balance_of_grpo_favours_rare_strata_and_adds_up_to_nothing():
    batch = {"groups": [0] * 4, "strata": [1, 1, 1, 2], "estimator": "learning_rules:grpo_with_balance"}
    plain = compute([1, 0, 1, 0], **batch, balance=0.0).values
    pushed = compute([1, 0, 1, 0], **batch, balance=0.5).values
    assert np.allclose(plain, compute([1, 0, 1, 0], groups=[0] * 4, strata=[1, 1, 1, 2], estimator="grpo").values)
    assert pushed[3] > plain[3]
    assert math.isclose(np.sum(pushed) - np.sum(plain), 0.0, abs_tol=1e-12)
