"""How training ends: for want of progress or after its last step, with the last weights or the best."""

import queue

import pytest
from safetensors.torch import load
from test_session import Engines, equal, final_weights, make_config, model, run, steps_recorded  # noqa: F401, a fixture
from test_session_watch import HELD_OUT, Evaluated, notices, scored

from agentrl.config import EvaluationConfig, parse_config
from agentrl.evaluation.run import Evaluation, SetResult
from agentrl.runs import RunFolder, new_checkpoint
from agentrl.training import ending
from agentrl.training.checkpoints import best_checkpoint
from agentrl.training.ending import stalled
from agentrl.training.session import TrainingFailed


def evaluating(config, **settings):
    tree = config.model_dump(mode="json")
    tree["evaluation"] |= {"every": 1} | settings
    return parse_config(tree, source="test")


def checkpoint_weights(config, step):
    return load((RunFolder(config.folder).checkpoint(step) / "adapter_model.safetensors").read_bytes())


def the_end(config):
    found = RunFolder(config.folder).read_ending()
    return None if found is None else (found["after_step"], found["kept_step"], found["reason"])


# Of the held-out questions, those that are right after each step: the best is after the second.
RIGHT = {1: 1, 2: 3, 3: 2, 4: 3, 5: 4, 6: 0}


def test_a_run_that_gets_no_better_ends_before_its_last_step_and_leaves_its_best_weights(model, tmp_path):  # noqa: F811
    config, pool = evaluating(make_config(model, tmp_path, steps=6, keep_checkpoints=1), patience=2), Evaluated(RIGHT)
    events = queue.Queue()
    run(config, pool, events=events, evaluation=HELD_OUT)
    assert steps_recorded(config) == [1, 2, 3, 4]
    assert the_end(config) == (4, 2, "2 evaluations in a row were not better than the one after step 2")
    assert equal(final_weights(config), checkpoint_weights(config, 2))
    assert notices(events)[-2:] == [
        "step 4: 2 evaluations in a row were not better than the one after step 2; training ends here, as "
        "evaluation.patience says",
        "the run leaves the weights of step 2, its best",
    ]


def test_a_run_that_ends_early_may_leave_its_last_weights(model, tmp_path):  # noqa: F811
    config = evaluating(make_config(model, tmp_path, steps=6, keep_checkpoints=1), patience=2, keep="last")
    run(config, Evaluated(RIGHT), evaluation=HELD_OUT)
    assert the_end(config)[:2] == (4, 4)
    assert equal(final_weights(config), checkpoint_weights(config, 4))


def test_a_run_that_leaves_its_best_weights_evaluates_its_last_step_too(model, tmp_path):  # noqa: F811
    config, pool = evaluating(make_config(model, tmp_path, steps=4), every=2, keep="best"), Evaluated({2: 1, 4: 3})
    run(config, pool, evaluation=HELD_OUT)
    assert [version for version, _ in pool.evaluated] == [2, 4]
    assert the_end(config) == (4, 4, "its last step was taken")
    assert equal(final_weights(config), checkpoint_weights(config, 4))


def test_batches_made_ahead_end_with_the_training(model, tmp_path):  # noqa: F811
    tree = evaluating(make_config(model, tmp_path, steps=9), patience=2).model_dump(mode="json")
    tree["rollout"]["max_staleness"] = 2
    pool = Evaluated(RIGHT)
    run(parse_config(tree, source="test"), pool, evaluation=HELD_OUT)
    # Step 5 was made while step 4 was trained on, and step 6 no more than that.
    assert 2 * 4 <= len(pool.asked) <= 2 * 6
    assert pool.evaluated[-1][1] == len(pool.asked)


def test_a_run_that_ended_early_and_could_not_write_its_weights_takes_no_step_when_it_is_resumed(
    model,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    config, second = evaluating(make_config(model, tmp_path, steps=6), patience=2), Evaluated(RIGHT)
    with monkeypatch.context() as patch:
        patch.setattr(ending, "save_policy", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(TrainingFailed, match="full; --resume continues after step 4"):
            run(config, Evaluated(RIGHT), evaluation=HELD_OUT)
    assert not RunFolder(config.folder).adapter.exists()
    run(config, second, resume=True, evaluation=HELD_OUT)
    assert (second.asked, second.evaluated) == ([], [])
    assert equal(final_weights(config), checkpoint_weights(config, 2))


def test_a_run_that_ended_early_goes_on_with_more_patience(model, tmp_path):  # noqa: F811
    config = make_config(model, tmp_path, steps=6)
    run(evaluating(config, patience=2), Evaluated(RIGHT), evaluation=HELD_OUT)
    run(evaluating(config, patience=3), Evaluated(RIGHT), resume=True, evaluation=HELD_OUT)
    assert steps_recorded(config) == [1, 2, 3, 4, 5, 6]
    assert the_end(config)[:2] == (6, 5)
    assert equal(final_weights(config), checkpoint_weights(config, 5))


@pytest.fixture
def folder(tmp_path):
    tree = {"name": "run", "run_dir": str(tmp_path), "model": {"path": "m"}, "training": {"steps": 9}}
    return RunFolder.create(parse_config(tree, source="test"))


def test_an_equal_score_is_no_better_one_and_scores_before_training_and_of_later_steps_do_not_count(folder):
    settings = EvaluationConfig(every=2, patience=2)
    for step, em in ((0, 1.0), (2, 0.5), (4, 0.5), (6, 0.5), (8, 0.9)):
        scored(folder, step, em)
    assert stalled(folder, settings, 4) is None
    assert stalled(folder, settings, 6) == "2 evaluations in a row were not better than the one after step 2"
    assert stalled(folder, settings, 8) is None
    assert stalled(folder, EvaluationConfig(every=2), 6) is None


def test_the_named_score_decides_which_is_the_best(folder):
    for step, em, f1 in ((1, 0.5, 0.6), (2, 0.4, 0.9), (3, 0.45, 0.9)):
        result = SetResult("a set", 4, 0, em, 0.0, 1.0, f1, 1.0, {})
        folder.write_evaluation(step, Evaluation((result,), ()).to_dict())
        with new_checkpoint(folder.checkpoints, step, keep=9) as aside:
            (aside / "state").mkdir()
    assert best_checkpoint(folder, "exact_match").name == "checkpoint-1"
    assert best_checkpoint(folder, "f1").name == "checkpoint-3"
    settings = EvaluationConfig(every=1, patience=2)
    assert stalled(folder, settings, 3) == "2 evaluations in a row were not better than the one after step 1"
    assert stalled(folder, settings.model_copy(update={"best": "f1"}), 3) is None
