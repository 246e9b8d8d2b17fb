import pytest

from agentrl.advantages import STRATIFIERS, AdvantageError, get_stratifier, label
from agentrl.types import Action, ActionKind, End, Question, SearchCall, Trajectory, Turn


def turn(kind, executed=False):
    search = SearchCall("capital of Peru", ("d1",), (3.2,), 0.01) if executed else None
    return Turn((1, 2), (-0.1, -0.2), "text", Action(kind, "x"), adapter_version=0, search=search)


def episode(*turns):
    return Trajectory("e1", Question("q1", "?", ("Lima",)), (5, 6), turns, End.ANSWERED)


def test_searches_counts_only_those_that_were_executed():
    executed = turn(ActionKind.SEARCH, executed=True)
    written = turn(ActionKind.SEARCH)
    answer = turn(ActionKind.ANSWER)
    assert get_stratifier()(episode(answer)) == 0
    assert get_stratifier("searches")(episode(executed, executed, written, answer)) == 2


def test_a_stratifier_by_import_path():
    assert get_stratifier("agentrl.advantages.strata:searches") is STRATIFIERS["searches"]


@pytest.mark.parametrize("name", ["serches", "no_such_module:f"])
def test_unknown_stratifier(name):
    with pytest.raises(AdvantageError, match=f"stratifier '{name}'"):
        get_stratifier(name)


@pytest.mark.parametrize(("key", "text"), [(2, "2"), ("late", "late"), ((1, "late"), "1, late")])
def test_label(key, text):
    assert label(key) == text
