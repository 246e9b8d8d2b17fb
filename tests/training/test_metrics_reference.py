"""Every metric that a run writes is described, and the page that describes them is the one that code makes."""

from pathlib import Path

import pytest
from test_session import Engines, make_config, model, run  # noqa: F401, a fixture

from agentrl.config import parse_config
from agentrl.runs import RunFolder
from agentrl.training.metrics_reference import CHAPTERS, described, matches, page

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

# Everything that adds metrics of its own and goes together.
SECTIONS = {
    "reward": [{"kind": "exact_match"}, {"kind": "length", "options": {"limit": 8, "cache": 1}}],
    "advantages": {"options": {"alpha": {"start": 1.0, "end": 0.5}}, "selection": {"enabled": True}},
}
TRAINING = {
    "updates_per_batch": 2,
    "kl": {"coefficient": 0.1, "where": "reward"},
    "llds": {"weight": 0.1},
    "importance": {"mode": "truncate"},
    "mask_overlong": True,
}

# Of workers, which also score, of tools other than search, and of estimators that learn: this run has none of them.
ELSEWHERE = {
    "rollout/restarts",
    "rollout/retried_groups",
    "estimator/NAME",
    "rewards/NAME",
    "rewards/NAME/PART",
    "calls/TOOL",
    "refused/share",
}


def test_the_page_is_the_one_that_code_makes():
    assert PAGE.read_text(encoding="utf-8") == page(CHAPTERS), (
        "make it anew: python -m agentrl.training.metrics_reference > docs/metrics.md"
    )


def test_what_a_run_writes_is_described_and_what_is_described_is_written(model, tmp_path):  # noqa: F811
    tree = make_config(model, tmp_path, steps=2, **TRAINING).model_dump(mode="json") | SECTIONS
    config = parse_config(tree, source="test")
    run(config, Engines())
    lines = RunFolder(config.folder).read_metrics()
    names = {name for line in lines for name in line} - {"step"}
    assert [name for name in sorted(names) if described(name) is None] == []
    known = {name for chapter in CHAPTERS for metric in chapter.metrics for name in metric.names}
    assert {name for name in known if not any(matches(name, written) for written in names)} == ELSEWHERE


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("strata/('a', 1)/x/share", "strata/KEY/share"),
        ("ends/turn_limit", "ends/END"),
        ("estimator/strata/1/sum", "estimator/NAME"),
        ("rollout/restarts", "rollout/restarts"),
    ],
)
def test_a_word_in_capitals_stands_for_whatever_is_there(name, known_as):
    assert known_as in described(name).names


@pytest.mark.parametrize("name", ["strata//share", "reward/means", "lossy", "ends/"])
def test_another_name_is_not_described(name):
    assert described(name) is None


def test_no_metric_is_described_twice():
    names = [name for chapter in CHAPTERS for metric in chapter.metrics for name in metric.names]
    assert len(set(names)) == len(names)
