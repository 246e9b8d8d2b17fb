"""The benchmark of learning trains each cell once, goes on after a kill, refuses runs of anything else, and counts right."""

import json
import math
import os
import sys
import time

import learning
import learning_cells
import pytest
from learning import read_arguments, run_study
from learning_cells import Study, make_cells, model_hash, read_study, read_times, run_cell, vary
from learning_curves import draw
from learning_tables import (
    cost_table,
    over_seeds,
    passing_step,
    read_record,
    run_table,
    speed_table,
    summarize,
    variant_table,
)
from rich.console import Console

from agentrl.config import ConfigError
from agentrl.runs import RunError, RunFolder

CONFIG = """
name: small
model: {path: model}
data:
  root: .
  train: [{path: questions.jsonl, name: q}]
  eval: [{path: questions.jsonl, name: q}]
retriever: {kind: http, url: "http://127.0.0.1:9/retrieve"}
training: {steps: 6, learning_rate: 1.0e-3}
"""

# Leaves behind what `agentrl train` would; where a file `kill-STEP` stands beside the runs, it is killed after that step.
TRAINER = """
import os, signal, sys
from pathlib import Path
from agentrl.config import load_config
from agentrl.data.inputs import describe_inputs
from agentrl.runs import RunFolder, new_checkpoint

resume = "--resume" in sys.argv
source, *overrides = [word for word in sys.argv[2:] if word != "--resume"]
config = load_config(source, overrides)
described = describe_inputs(config)
folder, done = RunFolder.reopen(config, described) if resume else (RunFolder.create(config, described), 0)
print("resumed after" if resume else "begun after", done)
scores = {"dataset": "q", "n": 10, "failed": 0, "em": 0.2, "causes": {}}
folder.write_evaluation(0, {"sets": [scores]})
for step in range(done + 1, config.training.steps + 1):
    reward = min(1.0, config.training.learning_rate * 200 * step + config.seed / 100)
    stratum = {"strata/1/share": 1.0, "strata/1/reward": reward, "strata/1/rollouts": 16.0}
    folder.append_metrics(step, {"reward/mean": reward, "searches/mean": 1.0, "episodes": 16.0, **stratum})
    if step % 2 == 0:
        with new_checkpoint(folder.checkpoints, step, keep=2) as aside:
            (aside / "state").mkdir()
    order = Path(f"kill-{step}")
    if order.exists():
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
folder.adapter.mkdir(exist_ok=True)
folder.write_evaluation(config.training.steps, {"sets": [scores | {"em": 0.9, "failed": 1, "causes": {"retriever": 1}}]})
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a config, its question, its model, and a stand-in for `agentrl train`; commands are run in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(CONFIG)
    (tmp_path / "questions.jsonl").write_text('{"id": "1", "question": "who?", "golden_answers": ["me"]}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(learning_cells, "TRAIN", [sys.executable, "-P", "trainer.py"])
    monkeypatch.setattr(learning, "console", Console(width=200, highlight=False))
    return tmp_path


def study(**changes):
    settings = {"name": "s", "mixes": {"": "small.yaml"}, "seeds": [0], "overrides": [], "variants": {"plain": []}}
    return Study(**settings | changes)


def cell(place, **changes):
    (only,) = make_cells(study(**changes), place / "out")
    return only


def finished(place, rewards, *, seed=0, variant="plain", **metrics):
    """The cell of a run whose steps had these rewards, ten seconds each."""
    made = cell(place, seeds=[seed], variants={variant: []}, overrides=[f"training.steps={len(rewards)}"])
    folder = RunFolder.create(made.config)
    folder.close()
    # As they were noted before starts had a cpu.
    lines = [{"event": "start", "time": 100.0, "model": model_hash(made.config)}]
    for step, reward in enumerate(rewards, 1):
        strata = {"strata/0/share": 0.25, "strata/1/share": 0.75}
        folder.append_metrics(step, {"reward/mean": reward, "searches/mean": 1.5, "episodes": 8.0, **strata, **metrics})
        lines.append({"event": "step", "time": 100.0 + 10 * step, "step": step})
    made.times.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, em in ((0, 0.25), (len(rewards), 0.75)):
        scores = {"n": 20, "failed": 1, "em": em, "causes": {"retriever": 1, "prompt_too_long": 2}}
        folder.write_evaluation(step, {"sets": [scores, scores]})
    folder.adapter.mkdir()
    return made


def test_what_varies_is_combined_and_named_by_the_last_part_of_each_key():
    assert vary({"training.learning_rate": ["1e-3", "2e-3"], "seed": ["4"]}) == {
        "learning_rate=1e-3,seed=4": ["training.learning_rate=1e-3", "seed=4"],
        "learning_rate=2e-3,seed=4": ["training.learning_rate=2e-3", "seed=4"],
    }
    assert list(vary({"engine.threads": ["1"], "training.threads": ["2"]})) == ["engine.threads=1,training.threads=2"]


def test_each_seed_of_each_variant_has_a_folder_and_its_settings(place):
    cells = make_cells(
        study(seeds=[0, 1], overrides=["training.steps=3"], variants=vary({"model.lora.rank": ["4", "8"]})), place
    )
    assert [(c.seed, c.config.seed, c.config.model.lora.rank, c.config.training.steps) for c in cells] == [
        (0, 0, 4, 3),
        (0, 0, 8, 3),
        (1, 1, 4, 3),
        (1, 1, 8, 3),
    ]
    assert cells[0].config.folder == place / "rank=4" / "seed-0"
    assert len({c.config.folder for c in cells}) == 4
    with pytest.raises(ConfigError, match="share a folder"):
        make_cells(study(variants={"a b": [], "a/b": []}), place)


@pytest.mark.parametrize(
    ("override", "instead"), [("seed=1", "--seeds"), ("name=other", "--out"), ("run_dir=elsewhere", "--out")]
)
def test_what_the_study_sets_in_each_run_cannot_vary(place, override, instead):
    for wrong in (study(overrides=[override]), study(variants={"a": [], "b": [override]})):
        with pytest.raises(ConfigError, match=instead) as caught:
            make_cells(wrong, place)
        assert override in str(caught.value)


def test_a_study_is_read_from_a_file_and_the_command_line_goes_before_it(tmp_path):
    file = tmp_path / "rates.yaml"
    file.write_text(
        "config: x.yaml\nseeds: 2\nset: {training.steps: 3}\nvary: {training.learning_rate: [1.0e-3, 2.0e-3]}\n"
    )
    read, out, results, _ = read_arguments(["sweep", str(file), "--seeds", "4", "--set", "training.threads=1"])
    assert (read.name, read.mixes, list(read.seeds)) == ("rates", {"": "x.yaml"}, [0, 1, 2, 3])
    assert read.overrides == ["training.steps=3", "training.threads=1"]
    assert list(read.variants.values()) == [["training.learning_rate=0.001"], ["training.learning_rate=0.002"]]
    assert (out.name, results.name) == ("learning-rates", "learning_rates.json")
    file.write_text("variants: {grpo: {advantages.estimator: grpo, advantages.options: {}}}\n")
    assert read_study(file)["variants"] == {"grpo": ["advantages.estimator=grpo", "advantages.options={}"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 3", "unknown key 'seed'"),
        ("seeds: many", "seeds must be a whole number"),
        ("seeds: true", "seeds must be a whole number"),
        ("seeds: 0", "seeds must be at least 1"),
        ("vary: {}", "vary is empty"),
        ("variants: {}", "variants is empty"),
        ("vary: [", "not valid YAML"),
        ("config: a\nconfig: b", "not valid YAML"),
        ("config: caf\udce9", "not UTF-8"),
        ("vary: {a: 1}", "vary.a must be a list"),
        ("variants: {a: 1}", "variants.a must hold settings"),
        ("{vary: {a: [1]}, variants: {a: {b: 1}}}", "not both"),
        ("[1]", "expected a mapping"),
    ],
)
def test_an_unsound_study_file_is_refused_by_its_name_and_key(tmp_path, text, expected):
    file = tmp_path / "study.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=expected) as caught:
        read_study(file)
    assert str(file) in str(caught.value)


def test_the_command_line_says_in_one_way_what_varies():
    pocket, *_ = read_arguments(["pocket", "--set", "training.steps=2"])
    assert (pocket.mixes, list(pocket.seeds), pocket.variants) == ({"": "pocket.yaml"}, [0, 1, 2, 3, 4], {"pocket": []})
    named, *_ = read_arguments(["sweep", "--variant", "a", "seed=1", "--variant", "b", "seed=2", "seed=3"])
    assert named.variants == {"a": ["seed=1"], "b": ["seed=2", "seed=3"]}
    for wrong in (
        ["sweep"],
        ["sweep", "--vary", "a=1", "--variant", "x", "a=2"],
        ["sweep", "--vary", "a"],
        ["sweep", "--vary", "a=1", "--vary", "a=2"],
        ["sweep", "--variant", "a=1"],
        ["pocket", "--seeds", "0"],
        ["sweep", "--vary", "a=1", "--seeds", "0"],
    ):
        with pytest.raises(ConfigError):
            read_arguments(wrong)


def test_reward_passes_where_the_mean_of_five_steps_does():
    assert passing_step([0.9, 0.9, 0.9, 0.9]) is None
    assert passing_step([0.0, 0.9, 0.9, 0.9, 0.9, 0.9]) == 6
    assert passing_step([0.75] * 9) is None
    assert passing_step([math.nan, 1, 1, 1, 1, 1]) == 6


def test_an_interval_over_seeds_is_students():
    assert over_seeds([1.0]) == {"mean": 1.0, "low": None, "high": None}
    found = over_seeds([1.0, 2.0, 3.0])
    # t with two degrees of freedom is 4.303 at 97.5 %.
    assert found["high"] - found["mean"] == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert over_seeds([1.0, None]) is None


def test_a_record_counts_what_the_run_folder_holds(place):
    more = {"failures/retriever": 1.0, "failures/code": 2.0, "ends/prompt_too_long": 0.25}
    record = read_record(finished(place, [0.2, *[0.8] * 5], **more))
    assert (record["before"]["n"], record["before"]["em"], record["after"]["em"]) == (40, 0.25, 0.75)
    assert record["seconds_to_first_step"] == 10.0
    assert record["minutes"] == record["minutes_to_threshold"] == 1.0
    # Six steps of three failures and two prompts that are too long; two evaluations of two sets.
    assert (record["failed"], record["excluded"]) == (18 + 4, 12 + 8)
    assert record["steps"][0]["strata"] == {"0": 0.25, "1": 0.75}


def test_a_step_without_a_reward_among_the_last_leaves_their_mean_unknown(place):
    record = read_record(finished(place, [0.5] * 5 + [math.nan]))
    assert summarize([record])["last_rewards"] is None
    assert summarize([read_record(finished(place, [math.nan] + [0.5] * 5, seed=1))])["last_rewards"]["mean"] == 0.5


def test_a_last_line_of_the_times_that_was_cut_off_is_left_out_and_another_is_refused(place):
    made = finished(place, [0.5] * 5)
    whole = made.times.read_text()
    made.times.write_text(whole + '{"event": "st')
    assert read_times(made)[1] == 50.0
    made.times.write_text('{"event": "st\n' + whole)
    with pytest.raises(RunError, match=r"times\.jsonl: line 1 is not JSON"):
        read_times(made)


def test_a_record_says_when_on_what_and_with_which_versions_its_run_was_trained(place):
    made = finished(place, [0.5] * 5)
    (made.folder.path / "versions.json").write_text('{"torch": "1.0"}')
    record = read_record(made)
    assert record["date"] == time.strftime("%F", time.localtime(100.0))
    assert record["versions"] == {"torch": "1.0"}
    assert [sorted(cpu) for cpu in record["cpu"]] == [["cores", "gib", "name"]]
    other = {"name": "Other", "cores": 64, "gib": 256.0}
    with made.times.open("a") as file:
        for day in (1, 2):
            file.write(json.dumps({"event": "start", "time": 86400.0 * day, "model": None, "cpu": other}) + "\n")
    later = read_record(made)
    assert later["cpu"] == [*record["cpu"], other]
    assert later["date"] == time.strftime("%F", time.localtime(86400.0 * 2))


def test_results_say_once_what_runs_have_in_common_and_with_each_run_what_not(place):
    for seed in (0, 1):
        finished(place, [math.nan] * 6, seed=seed)
    both, results = study(seeds=[0, 1], overrides=["training.steps=6"]), place / "results.json"
    results.write_text("before")
    kept = place / "kept.json"
    os.link(results, kept)
    assert run_study(both, place / "out", results)
    # The file was replaced as a whole: what was open under its name is as it was.
    assert kept.read_text() == "before"
    report = json.loads(results.read_text(), parse_constant=pytest.fail)
    assert report["date"] == time.strftime("%F", time.localtime(100.0))
    assert {"cpu", "versions"} <= report.keys()
    assert not {"date", "cpu", "versions"} & report["runs"][0].keys()
    (place / "out/plain/seed-1/versions.json").write_text('{"torch": "1.0"}')
    assert run_study(both, place / "out", results)
    other = json.loads(results.read_text())
    assert "versions" not in other
    assert [run["versions"] for run in other["runs"]] == [report["versions"], {"torch": "1.0"}]
    assert other["cpu"] == report["cpu"]


def test_results_have_all_that_was_finished_before_whatever_ends_the_study(place, monkeypatch):
    finished(place, [0.5] * 6, seed=1)
    monkeypatch.setattr(learning_cells, "TRAIN", [str(place / "missing")])
    with pytest.raises(FileNotFoundError):
        run_study(study(seeds=[0, 1], overrides=["training.steps=6"]), place / "out", place / "results.json")
    report = json.loads((place / "results.json").read_text())
    assert [run["seed"] for run in report["runs"]] == [1]


def test_tables_of_runs_read_whole_on_80_columns(place):
    console = Console(width=80, record=True)
    records = [read_record(finished(place, [0.9] * 6, variant=v)) for v in ("a", "rate=1e-3,estimator=grpo")]
    for some in (records[:1], records):
        console.print(run_table(some), cost_table(some), variant_table(some), speed_table(some))
        text = console.export_text()
        assert "…" not in text
        for whole in ("EM before [95 %]", "EM after [95 %]", "apart", "0.750 [0.598, 0.858]"):
            assert whole in text
        for whole in ("minutes", "s to", "step 1", "min to", "0.75", "failed", "excluded", "reward,", "passed"):
            assert whole in text


def test_tables_and_curves_are_made_of_runs_of_one_variant_and_of_several(place):
    records = [read_record(finished(place, [0.1, 0.9] * 3, seed=seed, variant=v)) for v in "ab" for seed in (0, 1)]
    console = Console(width=200, record=True)
    for some in (records[:2], records):
        console.print(run_table(some), cost_table(some), variant_table(some), speed_table(some))
        draw(some, place / "curves.png")
        assert (place / "curves.png").stat().st_size > 1000
    text = console.export_text()
    assert "0.750 [0.598, 0.858]" in text
    assert "yes" in text
    assert summarize(records[:2])["gain"]["mean"] == 0.5


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was_and_reads_what_is_finished(place, capsys):
    two = study(seeds=[0, 1], overrides=["training.learning_rate=1e-2"])
    results = place / "results.json"
    (place / "kill-5").touch()
    assert not run_study(two, place / "out", results)
    assert "status -9" in capsys.readouterr().out
    report = json.loads(results.read_text())
    assert report["runs_finished"] == "1 of 2"
    assert run_study(two, place / "out", results)
    report = json.loads(results.read_text())
    assert [run["seed"] for run in report["runs"]] == [0, 1]
    assert report["summary"]["plain"]["after"]["mean"] == 0.9
    assert report["summary"]["plain"]["failed"] == 2
    first, second = make_cells(two, place / "out")
    assert first.log.read_text().splitlines() == ["begun after 0", "resumed after 4"]
    assert second.log.read_text().splitlines() == ["begun after 0"]
    steps, seconds = read_times(first)
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    assert seconds >= steps[6]
    assert (place / "results.png").exists()


@pytest.mark.slow
def test_a_finished_run_is_not_started_again_and_one_of_anything_else_is_refused(place):
    seen = []
    assert run_cell(cell(place), lambda metrics: seen.append(metrics["step"]))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert not run_cell(cell(place), seen.append)
    for override in ("training.learning_rate=0.5", "training.threads=7"):
        with pytest.raises(RunError, match=override.partition("=")[0]):
            run_cell(cell(place, overrides=[override]), seen.append)
    (place / "model/model.safetensors").write_bytes(b"other weights")
    with pytest.raises(RunError, match="other weights"):
        run_cell(cell(place), seen.append)
    (place / "model/model.safetensors").write_bytes(b"weights")
    (place / "questions.jsonl").write_text('{"id": "1", "question": "what?", "golden_answers": ["it"]}\n')
    with pytest.raises(RunError, match=r"questions\.jsonl"):
        run_cell(cell(place), seen.append)
    assert len(seen) == 6


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_last_line_and_others_go_on(place, capsys):
    broken = study(variants={"bad": ["data.train.0.path=missing.jsonl"], "plain": []})
    assert not run_study(broken, place / "out", place / "results.json")
    said = capsys.readouterr().out
    assert "missing.jsonl" in said
    assert "1 of 2" in (place / "results.json").read_text()


@pytest.mark.slow
def test_a_start_notes_its_cpu_after_whole_lines_and_without_those_of_a_run_that_was_removed(place):
    made = cell(place)
    made.times.parent.mkdir(parents=True)
    made.times.write_text('{"event": "start", "time": 1.0, "model": "other weights"}\n{"event": "en')
    assert run_cell(made, lambda metrics: None)
    first, *_ = [json.loads(line) for line in made.times.read_text().splitlines()]
    assert (first["event"], first["model"]) == ("start", model_hash(made.config))
    assert first["cpu"]["cores"] >= 1
    made.folder.adapter.rmdir()
    with made.times.open("a") as file:
        file.write('{"event": "st')
    assert run_cell(made, lambda metrics: None)
    assert [json.loads(line)["event"] for line in made.times.read_text().splitlines()].count("start") == 2
