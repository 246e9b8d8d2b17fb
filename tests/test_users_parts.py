"""A user's own estimator, stratifier, protocol, reward and retriever, named in a config and used in Ray's processes."""

import subprocess
import sys
from textwrap import dedent

import pytest

from agentrl.runs import RunFolder, read_trajectories

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# It stands in the folder where the command is run, as a user's own module does.
MINE = '''
from agentrl.agent.protocols import SearchTags
from agentrl.types import Action, SEARCH
from retrievers.base import Hit


class EverySearch(SearchTags):
    """Takes whatever the model says for a search."""

    def parse(self, text):
        return Action(SEARCH, "my query")


class MyLibrary:
    def __init__(self, shelf):
        self._shelf = shelf

    async def search(self, queries, k):
        return [[Hit("mine-1", f'"{self._shelf}"\\nFound in my library.', 1.0)] for _ in queries]


def by_last_digit(trajectory):
    return "even" if int(trajectory.id.rsplit("/")[-1]) % 2 == 0 else "odd"


async def searched(trajectory, worth):
    return {"searches": worth * len(trajectory.searches)}


def alternate(batch, size=1.0):
    return size * (1.0 - 2.0 * (batch.strata % 2))
'''

CONFIG = """
    name: mine
    run_dir: runs
    model: {path: pocket_policy, lora: {rank: 4, alpha: 8}}
    data: {root: ., train: [{path: questions.jsonl, name: q}]}
    engine: {kind: transformers, threads: 1, max_concurrent: 4}
    retriever: {kind: object, target: "mine:MyLibrary", options: {shelf: poetry}}
    agent: {protocol: "mine:EverySearch", instruction: "", max_turns: 1, max_turn_tokens: 8, max_observation_tokens: 64,
             max_episode_tokens: 256}
    rollout: {group_size: 4, questions_per_step: 1}
    advantages: {estimator: "mine:alternate", stratum: "mine:by_last_digit", options: {size: 0.5}}
    reward: [{kind: "mine:searched", weight: 0.0, options: {worth: 0.25}}]
    training: {steps: 1, learning_rate: 1.0e-3, threads: 1}
    evaluation: {before: false, after: false}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "questions.jsonl").write_text('{"id": "1", "question": "who wrote it?", "golden_answers": ["me"]}\n')
    (tmp_path / "mine.yaml").write_text(dedent(CONFIG))
    return tmp_path


def train(folder, *overrides):
    command = [sys.executable, "-P", "-m", "agentrl.cli", "train", "--config", "mine.yaml", *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)


def test_a_run_uses_parts_that_stand_beside_its_config_and_no_namesakes_of_libraries(folder):
    (folder / "tokenizers.py").write_text("raise RuntimeError('imported in place of the library')")
    done = train(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunFolder(folder / "runs" / "mine")
    assert {"driver.log", "engine-0.log"} <= {file.name for file in (run.path / "logs").iterdir()}
    episodes = list(read_trajectories(run.path / "trajectories" / "step-00001.jsonl.zst"))
    assert len(episodes) == 4
    for episode in episodes:
        assert [search.passage_ids for search in episode.searches] == [("mine-1",)]
        assert "poetry" in episode.turns[0].observation
    metrics = run.read_metrics()[0]
    assert metrics["strata/even/share"] == metrics["strata/odd/share"] == 0.5
    assert [episode.reward_parts for episode in episodes] == [{"searched/searches": 0.25}] * 4
    assert metrics["rewards/searched/searches"] == 0.25
    # A reward without weight changes nothing, so only this estimator moves anything.
    assert metrics["reward/mean"] == 0.0
    assert metrics["grad_norm"] > 0


def test_a_stratifier_that_raises_is_named_with_its_line_before_anything_starts(folder):
    (folder / "mine.py").write_text(MINE.replace('trajectory.id.rsplit("/")[-1]', "trajectory.turns[0].text"))
    done = train(folder)
    assert done.returncode == 1
    line = next(n for n, text in enumerate(MINE.splitlines(), 1) if "rsplit" in text)
    assert f"mine.py:{line}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("advantages.estimator", "mine:missing"),
        ("advantages.stratum", "absent:by_last_digit"),
        ("agent.protocol", "mine:missing"),
        ("reward.0.kind", "mine:missing"),
        ("retriever.target", "mine:missing"),
    ],
)
def test_a_part_that_cannot_be_imported_is_named_before_anything_starts(folder, key, part):
    done = train(folder, f"{key}={part}")
    assert done.returncode == 1
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "runs").exists()
