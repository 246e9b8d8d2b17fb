"""A reward of the user's own: what it may be and return, and what is said of one that does not work, before a run and in it."""

import asyncio
import json
import re
from pathlib import Path

import numpy as np
import pytest
from fakes import make_episode

from agentrl.config import ConfigError, RewardConfig, parse_config
from agentrl.data.errors import DataError
from agentrl.data.inputs import evaluation_questions
from agentrl.plug_ins import check_plug_ins
from agentrl.rewards import RewardError, Rewards
from agentrl.runs import read_trajectories, write_trajectories
from agentrl.types import EnvironmentFailure

MODULE = """
import asyncio, sys, threading

import numpy as np

from agentrl.rewards import Earned, exact_match
from agentrl.types import EnvironmentFailure

number = 3


def brevity(trajectory, most=10):
    return float(trajectory.model_tokens <= most)


async def patient(trajectory, *, seconds=0.0):
    await asyncio.sleep(seconds)
    return 0.25


barrier = threading.Barrier(3, timeout=5)


def meets(trajectory):
    barrier.wait()
    return 1.0


def parts(trajectory):
    return {"right": exact_match(trajectory), "searches": np.float32(len(trajectory.searches))}


def by_turn(trajectory):
    return Earned({"right": 1.0}, [float(i) for i, _ in enumerate(trajectory.turns)])


class Counting:
    def __init__(self, start=0):
        self.count = start

    def __call__(self, trajectory):
        self.count += 1
        return self.count


class AsyncCounting(Counting):
    closed = 0

    async def __call__(self, trajectory):
        return super().__call__(trajectory)

    async def close(self):
        AsyncCounting.closed += 1


def length_of_answer(trajectory):
    return len(trajectory.answer)


def raises(trajectory):
    return helper(trajectory)


def helper(trajectory):
    return 1 / (trajectory.model_tokens * 0)


def raises_in_a_library(trajectory):
    return np.zeros(1).reshape(3)


async def cancelled(trajectory):
    raise asyncio.CancelledError


def exits(trajectory):
    sys.exit(3)


def unreachable(trajectory):
    raise EnvironmentFailure("my service is away")


def nan(trajectory):
    return float("nan")


def text(trajectory):
    return "good"


def nothing(trajectory):
    pass


def infinite_part(trajectory):
    return {"a": float("inf")}


def numbered_parts(trajectory):
    return {1: 1.0}


def part_of_two_lines(trajectory):
    return {"a\\nb": 1.0}


def fails_for_wrong_answers(trajectory):
    return 1.0 if trajectory.answer in (None, *trajectory.question.golden_answers) else -"wrong"


def no_turns(trajectory):
    return Earned(1.0, None)


def huge(trajectory):
    return 10**400


def too_few_turns(trajectory):
    return Earned(1.0, [0.5])


def no_trajectory():
    return 1.0


def two_trajectories(trajectory, other):
    return 1.0


class NoCall:
    pass


class FailsToStart:
    def __init__(self):
        raise OSError("no model")

    def __call__(self, trajectory):
        return 1.0


class BlocksAtStart:
    def __init__(self):
        threading.Event().wait()

    def __call__(self, trajectory):
        return 1.0


def blocks(trajectory):
    threading.Event().wait()


async def blocks_its_loop(trajectory):
    threading.Event().wait()


async def never_done(trajectory):
    await asyncio.Event().wait()


def of_difficulty(trajectory):
    return trajectory.question.metadata["difficulty"]
"""


def line_of(text):
    return MODULE.splitlines().index(text) + 1


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    path = tmp_path / "rewards_of_mine.py"
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "rewards_of_mine", raising=False)
    return path


def reward(function, **settings):
    return {"kind": f"rewards_of_mine:{function}", **settings}


EPISODE = make_episode("e", searches=1, answer="gold")


def scored(*rewards, trajectories=(EPISODE,), seconds=10.0):
    async def score():
        made = Rewards([RewardConfig(**one) for one in rewards], seconds)
        try:
            return await asyncio.gather(*map(made.score, trajectories))
        finally:
            await made.close()

    return asyncio.run(score())


@pytest.mark.parametrize(
    ("settings", "earned", "parts"),
    [
        (reward("brevity"), 1.0, {"brevity": 1.0}),
        (reward("brevity", options={"most": 1}), 0.0, {"brevity": 0.0}),
        (reward("patient", weight=4.0), 1.0, {"patient": 0.25}),
        (reward("patient", name="calm", options={"seconds": 0.01}), 0.25, {"calm": 0.25}),
        (reward("parts", weight=0.5), 1.0, {"parts/right": 1.0, "parts/searches": 1.0}),
        (reward("Counting", options={"start": 4}), 5.0, {"Counting": 5.0}),
        (reward("AsyncCounting"), 1.0, {"AsyncCounting": 1.0}),
        (reward("length_of_answer"), 4.0, {"length_of_answer": 4.0}),
    ],
    ids=str,
)
def test_a_function_or_a_class_sync_or_async_earns_what_it_returns(settings, earned, parts):
    (trajectory,) = scored(settings)
    assert (trajectory.reward, trajectory.reward_parts) == (earned, parts)
    assert trajectory.turn_rewards is None
    assert type(trajectory.reward) is float
    assert {type(value) for value in trajectory.reward_parts.values()} == {float}


def test_a_class_is_made_once_and_closed_once():
    counted = scored(reward("AsyncCounting"), trajectories=[make_episode(str(i)) for i in range(5)])
    assert sorted(trajectory.reward for trajectory in counted) == [1.0, 2.0, 3.0, 4.0, 5.0]
    from rewards_of_mine import AsyncCounting

    assert AsyncCounting.closed == 1


def test_values_of_turns_are_weighted_and_summed_over_rewards():
    (trajectory,) = scored(reward("by_turn", weight=2.0), reward("by_turn", name="again", weight=0.5), {})
    assert trajectory.turn_rewards == (0.0, 2.5)
    assert trajectory.reward == 2.0 + 0.5 + 1.0
    assert trajectory.reward_parts == {"by_turn/right": 1.0, "again/right": 1.0, "exact_match": 1.0}


def test_what_an_episode_earned_is_written_and_read_again(tmp_path):
    plain = make_episode("plain", reward=1.0)
    scores = [*scored(reward("by_turn"), reward("parts")), plain]
    write_trajectories(tmp_path / "episodes.jsonl.zst", scores)
    assert list(read_trajectories(tmp_path / "episodes.jsonl.zst")) == scores


def test_functions_do_not_wait_for_one_another():
    met = scored(reward("meets"), trajectories=[make_episode(str(i)) for i in range(3)])
    assert [trajectory.reward for trajectory in met] == [1.0] * 3


def config(*rewards, seconds=10.0, **sections):
    sections = {"name": "x", "model": {"path": "m"}, "rollout": {"reward_timeout_seconds": seconds}} | sections
    return parse_config(sections | {"reward": list(rewards)}, source="test")


@pytest.mark.parametrize("name", ["brevity", "patient", "parts", "by_turn", "Counting", "AsyncCounting"])
def test_a_reward_that_fits_is_accepted_before_a_run(name):
    check_plug_ins(config({"kind": "f1"}, reward(name)))


BROKEN = [
    ("nowhere:f", {}, "'nowhere:f' cannot be imported: No module named 'nowhere'"),
    ("rewards_of_mine:absent", {}, "'rewards_of_mine:absent' cannot be imported: .*no attribute 'absent'"),
    ("rewards_of_mine:number", {}, "is a int, not a function"),
    ("no_path:", {}, "not an import path; write it as package.module:attribute"),
    ("__main__:f", {}, "__main__:f cannot be pickled: .*put the reward into a module of its own"),
    ("rewards_of_mine:no_trajectory", {}, "MINE:{def no_trajectory():}.*too many positional arguments; it takes"),
    ("rewards_of_mine:two_trajectories", {}, "MINE:{def two_trajectories(trajectory, other):}.*missing .*'other'"),
    (
        "rewards_of_mine:brevity",
        {"mots": 3},
        "MINE:{def brevity(trajectory, most=10):}.*unexpected keyword argument 'mots'",
    ),
    ("rewards_of_mine:Counting", {"begin": 3}, "MINE:{class Counting:}.*with options: .*'begin'"),
    ("rewards_of_mine:NoCall", {}, "MINE:{class NoCall:}.: the class has no __call__"),
    ("rewards_of_mine:FailsToStart", {}, 'raised OSError: no model .MINE:{        raise OSError("no model")}'),
    ("rewards_of_mine:raises", {}, "ZeroDivisionError: .* .MINE:{    return 1 / (trajectory.model_tokens * 0)}"),
    (
        "rewards_of_mine:raises_in_a_library",
        {},
        "raised ValueError: cannot reshape .* .MINE:{    return np.zeros(1).reshape(3)}",
    ),
    (
        "rewards_of_mine:length_of_answer",
        {},
        "raised TypeError: .*NoneType.* .MINE:{    return len(trajectory.answer)}.; it was tried on a made episode without",
    ),
    ("rewards_of_mine:of_difficulty", {}, "raised KeyError: 'difficulty' .MINE:"),
    ("rewards_of_mine:cancelled", {}, "raised CancelledError:  .MINE:{    raise asyncio.CancelledError}"),
    ("rewards_of_mine:exits", {}, "raised RuntimeError: SystemExit: 3 .MINE:{    sys.exit(3)}"),
    ("rewards_of_mine:unreachable", {}, "my service is away"),
    ("rewards_of_mine:nan", {}, "MINE:{def nan(trajectory):}.: it returned nan; return a finite number, a mapping"),
    ("rewards_of_mine:text", {}, "MINE:{def text(trajectory):}.: it returned 'good'; return a finite number"),
    ("rewards_of_mine:nothing", {}, "MINE:{def nothing(trajectory):}.: it returned None; return a finite number"),
    ("rewards_of_mine:infinite_part", {}, "MINE:{def infinite_part(trajectory):}.: it returned inf"),
    ("rewards_of_mine:numbered_parts", {}, "MINE:{def numbered_parts(trajectory):}.: .*must be letters"),
    ("rewards_of_mine:part_of_two_lines", {}, "MINE:{def part_of_two_lines(trajectory):}.: .*must be letters"),
    (
        "rewards_of_mine:fails_for_wrong_answers",
        {},
        "raised TypeError: .*; it was tried on a made episode with a wrong answer",
    ),
    ("rewards_of_mine:no_turns", {}, "MINE:{def no_turns(trajectory):}.: .*`turns` must be a list"),
    ("rewards_of_mine:huge", {}, "MINE:{def huge(trajectory):}.: it returned 1000.*; return a finite number"),
    (
        "rewards_of_mine:too_few_turns",
        {},
        "MINE:{def too_few_turns(trajectory):}.: .*1 values for an episode of 2 turns",
    ),
]


def pattern(message, path):
    """A message as a pattern: MINE is the user's file, and {a line} the number of that line in it."""
    before, separator, rest = message.partition("{")
    if separator:
        line, _, after = rest.rpartition("}")
        message = f"{before}{line_of(line)}{after}"
    return message.replace("MINE", re.escape(str(path)))


@pytest.mark.parametrize(("kind", "options", "message"), BROKEN)
def test_a_reward_that_does_not_fit_is_named_with_its_key_and_line_before_a_run(mine, kind, options, message):
    with pytest.raises(ConfigError, match=r"^reward\.1: .*" + pattern(message, mine)) as raised:
        check_plug_ins(config({"kind": "f1"}, {"kind": kind, "options": options}))
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "blocks",
            r"rewards_of_mine:blocks \(MINE:\d+\) did not return within 0\.5 s, which rollout\.reward_timeout_seconds",
        ),
        ("never_done", r"rewards_of_mine:never_done \(MINE:\d+\) did not return within 0\.5 s"),
        ("blocks_its_loop", "rewards_of_mine:blocks_its_loop blocks at MINE:{async def blocks_its_loop(trajectory):}"),
        ("BlocksAtStart", "rewards_of_mine:BlocksAtStart blocks at MINE:{        threading.Event().wait()}"),
    ],
)
def test_a_reward_that_blocks_for_ever_is_given_up_before_a_run(mine, name, message):
    found = pattern(message, mine)
    # The line that blocks is below the one that defines the function.
    found = re.sub(r":(\d+)$", lambda line: f":{int(line[1]) + (name == 'blocks_its_loop')}", found)
    with pytest.raises(ConfigError, match=found):
        check_plug_ins(config(reward(name), seconds=0.5))


def test_the_reward_of_the_documentation_works(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "reward_of_the_docs.py").write_text(code)
    settings = {"kind": "reward_of_the_docs:cautious", "options": {"wrong": 0.25}}
    check_plug_ins(config(settings))
    episodes = [make_episode(str(answer), answer=answer) for answer in ("gold", "silver", None)]
    assert [trajectory.reward for trajectory in scored(settings, trajectories=episodes)] == [1.0, -0.25, 0.0]


def test_options_that_cannot_be_pickled_are_refused():
    with pytest.raises(ConfigError, match=r"^reward\.0: options of rewards_of_mine:brevity cannot be pickled"):
        check_plug_ins(config(reward("brevity", options={"most": lambda: 3})))


def test_a_reward_is_tried_on_a_question_of_the_config(tmp_path):
    row = {"id": "1", "question": "why?", "golden_answers": ["so"], "metadata": {"difficulty": 0.5}}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = {"root": str(tmp_path), "train": [{"path": "train.jsonl"}]}
    check_plug_ins(config(reward("of_difficulty"), data=data))


@pytest.mark.parametrize("name", ["raises", "nan", "text", "nothing", "cancelled"])
def test_in_a_run_the_message_names_the_users_line(mine, name):
    with pytest.raises(RewardError, match=rf"rewards_of_mine:{name}.*{re.escape(str(mine))}:\d+\)"):
        scored(reward(name))


def test_in_a_run_a_reward_that_blocks_is_given_up_and_the_others_go_on():
    async def both():
        made = Rewards([RewardConfig(**reward("blocks"))], 0.1)
        return await asyncio.gather(
            *(made.score(make_episode(str(i))) for i in range(3)), return_exceptions=True
        ), await Rewards([RewardConfig()], 0.1).score(make_episode("e", answer="gold"))

    given_up, scored_meanwhile = asyncio.run(both())
    assert [type(error) for error in given_up] == [RewardError] * 3
    assert scored_meanwhile.reward == 1.0


def test_a_reward_may_say_that_what_it_asks_has_failed():
    with pytest.raises(EnvironmentFailure, match="my service is away"):
        scored(reward("unreachable"))


def test_a_question_without_gold_passages_is_named_before_a_rollout(tmp_path):
    rows = [{"id": i, "question": "why?", "golden_answers": ["so"]} for i in range(2)]
    rows[0]["metadata"] = {"gold": ["a"]}
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config({"kind": "f1"}, {"kind": "retrieval_recall", "options": {"key": "gold"}})
    message = rf"{re.escape(str(file))}: question .*:1 has no list metadata\.gold, and reward\.1 \(retrieval_recall\)"
    with pytest.raises(DataError, match=message):
        evaluation_questions(settings.data, [str(file)], rewards=settings.reward)
    assert len(evaluation_questions(settings.data, [str(file)], limit=1, rewards=settings.reward)) == 1
    assert len(evaluation_questions(settings.data, [str(file)])) == 2


def test_numbers_of_numpy_and_torch_become_pythons_own(mine):
    import torch

    mine.write_text("def given(trajectory, kind):\n    return given.values[kind]\n")
    import rewards_of_mine

    rewards_of_mine.given.values = values = {
        "numpy": np.float32(0.5),
        "array": np.array(0.5),
        "torch": torch.tensor(0.5),
        "bool": np.True_,
        "int": np.int64(1),
    }
    for kind, value in values.items():
        (trajectory,) = scored(reward("given", options={"kind": kind}))
        assert trajectory.reward == float(value)
        assert type(trajectory.reward) is float
