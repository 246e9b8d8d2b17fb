"""Each logger of a run has its name, its settings, its metrics and its evaluations, and none of them can end it."""

import importlib
import sys

import pytest
from fake_loggers import write_packages
from fakes import make_episode
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_session import equal, final_weights, model, run  # noqa: F401, a fixture
from test_session import make_config as make_training
from test_session_watch import HELD_OUT, Evaluated

from agentrl.config import ConfigError, load_config, parse_config
from agentrl.evaluation.run import evaluation_of
from agentrl.runs import RunFolder
from agentrl.training.loggers import Loggers, check_loggers, episode_rows
from agentrl.types import Question

METRICS = {"loss": 0.5, "strata/0/share": 0.25}
PACKAGES = ("wandb", "mlflow", "trackio")


def forget_packages():
    for module in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[module]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins for the packages of loggers, imported in place of what is installed."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write_packages(tmp_path / "packages")
    forget_packages()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield importlib.import_module
    forget_packages()


def make_config(tmp_path, *loggers, steps=9):
    tree = {"name": "run", "run_dir": str(tmp_path), "model": {"path": "m"}, "training": {"steps": steps}}
    return parse_config(tree | {"logging": list(loggers)}, source="test")


def make_evaluation(count=4, right=3):
    questions = [Question(f"e{i}", f"what {i}?", ("so", "thus"), "held out") for i in range(count)]
    episodes = [
        make_episode(f"eval/{question.id}", question, answer="so" if number < right else None, searches=1)
        for number, question in enumerate(questions)
    ]
    return evaluation_of(questions, episodes)


SCORES = {
    "eval/exact_match": 0.75,
    "eval/f1": 0.75,
    "eval/held out/exact_match": 0.75,
    "eval/held out/f1": 0.75,
    "eval/held out/searches": 1.0,
}


def use(config, folder, told=None, first_step=1):
    """Show a step and an evaluation as a start of the run does."""
    loggers = Loggers(config, folder, (told if told is not None else []).append, first_step=first_step)
    loggers.log(first_step, METRICS)
    loggers.log_evaluation(first_step, make_evaluation())
    loggers.close()


def resumed(tmp_path, *loggers):
    """Use loggers in a new run, and again when it is resumed with more steps; return the folder and what was told."""
    told, config = [], make_config(tmp_path, *loggers)
    folder = RunFolder.create(config)
    use(config, folder, told)
    use(make_config(tmp_path, *loggers, steps=12), folder, told, first_step=2)
    return folder, told


def test_wandb_goes_on_with_the_run_of_the_folder_and_has_its_settings_metrics_and_episodes(packages, tmp_path):
    folder, told = resumed(tmp_path, "wandb")
    calls = packages("wandb").calls
    inits = [call[1] for call in calls if call[0] == "init"]
    assert [(init["project"], init["name"], init["resume"], init["mode"]) for init in inits] == [
        ("agentrl", "run", "allow", "offline")
    ] * 2
    assert {init["id"] for init in inits} == {folder.read_logger_ids()["wandb"]}
    assert [call[1]["training.steps"] for call in calls if call[0] == "config"] == [9, 12]
    logged = [call[1] for call in calls if call[0] == "log"]
    assert logged[0] == {"train/loss": 0.5, "train/strata/0/share": 0.25, "train/global_step": 1}
    assert logged[1] == SCORES | {"train/global_step": 1}
    assert logged[2]["eval/episodes"][3] == {
        "question": "what 3?",
        "gold": "so | thus",
        "answer": "",
        "exact_match": 0.0,
        "searches": 1,
        "text": "",
    }
    assert [line["train/global_step"] for line in logged] == [1, 1, 1, 2, 2, 2]
    assert [call[0] for call in calls].count("finish") == 2
    assert told[0].startswith(
        "wandb runs offline: there is no API key (WANDB_API_KEY, or wandb login); upload later with"
    )


def test_wandb_runs_offline_where_its_host_cannot_be_reached_and_as_the_environment_says_otherwise(
    packages, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    _, told = resumed(tmp_path, "wandb")
    assert told[0].startswith("wandb runs offline: http://127.0.0.1:9 cannot be reached (")
    monkeypatch.setenv("WANDB_MODE", "shared")
    _, told = resumed(tmp_path / "again", "wandb")
    assert told == []
    assert [call[1]["mode"] for call in packages("wandb").calls if call[0] == "init"][-1] is None


def test_mlflow_goes_on_with_the_run_of_the_folder_and_writes_into_it_where_no_other_place_is_named(packages, tmp_path):
    folder, told = resumed(tmp_path, "mlflow")
    mlflow = packages("mlflow")
    assert mlflow.uri == (folder.path / "mlflow").as_uri()
    assert [call for call in mlflow.calls if call[0] in ("experiment", "start")] == [
        ("experiment", "agentrl"),
        ("start", None, "run"),
        ("experiment", "agentrl"),
        ("start", "made", "run"),
    ]
    # A parameter keeps its first value.
    assert mlflow.runs["made"].data.params["training.steps"] == 9
    assert [call[1:] for call in mlflow.calls if call[0] == "log"] == [
        (1, METRICS),
        (1, SCORES),
        (2, METRICS),
        (2, SCORES),
    ]
    tables = [call[1:] for call in mlflow.calls if call[0] == "table"]
    assert [name for name, _ in tables] == ["evaluations/step-00001.json", "evaluations/step-00002.json"]
    assert tables[0][1]["answer"] == ["so", "so", "so", ""]
    assert [call[0] for call in mlflow.calls][-2:] == ["flush", "end"]
    assert told == []


def test_trackio_goes_on_with_the_run_of_its_name_on_this_machine(packages, tmp_path):
    _, told = resumed(tmp_path, "trackio")
    calls = packages("trackio").calls
    (first, second) = (call[1] for call in calls if call[0] == "init")
    assert first == second
    assert (first["project"], first["name"], first["resume"], first["space_id"]) == ("agentrl", "run", "allow", None)
    logged = [call[1] for call in calls if call[0] == "log"]
    assert logged[0] == {"train/loss": 0.5, "train/strata/0/share": 0.25, "train/global_step": 1}
    assert logged[1] == SCORES | {"train/global_step": 1}
    assert [row["question"] for row in logged[2]["eval/episodes"]] == ["what 0?", "what 1?", "what 2?", "what 3?"]
    assert told == []


def test_tensorboard_shows_evaluations_too(tmp_path):
    folder, _ = resumed(tmp_path, "tensorboard")
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert {name: [event.value for event in events.Scalars(name)] for name in SCORES} == {
        name: [value, value] for name, value in SCORES.items()
    }


def test_a_run_shows_the_metrics_of_metrics_jsonl_and_its_evaluations_and_trains_as_without_loggers(
    packages,
    model,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    # TRL imports it once, if it is there then, and looks again later.
    for module in ("base_trainer", "grpo_trainer"):
        monkeypatch.setattr(f"trl.trainer.{module}.wandb", packages("wandb"), raising=False)
    plain = make_training(model, tmp_path / "plain", steps=3)
    tree = plain.model_dump(mode="json") | {"run_dir": str(tmp_path), "logging": list(PACKAGES)}
    tree["evaluation"]["every"] = 2
    config = parse_config(tree, source="test")
    run(plain, Evaluated({}))
    run(config, Evaluated({2: 3}), evaluation=HELD_OUT)
    lines = RunFolder(config.folder).read_metrics()
    mlflow = [call[1:] for call in packages("mlflow").calls if call[0] == "log"]
    evaluated = (2, SCORES | {"eval/held out/searches": 0.0})
    # A name that is a folder of others there cannot be a file.
    renamed = {"advantages/strata": "advantages/strata/all"}
    expected = [
        (line["step"], {renamed.get(name, name): value for name, value in line.items() if name != "step"})
        for line in lines
    ]
    assert mlflow == [*expected[:2], evaluated, expected[2]]
    for package in ("wandb", "trackio"):
        logged = [call[1] for call in packages(package).calls if call[0] == "log" and "eval/episodes" not in call[1]]
        trained = [values for values in logged if "train/loss" in values]
        assert trained == [
            {f"train/{name}": value for name, value in line.items() if name != "step"} | {"train/global_step": step}
            for step, line in enumerate(lines, 1)
        ]
        assert [values["train/global_step"] for values in logged] == [1, 2, 2, 3]
    assert equal(final_weights(config), final_weights(plain))


def test_the_evaluation_before_training_is_shown_at_step_0(model, tmp_path):  # noqa: F811
    config, evaluation = make_training(model, tmp_path, steps=1), make_evaluation()
    folder = RunFolder.create(config)
    folder.write_evaluated(0, evaluation.trajectories)
    folder.write_evaluation(0, evaluation.to_dict())
    folder.close()
    run(config, Evaluated({}), resume=True)
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("eval/exact_match")] == [(0, 0.75)]


def test_a_logger_that_fails_is_told_once_and_the_others_go_on(packages, tmp_path):
    config, told = make_config(tmp_path, "wandb", "trackio", "jsonl"), []
    loggers = Loggers(config, RunFolder.create(config), told.append)
    packages("wandb").failing = True
    for step in (1, 2):
        loggers.log(step, METRICS)
    loggers.close()
    assert told[1:] == ["wandb failed and is left out from here on: ConnectionError: the host is gone"]
    assert [call[1]["train/global_step"] for call in packages("trackio").calls if call[0] == "log"] == [1, 2]


def test_a_logger_that_cannot_be_opened_ends_no_run(packages, tmp_path):
    packages("mlflow").set_experiment = None
    config, told = make_config(tmp_path, "mlflow"), []
    use(config, RunFolder.create(config), told)
    assert told == ["mlflow failed and is left out from here on: TypeError: 'NoneType' object is not callable"]


@pytest.mark.parametrize("count", [1, 50, 51, 730])
def test_a_table_has_at_most_fifty_episodes_from_all_over_the_evaluation(count):
    rows = episode_rows(make_evaluation(count).trajectories)
    assert 25 <= len(rows) <= 50 or len(rows) == count
    assert rows[0]["question"] == "what 0?"
    assert int(rows[-1]["question"][5:-1]) >= count * 0.9 - 1


def test_a_logger_that_is_not_installed_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else name)
    check_loggers(make_config(tmp_path, "wandb", "jsonl"))
    with pytest.raises(ConfigError, match="logging: trackio is not installed: pip install trackio; or leave it out"):
        check_loggers(make_config(tmp_path, "wandb", "trackio"))


def test_loggers_are_known_by_name_and_named_once(tmp_path):
    with pytest.raises(ConfigError, match=r"logging\.0"):
        make_config(tmp_path, "tensorbord")
    with pytest.raises(ConfigError, match="name each logger once"):
        load_config("pocket", ["logging=[wandb, wandb]"])


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_the_real_package_takes_what_the_stand_in_takes(package, tmp_path, monkeypatch):
    # Some read the environment when they are imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    pytest.importorskip(package)
    folder, told = resumed(tmp_path, package)
    assert told == []
    kept = tmp_path / "trackio" if package == "trackio" else folder.path / package
    assert any(kept.iterdir())
