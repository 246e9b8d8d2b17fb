"""From what a caller gives to NumPy and back: rewards, lengths, turns, and keys as numbers."""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentrl.advantages.base import AdvantageError, Bools, Floats, Ints, Turns, tolerance_of

Keys = Sequence[Hashable] | NDArray[Any]


def is_tensor(value: Any) -> bool:
    """Return whether `value` is a torch tensor, without importing torch: where torch is not imported, no value is one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(value: Any) -> Any:
    """Return a torch tensor as a NumPy array (float64 if it is floating) and anything else as it is."""
    if not is_tensor(value):
        return value
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()


def like(given: Any) -> Callable[[NDArray[Any]], Any]:
    """Return a function that turns a NumPy array into the kind of `given`.

    For a list or a tuple it returns a list, for a torch tensor a tensor on the same device, else the array itself.
    Floats get the tensor's dtype, or torch's default dtype where the tensor holds whole numbers.
    """
    if isinstance(given, (list, tuple)):
        return lambda array: array.tolist()
    if not is_tensor(given):
        return lambda array: array
    torch = sys.modules["torch"]
    floating = given.dtype if given.is_floating_point() else torch.get_default_dtype()
    return lambda array: torch.as_tensor(array).to(given.device, floating if array.dtype.kind == "f" else None)


def as_rewards(rewards: Any, valid: Any) -> tuple[Floats, Bools, float]:
    """Return rewards [N] in float64, which of them count [N], and the tolerance of the dtype that they were given in.

    Raises:
        AdvantageError: if they are not one-dimensional, not numbers, or one that counts is infinite.
    """
    try:
        given = np.asarray(to_numpy(rewards))
        array = given.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise AdvantageError(f"rewards must be numbers, or NaN for excluded rollouts: {error}") from error
    if array.ndim != 1:
        raise AdvantageError(f"rewards must be one-dimensional, got shape {array.shape}")
    counts = ~np.isnan(array)
    if valid is not None:
        flags = np.asarray(to_numpy(valid))
        if flags.shape != array.shape or (flags.dtype != np.bool_ and len(array)):
            raise AdvantageError(f"valid must be {len(array)} booleans, got shape {flags.shape} of {flags.dtype}")
        counts &= flags.astype(np.bool_)
    infinite = np.flatnonzero(np.isinf(array) & counts)
    if len(infinite):
        raise AdvantageError(f"rewards[{infinite[0]}] is {array[infinite[0]]}; only NaN excludes a rollout")
    return array, counts, tolerance_of(single=_is_single(rewards, given))


def _is_single(rewards: Any, array: NDArray[Any]) -> bool:
    """Return whether rewards are floats narrower than float64, as an array, a tensor or a list of such scalars."""
    if is_tensor(rewards):
        return rewards.is_floating_point() and rewards.element_size() < 8
    if array.dtype != np.object_:
        return array.dtype.kind == "f" and array.dtype.itemsize < 8
    # None stands for a failed rollout and says nothing about the others.
    kinds = {type(reward) for reward in array} - {type(None)}
    return bool(kinds) and kinds <= {np.float32, np.float16}


def as_lengths(lengths: Any, valid: Bools) -> Floats | None:
    """Return the lengths [n] of the rollouts that count.

    Raises:
        AdvantageError: if there is not one positive finite number for each rollout.
    """
    if lengths is None:
        return None
    array = np.asarray(to_numpy(lengths), dtype=np.float64)
    if array.shape != valid.shape:
        raise AdvantageError(f"lengths must have one entry for each of {len(valid)} rollouts, got shape {array.shape}")
    array = array[valid]
    if not ((array > 0) & np.isfinite(array)).all():
        raise AdvantageError("lengths must be positive and finite: every rollout that counts has at least one token")
    return array


def as_turns(turn_rewards: Any, anchors: Any, groups: Ints, valid: Bools) -> Turns | None:
    """Return the turns of the rollouts that count, whose groups are [n].

    Raises:
        AdvantageError: if there is not one sequence for each rollout, `turn_rewards` and `anchors` give a rollout different
            numbers of turns, a rollout that counts has no turn, or a reward is not a finite number.
    """
    if turn_rewards is None and anchors is None:
        return None
    counts: Ints | None = None
    flat: dict[str, list[Any]] = {}
    for name, given in (("turn_rewards", turn_rewards), ("anchors", anchors)):
        if given is None:
            continue
        if len(given) != len(valid):
            raise AdvantageError(f"{name} must have one sequence for each of {len(valid)} rollouts, got {len(given)}")
        rows = list(itertools.compress(given, valid))
        found = np.fromiter(map(len, rows), dtype=np.intp, count=len(rows))
        if counts is not None and not np.array_equal(counts, found):
            raise AdvantageError("turn_rewards and anchors must have the same number of turns in every rollout")
        counts = found
        flat[name] = list(itertools.chain.from_iterable(rows))
    if not counts.all():
        raise AdvantageError(
            f"rollout {np.flatnonzero(valid)[np.argmin(counts)]} has no turn; exclude it or leave it out"
        )
    rollouts = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(rollouts)) - np.repeat(np.cumsum(counts) - counts, counts)
    rewards = numbers = None
    if turn_rewards is not None:
        rewards = np.array(flat["turn_rewards"], dtype=np.float64)
        if not np.isfinite(rewards).all():
            raise AdvantageError("turn_rewards must be finite numbers")
    if anchors is not None:
        everyone = np.ones(len(rollouts), dtype=np.bool_)
        keys, key_index = _number(flat["anchors"], everyone, "anchors")
        _, numbers = renumber(groups[rollouts] * len(keys) + key_index)
    return Turns(rollouts, index, index == counts[rollouts] - 1, rewards, numbers)


def number_keys(keys: Keys, counts: Bools, what: str) -> tuple[list[Any], Ints]:
    """Return the distinct keys of the rollouts that count, and for each such rollout its key's position [n].

    `what` the keys are, groups or strata, is for messages.

    Raises:
        AdvantageError: if a key is not hashable, or is missing: a rollout without a key can be compared with no other.
    """
    distinct, index = _number(keys, counts, what)
    for position, key in enumerate(distinct):
        if _is_missing(key):
            row = np.flatnonzero(counts)[np.argmax(index == position)]
            raise AdvantageError(
                f"{what}[{row}] is missing: it is {key!r}; give the rollout its key, or exclude it by a reward of NaN"
            )
    return distinct, index


def _is_missing(key: Hashable) -> bool:
    """Return whether a key is None, NaN, NaT or pandas' NA, or a tuple that holds one."""
    if key is None or isinstance(key, tuple):
        return key is None or any(map(_is_missing, key))
    try:
        return bool(key != key)
    except TypeError:
        # pandas' NA refuses to say whether it differs from itself.
        return True


def _number(keys: Keys, counts: Bools, what: str) -> tuple[list[Any], Ints]:
    keys = to_numpy(keys)
    if isinstance(keys, np.ndarray):
        if not isinstance(keys, np.ma.MaskedArray) and keys.ndim == 1 and keys.dtype.kind in "iu":
            distinct, index = renumber(keys[counts])
            return distinct.tolist(), index
        keys = keys.tolist()
    elif any(hasattr(kind, "item") for kind in set(map(type, keys))):
        # A torch tensor is hashed by identity: equal ones would be different keys.
        keys = [key.item() if hasattr(key, "item") else key for key in keys]
    # A dictionary, because keys need not be orderable among one another.
    numbers: defaultdict[Any, int] = defaultdict(itertools.count().__next__)
    try:
        index = np.fromiter(map(numbers.__getitem__, itertools.compress(keys, counts)), dtype=np.intp)
    except TypeError as error:
        raise AdvantageError(f"{what} must be hashable, such as numbers, strings or tuples of them: {error}") from error
    return list(numbers), index


def renumber(values: NDArray[np.integer[Any]]) -> tuple[NDArray[np.integer[Any]], Ints]:
    """Return the distinct values in ascending order, and for each value its position among them [n]."""
    # Differences of narrow integers may not fit their own kind.
    values = values if values.dtype.itemsize == 8 else values.astype(np.int64)
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    if high - low > 4 * len(values):
        return np.unique(values, return_inverse=True)
    # Counting is many times faster than sorting where the values lie close to one another, as ids mostly do.
    offset = (values - low).astype(np.intp)
    present = np.bincount(offset) > 0
    return np.flatnonzero(present) + low, (np.cumsum(present) - 1)[offset]
