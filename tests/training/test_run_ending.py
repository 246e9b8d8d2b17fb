"""What the driver of a run does where evaluations ended the training."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import config, evaluates, trainer  # noqa: F401, fixtures

from agentrl.config import parse_config
from agentrl.evaluation.run import Evaluation, SetResult
from agentrl.runs import RunFolder
from agentrl.training.run import train
from agentrl.types import AgentRLError


@pytest.fixture
def deciding(evaluates, monkeypatch):  # noqa: F811
    """A config whose run evaluates two of its six questions during training, and what was published and evaluated since."""
    done = SimpleNamespace(published=[], evaluated=[])
    tree = evaluates.config.model_dump(mode="json")
    tree["evaluation"] |= {"before": False, "after": True, "every": 1, "limit": 2, "patience": 1}
    done.config = parse_config(tree, source="test")

    class Pool(str):
        def publish(self, version, files):
            done.published.append(version)

    @contextmanager
    def cluster(settings, on_phase, *, beside, logs, store_bytes):
        if beside is not None:
            beside.start()
        yield SimpleNamespace(pool=Pool("pool"), indexes=())

    def evaluate(pool, questions, **settings):
        done.evaluated.append(len(questions))
        return Evaluation((), ())

    monkeypatch.setattr("agentrl.training.run.cluster", cluster)
    monkeypatch.setattr("agentrl.training.run.saved_files", lambda settings, folder: {})
    monkeypatch.setattr("agentrl.training.evaluating.evaluate", evaluate)
    return done


def test_a_run_whose_evaluations_end_it_starts_no_trainer_and_asks_all_questions_of_what_it_left(deciding, trainer):  # noqa: F811
    folder = RunFolder(deciding.config.folder)

    def before(step):
        if step == 3:
            for evaluated in (1, 2):
                result = SetResult("questions", 2, 0, 0.5, 0.0, 1.0, 0.5, 1.0, {})
                folder.write_evaluation(evaluated, Evaluation((result,), ()).to_dict())
            folder.write_ending(2, 1, "no better")
            raise AgentRLError("killed before the adapter was evaluated")

    trainer.before = before
    with pytest.raises(AgentRLError, match="killed before"):
        train(deciding.config, resume=False, on_progress=lambda progress: None)
    assert trainer.asked == ["0", "1"]
    folder.adapter.mkdir()
    trainer.loaded.clear()
    *_, after = train(deciding.config, resume=True, on_progress=lambda progress: None)
    assert not trainer.loaded.is_set()
    assert after == Evaluation((), ())
    # As a version that no engine has: the weights of step 1 are not those that were published last.
    assert (deciding.evaluated, deciding.published) == ([6], [4])
    assert folder.read_evaluation("after") == {"sets": []}
    assert folder.read_evaluation(1)["sets"][0]["n"] == 2
    assert folder.read_ending()["kept_step"] == 1
    shown = EventAccumulator(str(folder.tensorboard))
    shown.Reload()
    assert [event.step for event in shown.Scalars("eval/exact_match")] == [1]


def test_a_run_that_ended_goes_on_with_more_patience_and_forgets_that_it_had_ended(deciding, trainer):  # noqa: F811
    trainer.before = lambda step: step < 3 or 1 / 0
    with pytest.raises(AgentRLError):
        train(deciding.config, resume=False, on_progress=lambda progress: None)
    folder = RunFolder(deciding.config.folder)
    folder.write_ending(2, 1, "no better")
    folder.write_evaluation("after", {"sets": []})
    folder.adapter.mkdir()
    with pytest.raises(AgentRLError):
        train(deciding.config, resume=True, on_progress=lambda progress: None)
    assert (folder.read_ending(), folder.read_evaluation("after")) == (None, None)
