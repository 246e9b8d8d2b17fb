"""The driver's benchmark times the same work for each method, and refuses to compare what is not the same."""

import argparse
import dataclasses

import pytest
from driver import METHODS, check_equal, measure
from fakes import make_episode

from agentrl.runs import write_trajectories
from agentrl.training.sampling import ScoredBatch


@pytest.mark.slow
def test_a_small_run_gives_a_rate_for_each_method_and_their_ratio():
    result = measure(argparse.Namespace(questions=3, group=4, tokens=60, runs=2, ray=False, json=None))
    assert set(result["trajectories_per_second"]) == set(METHODS)
    assert result["ratio"]["processor"]["median"] > 0


@pytest.mark.parametrize("change", [{"reward": 0.0}, {"id": "b"}])
def test_methods_that_leave_other_episodes_are_not_compared(tmp_path, change):
    episode = make_episode("a", reward=1.0)
    write_trajectories(tmp_path / "one", [episode])
    write_trajectories(tmp_path / "other", [dataclasses.replace(episode, **change)])
    batch = ScoredBatch([], [], {})
    check_equal([tmp_path / "one", tmp_path / "one"], [batch, batch])
    with pytest.raises(AssertionError, match="different episodes"):
        check_equal([tmp_path / "one", tmp_path / "other"], [batch, batch])
    with pytest.raises(AssertionError, match="metrics differ"):
        check_equal([tmp_path / "one", tmp_path / "one"], [batch, ScoredBatch([], [], {"episodes": 1.0})])
