"""A run goes on with the settings, questions and passages it was trained with; where and how long it runs may change."""

import pytest
import yaml

from agentrl.config import parse_config
from agentrl.data.inputs import describe_inputs
from agentrl.runs import RunError, RunFolder
from retrievers.index.manifest import write_manifest

RUN = {
    "name": "run",
    "model": {"path": "m"},
    "retriever": {"index": "index"},
    "training": {"steps": 4, "schedule": "constant"},
    "advantages": {"options": {"alpha": 0.5}},
}


def config(folder, **changes):
    """Make a config; `changes` are by dotted key, with __ for the dots."""
    tree = yaml.safe_load(yaml.safe_dump(RUN | {"run_dir": str(folder)}))
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return parse_config(tree, source="test")


def resume(folder, before, now):
    RunFolder.create(config(folder, **before))
    return RunFolder.reopen(config(folder, **now))[0]


@pytest.mark.parametrize(
    "change",
    [
        {"training__steps": 8},
        {"training__checkpoint_every": 1},
        {"engine__threads": 1},
        {"engine__kind": "transformers"},
        {"rollout__workers": 3},
        {"rollout__max_failed_share": 0.2},
        {"evaluation__after": False},
        {"evaluation__every": 2},
        {"training__watch__on_collapse": "stop"},
        {"ray__address": "auto"},
        {"data__root": "elsewhere"},
        {"retriever__timeout_seconds": 5.0},
        {"retriever__cache": "cache"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_touch_the_training_may_change(tmp_path, change):
    folder = resume(tmp_path, {}, change)
    key = next(iter(change)).replace("__", ".")
    assert [line.partition(":")[0] for line in folder.changes] == [key]
    # From now on the folder describes the run as it goes on.
    assert folder.read_config() == config(tmp_path, **change)
    assert RunFolder.reopen(config(tmp_path, **change))[0].changes == []


def test_loggers_may_change(tmp_path):
    assert resume(tmp_path, {}, {"logging": ["jsonl"]}).changes == ["logging.0: 'tensorboard' -> 'jsonl'"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed: 0 -> 1"),
        ({"training__learning_rate": 1e-3}, r"training\.learning_rate: 1e-05 -> 0\.001"),
        ({"advantages__options__alpha": 1}, r"advantages\.options\.alpha: 0\.5 -> 1"),
        ({"data__train": [{"path": "q.jsonl"}]}, r"data\.train\.0\.path: None -> 'q\.jsonl'"),
        ({"agent__tools": ["search", "open"]}, r"agent\.tools\.1: None -> 'open'"),
        ({"retriever__index": "other"}, r"retriever\.index: 'index' -> 'other'"),
        ({"training__steps": 3}, r"training\.steps can grow .* 3 is less than 4"),
    ],
)
def test_what_was_trained_with_may_not_and_every_difference_is_named(tmp_path, change, message):
    with pytest.raises(RunError, match=rf"run/config\.yaml: (?s:.*){message}"):
        resume(tmp_path, {}, change)


def test_two_differences_are_both_named(tmp_path):
    with pytest.raises(RunError, match=r"(?s)seed: 0 -> 1.*model\.path: '.*m' -> '.*n'"):
        resume(tmp_path, {}, {"seed": 1, "model__path": "n"})


SCHEDULED = {"start": 1, "end": 0, "shape": "step", "at": 0.5}


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"training__schedule": "linear"}, r"training\.schedule linear"),
        ({"training__schedule": "cosine"}, r"training\.schedule cosine"),
        ({"advantages__options__alpha": SCHEDULED}, r"advantages\.options\.alpha"),
    ],
)
def test_a_run_with_something_scheduled_over_its_whole_takes_no_more_steps(tmp_path, setting, name):
    with pytest.raises(RunError, match=f"cannot grow from 4 to 8: {name} is scheduled over the whole of the run"):
        resume(tmp_path, setting, setting | {"training__steps": 8})


@pytest.mark.parametrize(
    "setting",
    [{"training__schedule": "constant_with_warmup"}, {"advantages__options__alpha": {"rule": "progress"}}],
    ids=str,
)
def test_what_does_not_depend_on_the_length_of_the_run_lets_it_grow(tmp_path, setting):
    assert resume(tmp_path, setting, setting | {"training__steps": 8}).changes == ["training.steps: 4 -> 8"]


def test_a_run_of_a_version_that_knew_fewer_settings_goes_on(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    tree = config(tmp_path).model_dump(mode="json")
    del tree["training"]["llds"], tree["agent"]["mistakes_are_turns"], tree["ray"]
    (folder.path / "config.yaml").write_text(yaml.safe_dump(tree))
    for file in ("inputs.json", "start.json"):
        (folder.path / file).unlink()
    assert RunFolder.reopen(config(tmp_path))[0].changes == []


def test_a_refused_resume_drops_nothing(tmp_path):
    folder = RunFolder.create(config(tmp_path))
    folder.append_metrics(1, {"loss": 1.0})
    with pytest.raises(RunError):
        RunFolder.reopen(config(tmp_path, seed=1))
    assert [line["step"] for line in folder.read_metrics()] == [1]


@pytest.fixture
def world(tmp_path):
    """A folder with a question file and an index folder; returns the config that names them, and what it describes."""
    (tmp_path / "questions.jsonl").write_text('{"id": "0"}\n{"id": "1"}\n')
    write_index(tmp_path, "aa")
    made = config(tmp_path, data__root=str(tmp_path), data__train=[{"path": "questions.jsonl"}])
    return made, lambda: describe_inputs(made)


def write_index(folder, corpus, analyser="english"):
    (folder / "index").mkdir(exist_ok=True)
    write_manifest(
        folder / "index",
        backend="lucene",
        corpus="corpus.jsonl",
        corpus_sha256=corpus,
        documents=2,
        parameters={"analyser": analyser},
        versions={},
        build_seconds=1.0,
    )


def test_questions_and_index_that_stay_let_a_run_go_on(world):
    made, described = world
    RunFolder.create(made, described())
    folder, _ = RunFolder.reopen(made, described())
    assert {key: value["path"].rpartition("/")[2] for key, value in folder.read_inputs().items()} == {
        "data.train.0": "questions.jsonl",
        "retriever.index": "index",
    }


def test_other_questions_are_refused_by_the_name_of_their_file(world, tmp_path):
    made, described = world
    RunFolder.create(made, described())
    (tmp_path / "questions.jsonl").write_text('{"id": "0"}\n')
    with pytest.raises(
        RunError, match=r"/questions\.jsonl \(data\.train\.0\) is not what the run began with: its sha256"
    ):
        RunFolder.reopen(made, described())


@pytest.mark.parametrize(("corpus", "analyser", "what"), [("bb", "english", "corpus"), ("aa", "german", "parameters")])
def test_an_index_of_another_corpus_or_of_other_words_is_refused(world, tmp_path, corpus, analyser, what):
    made, described = world
    RunFolder.create(made, described())
    write_index(tmp_path, corpus, analyser)
    with pytest.raises(RunError, match=rf"/index \(retriever\.index\) is not what the run began with: its {what} was"):
        RunFolder.reopen(made, described())


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"path": "/b", "sha256": "1"}, None),
        (
            {"path": "/b", "sha256": "2"},
            r"/b \(model\.adapter\) is not what the run began with: its sha256 was 1 and is 2",
        ),
        (None, r"model\.adapter: the run began with /a, and none is given now"),
    ],
)
def test_an_adapter_may_lie_elsewhere_and_has_the_same_weights(tmp_path, now, message):
    RunFolder.create(config(tmp_path, model__adapter="/a"), {"model.adapter": {"path": "/a", "sha256": "1"}})
    moved = config(tmp_path, model__adapter=now and now["path"]), {"model.adapter": now} if now else {}
    if message is None:
        assert RunFolder.reopen(*moved)[0].changes == ["model.adapter: '/a' -> '/b'"]
    else:
        with pytest.raises(RunError, match=message):
            RunFolder.reopen(*moved)


def test_the_same_questions_may_lie_in_another_folder(world, tmp_path):
    made, described = world
    RunFolder.create(made, described())
    (tmp_path / "moved").mkdir()
    for name in ("questions.jsonl", "index"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = config(tmp_path, data__root=str(tmp_path / "moved"), data__train=[{"path": "questions.jsonl"}])
    folder, _ = RunFolder.reopen(moved, describe_inputs(moved))
    assert folder.read_inputs()["data.train.0"]["path"] == str(tmp_path / "moved" / "questions.jsonl")
