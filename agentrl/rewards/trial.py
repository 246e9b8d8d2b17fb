"""A reward of the user's own is tried on made episodes before anything is started."""

from __future__ import annotations

import asyncio
import pickle
import sys
import sysconfig
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from agentrl.config import RewardConfig
from agentrl.rewards.base import RewardError
from agentrl.rewards.scoring import Rewards
from agentrl.types import ANSWER, SEARCH, Action, End, Question, ToolCall, Trajectory, Turn

MADE_QUESTION = Question("made-up", "Which city is the capital of Japan?", ("Tokyo",))
"""Stands in where a config names no question file that is there."""


_WRONG = "an answer that nobody would accept"


def made_episodes(question: Question) -> dict[str, Trajectory]:
    """Return episodes that searched and answered rightly, wrongly, and not at all, by what to call them."""
    search = ToolCall(SEARCH, {"query": question.text}, 0.1, ("made-up-1",), (1.0,))
    text = f"<search> {question.text} </search>"
    found = Turn(
        token_ids=(1, 2, 3),
        logprobs=(-0.1, -0.2, -0.3),
        text=text,
        action=Action(SEARCH, question.text),
        adapter_version=0,
        calls=(search,),
        observation_ids=(4, 5),
        observation='\n<information>\n"Made up"\nA passage.\n</information>\n',
    )
    answer = question.golden_answers[0]
    said = Turn((6, 7), (-0.1, -0.2), f"<answer> {answer} </answer>", Action(ANSWER, answer), 0)
    wrong = Turn((6, 7), (-0.1, -0.2), f"<answer> {_WRONG} </answer>", Action(ANSWER, _WRONG), 0)
    more = Turn((6, 7), (-0.1, -0.2), text, Action(SEARCH, question.text), 0)
    return {
        "with an answer": Trajectory("made/0", question, (0,), (found, said), End.ANSWERED, answer=answer, seconds=1.0),
        "with a wrong answer": Trajectory(
            "made/2", question, (0,), (found, wrong), End.ANSWERED, answer=_WRONG, seconds=1.0
        ),
        "without an answer": Trajectory("made/1", question, (0,), (found, more), End.TURN_LIMIT, seconds=1.0),
    }


def try_reward(settings: RewardConfig, timeout_seconds: float, question: Question) -> None:
    """Make a reward of the user's own and score made episodes of a question with it.

    Raises:
        RewardError: if it cannot travel to the processes that will call it, cannot be made, raises, returns something else
            than a reward does, or needs more than `timeout_seconds` for an episode; the message names the user's line.
    """
    try:
        pickle.dumps(settings.options)
    except Exception as error:
        raise RewardError(
            f"options of {settings.kind} cannot be pickled, and rewards are called in other processes: "
            f"{type(error).__name__}: {error}"
        ) from error
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            asyncio.run(_score(settings, timeout_seconds, question))
        except BaseException as error:  # noqa: BLE001, raised again by the thread that waits
            failures.append(error)

    # In a thread, because nothing else gives up a constructor or a coroutine that blocks.
    thread = threading.Thread(target=attempt, daemon=True, name="reward trial")
    thread.start()
    thread.join(2 * timeout_seconds)
    if thread.is_alive():
        raise RewardError(
            f"{settings.kind} blocks{_line_of(thread)}: it did not come back within {2 * timeout_seconds:g} s, and "
            f"rollout.reward_timeout_seconds is {timeout_seconds:g}"
        )
    if failures:
        raise failures[0] if isinstance(failures[0], RewardError) else RewardError(str(failures[0])) from failures[0]


async def _score(settings: RewardConfig, timeout_seconds: float, question: Question) -> None:
    rewards = Rewards([settings], timeout_seconds)
    try:
        for name, episode in made_episodes(question).items():
            try:
                await rewards.score(episode)
            except Exception as error:
                raise RewardError(f"{error}; it was tried on a made episode {name}") from error
    finally:
        await rewards.close()


def _line_of(thread: threading.Thread) -> str:
    """Return where a thread is, in the last file that is neither Python's nor agentrl's own."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack: Sequence[traceback.FrameSummary] = traceback.extract_stack(frame) if frame is not None else ()
    python = sysconfig.get_path("stdlib")
    ours = str(Path(__file__).parents[1])
    own = [entry for entry in stack if not entry.filename.startswith((python, ours, "<"))]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
