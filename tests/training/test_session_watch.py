"""What the trainer looks at between steps: evaluations, the best checkpoint, and a policy that collapses."""

import dataclasses
import queue

import pytest
import torch
from fakes import make_episode
from test_session import Engines, equal, final_weights, make_config, model, run, steps_recorded  # noqa: F401, a fixture

from agentrl.config import parse_config
from agentrl.evaluation.run import Evaluation, SetResult
from agentrl.runs import RunFolder, checkpoint_step, new_checkpoint
from agentrl.training.checkpoints import best_checkpoint, learning_rate, step_to_go_back_to
from agentrl.training.session import TrainingFailed
from agentrl.training.watch import RollBack
from agentrl.types import EnvironmentFailure, Question

HELD_OUT = [Question(f"e{i}", f"what {i}?", ("so",), "held out") for i in range(4)]


class Evaluated(Engines):
    """Engines that answer `right[version]` of the held-out questions rightly."""

    def __init__(self, right, **settings):
        super().__init__(**settings)
        self.right, self.evaluated = right, []

    def sample(self, requests, temperature, on_done, on_stall, rewarded=True):
        assert temperature == 0.0
        version = self.published[-1][0]
        self.evaluated.append((version, len(self.requests)))
        right = self.right[version]
        groups = []
        for number, (question, (name,)) in enumerate(requests):
            groups.append([make_episode(name, question, answer="so" if number < right else "no", reward=0.0)])
            on_done(number + 1)
        return groups


def evaluating(config, every, **watch):
    tree = config.model_dump(mode="json")
    tree["evaluation"]["every"] = every
    tree["training"]["watch"] |= watch
    return parse_config(tree, source="test")


def notices(events):
    return [event.notice for event in list(events.queue) if event.notice]


def steps_kept(config):
    return sorted(checkpoint_step(path) for path in RunFolder(config.folder).complete_checkpoints())


@pytest.mark.parametrize("training", [{}, {"updates_per_batch": 2, "minibatches": 2}])
def test_steps_are_evaluated_with_their_own_weights_before_the_next_and_the_best_is_kept(model, tmp_path, training):  # noqa: F811
    config = evaluating(make_config(model, tmp_path, steps=6, keep_checkpoints=1, **training), 1)
    pool, events = Evaluated({1: 1, 2: 4, 3: 2, 4: 4, 5: 0}), queue.Queue()
    run(config, pool, events=events, evaluation=HELD_OUT)
    # After the weights of the step were published, and before any episode of the next step: each takes two groups.
    assert pool.evaluated == [(version, 2 * version) for version in (1, 2, 3, 4, 5)]
    folder = RunFolder(config.folder)
    assert folder.evaluated_steps() == [1, 2, 3, 4, 5]
    assert steps_kept(config) == [2, 6]
    assert best_checkpoint(folder, "exact_match").name == "checkpoint-2"
    assert notices(events)[1:] == [
        "step 1: exact match 0.250, F1 0.250, the best so far",
        "step 2: exact match 1.000, F1 1.000, the best so far",
        "step 3: exact match 0.500, F1 0.500",
        "step 4: exact match 1.000, F1 1.000",
        "step 5: exact match 0.000, F1 0.000",
    ]


@pytest.mark.parametrize("staleness", [0, 2])
def test_an_evaluation_changes_nothing_of_the_training(model, tmp_path, staleness):  # noqa: F811
    def ahead(folder):
        tree = make_config(model, folder).model_dump(mode="json")
        tree["rollout"]["max_staleness"] = staleness
        # Otherwise which weights sampled a batch made ahead would depend on the time that things take.
        tree["training"]["importance"]["mode"] = "off"
        return parse_config(tree, source="test")

    plain, config = ahead(tmp_path / "plain"), evaluating(ahead(tmp_path / "evaluated"), 1)
    run(plain, Engines())
    run(config, Evaluated(dict.fromkeys(range(9), 1)), evaluation=HELD_OUT)
    assert RunFolder(config.folder).evaluated_steps() == [1, 2, 3]
    assert equal(final_weights(config), final_weights(plain))


def test_an_evaluation_that_was_cut_off_is_made_again_from_its_checkpoint_and_others_are_not(model, tmp_path):  # noqa: F811
    config = evaluating(make_config(model, tmp_path), 1)

    class Dies(Evaluated):
        def sample(self, requests, *arguments, **settings):
            if self.published[-1][0] == 2:
                raise EnvironmentFailure("workers died")
            return super().sample(requests, *arguments, **settings)

    rights = dict.fromkeys(range(9), 1)
    with pytest.raises(TrainingFailed, match="workers died; --resume continues after step 2"):
        run(config, Dies(rights), evaluation=HELD_OUT)
    second = Evaluated(rights)
    run(config, second, resume=True, evaluation=HELD_OUT)
    assert [version for version, _ in second.evaluated] == [2, 3]
    assert steps_recorded(config) == [1, 2, 3, 4]


def test_without_questions_nothing_is_evaluated(model, tmp_path):  # noqa: F811
    config = evaluating(make_config(model, tmp_path, steps=2), 1)
    pool = Evaluated({})
    run(config, pool)
    assert pool.evaluated == []


# Of rewards that never differ every group is without signal, and a random policy is not right nine times of ten.
COLLAPSED = {"window": 2, "max_no_signal": 0.5}


class Alike(Engines):
    def _episodes(self, question, names):
        return [
            dataclasses.replace(episode, answer="wrong", reward=0.0) for episode in super()._episodes(question, names)
        ]


def test_a_collapse_is_told_once_and_the_run_goes_on(model, tmp_path):  # noqa: F811
    config, events = evaluating(make_config(model, tmp_path, steps=6), None, **COLLAPSED), queue.Queue()
    run(config, Alike(), events=events)
    said = notices(events)
    assert said[0].startswith(
        "forecast: at the share of right answers in the first step, 0.000, about 100% of the groups of 2"
    )
    assert said[1:] == [
        "step 4: 100% of the groups had no learning signal over the last 2 steps, with 0% of the answers right"
    ]
    assert steps_recorded(config) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_to_stop_at_a_collapse_keeps_its_state_and_can_be_resumed(model, tmp_path):  # noqa: F811
    config = evaluating(make_config(model, tmp_path, steps=6), None, on_collapse="stop", **COLLAPSED)
    with pytest.raises(TrainingFailed, match=r"step 4: 100% of the groups had no .* ends the run; --resume .* step 4"):
        run(config, Alike())
    assert steps_recorded(config) == [1, 2, 3, 4]
    # What was known is no reason to stop again.
    run(config, Alike(), resume=True)
    assert steps_recorded(config) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_is_to_go_back_says_where_to_and_goes_on_from_there_at_half_the_rate(model, tmp_path, optimizer):  # noqa: F811
    settings = {"on_collapse": "roll_back", "max_roll_backs": 1, **COLLAPSED}
    training = {"steps": 6, "checkpoint_every": 1, "keep_checkpoints": 9, "schedule": "linear"}
    training["optimizer"] = {"name": optimizer}
    config = evaluating(make_config(model, tmp_path, **training), None, **settings)
    with pytest.raises(RollBack) as caught:
        run(config, Alike())
    assert (caught.value.step, caught.value.target) == (4, 2)
    folder = RunFolder(config.folder)
    folder.roll_back(caught.value.target, caught.value.step, caught.value.reason)
    assert steps_kept(config) == [1, 2]
    rates = [line["learning_rate"] for line in folder.read_metrics()]
    # Once more, and no second time.
    with pytest.raises(TrainingFailed, match="ends the run after 1 roll-backs; --resume continues after step 4"):
        run(config, Alike(), resume=True)
    rates += [line["learning_rate"] for line in folder.read_metrics()[2:]]
    whole = [1e-2 * (1 - (step - 1) / 6) for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([whole[0], whole[1], whole[2] / 2, whole[3] / 2])
    # The checkpoints hold the new rate, and reading it does not halve it again.
    run(config, Engines(), resume=True)
    assert [line["learning_rate"] for line in folder.read_metrics()[4:]] == pytest.approx([1e-2 / 6, 1e-2 / 12])
    state = torch.load(folder.latest_checkpoint() / "scheduler.pt")
    assert set(state["base_lrs"]) == {learning_rate(1e-2, folder)} == {5e-3}
    groups = torch.load(folder.checkpoints / "checkpoint-5" / "optimizer.pt")["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-2 / 12] * len(groups))


def scored(folder, step, *ems):
    results = (SetResult(f"set {i}", 4, 0, em, 0.0, 1.0, em, 1.0, {}) for i, em in enumerate(ems))
    folder.write_evaluation(step, Evaluation(tuple(results), ()).to_dict())


@pytest.fixture
def folder(tmp_path):
    tree = {"name": "run", "run_dir": str(tmp_path), "model": {"path": "m"}, "training": {"steps": 9}}
    made = RunFolder.create(parse_config(tree, source="test"))
    for step in (2, 4, 6, 8):
        with new_checkpoint(made.checkpoints, step, keep=9) as aside:
            (aside / "state").mkdir()
            (aside / "state" / "weights").write_text("w")
    return made


def test_the_best_checkpoint_is_that_of_the_best_mean_over_sets_and_of_equal_ones_the_oldest(folder):
    assert best_checkpoint(folder, "exact_match") is None
    scored(folder, 0, 1.0, 1.0)
    scored(folder, 4, 0.9, 0.1)
    scored(folder, 6, 0.5, 0.7)
    scored(folder, 8, 0.6, 0.6)
    assert best_checkpoint(folder, "exact_match").name == "checkpoint-6"
    assert best_checkpoint(folder, "exact_match", until=5).name == "checkpoint-4"


def test_a_run_goes_back_to_the_best_checkpoint_else_the_newest_that_are_sound_and_old_enough(folder):
    assert step_to_go_back_to(folder, "exact_match", 7) == 6
    scored(folder, 4, 0.5)
    scored(folder, 8, 0.9)
    assert step_to_go_back_to(folder, "exact_match", 7) == 4
    (folder.checkpoints / "checkpoint-4" / "weights").write_text("x")
    assert step_to_go_back_to(folder, "exact_match", 7) == 6
    (folder.checkpoints / "checkpoint-6" / "weights").unlink()
    assert step_to_go_back_to(folder, "exact_match", 7) == 2
    assert step_to_go_back_to(folder, "exact_match", 1) == 0
