"""Import paths and misspelt names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.registry import look_up
from retrievers.names import did_you_mean, import_path


def test_an_import_path_leads_to_the_attribute():
    assert import_path("collections:Counter.fromkeys").__qualname__ == "Counter.fromkeys"


@pytest.mark.parametrize("path", ["json", "json:", ":loads", "json:loads:x", "js on:loads", "./json:loads", ""])
def test_what_is_written_otherwise_is_not_an_import_path(path):
    with pytest.raises(ImportError, match="not an import path; write it as"):
        import_path(path)


@pytest.mark.parametrize(
    ("name", "body", "cause"),
    [
        ("plugin_unparsable", "def make(:", "SyntaxError: invalid syntax"),
        ("plugin_that_raises", "1 / 0", r"ZeroDivisionError: division by zero \(.*plugin_that_raises\.py:1\)"),
        ("plugin_that_lacks_a_library", "import nowhere.to.be", "No module named 'nowhere'"),
        ("plugin_without_it", "other = 1", "has no attribute 'make'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_the_cause(tmp_path, monkeypatch, name, body, cause):
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=f"'{name}:make' cannot be imported: .*{cause}"):
        import_path(f"{name}:make")


@given(st.text())
def test_no_text_is_a_path_that_raises_anything_else(text):
    with pytest.raises(ImportError):
        import_path(f"no_such_package.{text}")


def test_a_misspelt_name_is_answered_by_the_nearest_ones():
    known = ["searches", "placement", "placements"]
    assert did_you_mean("serches", known) == "; did you mean searches?"
    assert did_you_mean("placemen", known, most=2) == "; did you mean placement or placements?"
    assert did_you_mean("zzz", known) == ""


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match="reward 'math:pi' is a float, not a function"):
        look_up("math:pi", {}, "reward", ValueError)


def test_where_nothing_is_registered_an_import_path_is_asked_for():
    with pytest.raises(ValueError, match="reward 'mine' is not an import path"):
        look_up("mine", {}, "reward", ValueError)
