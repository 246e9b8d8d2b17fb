"""Does it learn? The pocket policy finds the second search by practice, through every real part: Ray, vLLM, Lucene, TRL, PEFT.

Eight questions of two hops ("Which international dialling code does the country that Pakxan belongs to have?") are asked eight
times each a step. The policy begins with about one right answer in six, for want of a second search; greedily it answers
three in forty. Rewarded for right answers alone, it comes to search twice, also for cities that it was never trained on.
Everything else equal, advantages that are dealt out to the wrong episodes teach it nothing.

How often it fails by chance: with seeds 0 to 6 the first reward was .12 to .20, the mean of the last three .973 to .993, and
exact match on other cities .85 to 1.00 (means .164, .984, .971; standard deviations .033, .008, .057). By Student's prediction
interval a further run passes the bounds below, .4, .8 and .5, with probabilities of 3e-4, 1e-6 and 2e-4 of not doing so.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from agentrl.advantages.estimators.grpo import grpo
from agentrl.runs import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

POLICY = "pocket_policy"
KIND, TRAINED, ASKED = "city_calling_code", 8, 40

CONFIG = """
    name: learning
    seed: 0
    run_dir: {folder}
    model: {{path: {policy}, lora: {{rank: 16, alpha: 32}}}}
    data:
      root: {folder}
      train: [{{path: train.jsonl, name: trained}}]
      eval: [{{path: asked.jsonl, name: asked}}]
    retriever: {{index: demo/index, k: 1}}
    agent: {{instruction: "", max_turns: 3, max_turn_tokens: 48, max_observation_tokens: 128, max_episode_tokens: 512}}
    engine: {{threads: 1, kv_cache_gib: 1, max_concurrent: 64}}
    rollout: {{group_size: 8, questions_per_step: 8, max_staleness: 1}}
    advantages: {{estimator: grpo}}
    training: {{steps: 24, learning_rate: 1.0e-3, checkpoint_every: 100, threads: 1}}
"""

_shuffle = np.random.default_rng(0)


def shuffled(batch):
    """GRPO's advantages, each given to an episode drawn by lot."""
    return _shuffle.permutation(grpo(batch))


def command(*arguments):
    # Ray's processes find this module, which has the estimator, in the folder where the command is run.
    done = subprocess.run(
        [sys.executable, "-m", "agentrl.cli", *map(str, arguments)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the demo world, questions of two hops to train on, others of their kind to ask, and a config."""
    folder = tmp_path_factory.mktemp("world")
    command("data", "demo", "--out", folder / "demo")
    command("index", "build", "--corpus", folder / "demo/corpus.jsonl", "--out", folder / "demo/index")
    rows = [json.loads(line) for line in (folder / "demo/train.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [json.dumps(row) + "\n" for row in rows if row["metadata"]["kind"] == KIND]
    (folder / "train.jsonl").write_text("".join(rows[:TRAINED]), encoding="utf-8")
    (folder / "asked.jsonl").write_text("".join(rows[TRAINED : TRAINED + ASKED]), encoding="utf-8")
    (folder / "learning.yaml").write_text(dedent(CONFIG.format(folder=folder, policy=POLICY)), encoding="utf-8")
    return folder


def train(world, name, *overrides):
    """Train, and return the reward of each step, and exact match on the questions that were only asked, before and after."""
    command("train", "--config", world / "learning.yaml", f"name={name}", *overrides)
    folder = RunFolder(world / name)
    rewards = [line["reward/mean"] for line in folder.read_metrics()]
    scores = [folder.read_evaluation(step)["sets"][0]["em"] for step in (0, len(rewards))]
    return rewards, *scores


def test_a_policy_learns_to_search_again_where_one_search_does_not_do(world):
    rewards, before, after = train(world, "learns")
    assert rewards[0] < 0.4
    assert statistics.mean(rewards[-3:]) > 0.8
    assert before < 0.3
    assert after > 0.5


def test_a_policy_learns_nothing_from_advantages_dealt_out_to_the_wrong_episodes(world):
    rewards, before, after = train(world, "shuffled", "advantages.estimator=test_learning:shuffled")
    assert max(rewards) < 0.4
    assert before < 0.3
    assert after < 0.3
