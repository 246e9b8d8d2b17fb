"""Stand-ins for what an episode talks to, and makers of what it leaves behind."""

from agentrl.engines.base import Generation
from agentrl.types import ANSWER, SEARCH, Action, End, FailureCause, Question, ToolCall, Trajectory, Turn
from retrievers.base import Hit, RetrieverError


class ScriptedEngine:
    """Plays a script, one entry a call, within `max_tokens`, and records what it was handed.

    An entry is a text, the ids themselves, or an exception to raise.
    """

    def __init__(self, codec, script, version=0):
        self._codec = codec
        self._script = iter(script)
        self._version = version
        self.prompts = []
        self.samplings = []

    async def generate(self, prompt_ids, sampling):
        self.prompts.append(list(prompt_ids))
        self.samplings.append(sampling)
        entry = next(self._script, None)
        assert entry is not None, "the episode asked for more turns than the script has"
        if isinstance(entry, Exception):
            raise entry
        ids = self._codec.encode(entry) if isinstance(entry, str) else list(entry)
        kept = tuple(ids[: sampling.max_tokens])
        logprobs = tuple(-0.1 * (position + 1) for position in range(len(kept)))
        return Generation(kept, logprobs, "stop" if len(kept) == len(ids) else "length", self._version)


class PassageRetriever:
    """Finds the same passages for every query, or fails with `error`."""

    def __init__(self, *contents, error=None):
        self._hits = [Hit(f"p{i}", text, 1.0 / (i + 1)) for i, text in enumerate(contents)]
        self._error = error
        self.queries = []

    async def search(self, queries, k):
        self.queries += queries
        if self._error is not None:
            raise RetrieverError(self._error)
        return [self._hits[:k] for _ in queries]


class ScriptedPool:
    """Plays a RolloutPool: `play(question, names)` makes a group's episodes, which get done in the order that `pick` says.

    `pick` gets the indexes of the requests that are under way and returns the one that is done next.
    """

    def __init__(self, play, pick=min):
        self.play, self.pick = play, pick
        self.counters = {}
        self.requests = []
        self.temperature = None
        self.given_up = []

    def stream(self, *, temperature, on_stall):
        self.temperature = temperature
        return _ScriptedStream(self)


class _ScriptedStream:
    def __init__(self, pool):
        self._pool = pool
        self._requests, self._under_way = [], []

    def add(self, requests):
        for question, names in requests:
            self._under_way.append(len(self._requests))
            self._requests.append((question, list(names)))
            self._pool.requests.append((question, list(names)))

    def __next__(self):
        index = self._pool.pick(self._under_way)
        self._under_way.remove(index)
        return index, self._pool.play(*self._requests[index])

    def close(self):
        self._pool.given_up += [self._requests[index][0].id for index in self._under_way]


def passage(title, text):
    """Write a passage as indexes hold it."""
    return f'"{title}"\n{text}'


def make_episode(
    name,
    question=None,
    *,
    reward=None,
    searches=0,
    answer=None,
    end=End.ANSWERED,
    cause=None,
    failure="",
    sampled=2,
    observed=3,
):
    """Make an episode with `searches` executed searches and, unless its environment failed, a last turn without one."""
    if end is End.ENVIRONMENT_FAILURE and cause is None:
        cause = FailureCause.RETRIEVER
    search = ToolCall(SEARCH, {"query": "query"}, 0.5, ("p0",), (1.0,))
    looking = Turn(
        tuple(range(sampled)),
        (-0.5,) * sampled,
        "",
        Action(SEARCH, "query"),
        0,
        (search,),
        tuple(range(observed)),
    )
    last = Turn(tuple(range(sampled)), (-0.5,) * sampled, "", Action(ANSWER, answer or "x"), 0)
    turns = (looking,) * searches + (() if end is End.ENVIRONMENT_FAILURE else (last,))
    question = question or Question("q", "?", ("gold",))
    return Trajectory(name, question, (1, 2), turns, end, answer=answer, reward=reward, cause=cause, failure=failure)
