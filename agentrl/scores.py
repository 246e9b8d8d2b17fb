"""Scores of an answer against the accepted ones, and the confidence interval of a proportion: pure functions."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalize_answer(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation and a/an/the, with single spaces.

    Source: SQuAD's evaluate-v1.1.py (Rajpurkar et al., arXiv 1606.05250), which HotpotQA and Search-R1 use too.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 where the normalised prediction equals a normalised accepted answer, else 0.0.

    Of an accepted answer such as "A" or "+" the normaliser leaves nothing, and SQuAD's script would accept any article
    and any punctuation for it. Such an answer is compared word by word, unnormalised.

    Raises:
        ValueError: if there is no accepted answer.
    """
    return _best(prediction, golds, _same)


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the best token F1 with an accepted answer; yes, no and noanswer match themselves and nothing else.

    What `exact_match` accepts has F1 1.

    Source: HotpotQA's hotpot_evaluate_v1.py (Yang et al., arXiv 1809.09600).

    Raises:
        ValueError: if there is no accepted answer.
    """
    return _best(prediction, golds, _overlap)


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the score interval of a proportion; z = 1.96 covers 95 %.

    A trial may count as a success in part, as a question does that some of its episodes answer rightly. Such a mean varies
    less than that of trials that succeed or fail, so the interval covers no less.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
    Statistical Association 22 (1927), 209-212.

    Raises:
        ValueError: unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"no proportion: {successes} successes in {n} trials")
    share = successes / n
    spread = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / spread
    half = z / spread * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exactly, where rounding would leave the share outside of its own interval.
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half


def _best(prediction: str, golds: Sequence[str], score: Callable[[str, str], float]) -> float:
    if not golds:
        raise ValueError("there is no accepted answer to compare with")
    return max(score(prediction, gold) for gold in golds)


def _same(prediction: str, gold: str) -> float:
    expected = normalize_answer(gold)
    if not expected:
        return float(prediction.split() == gold.split())
    return float(normalize_answer(prediction) == expected)


def _overlap(prediction: str, gold: str) -> float:
    if _same(prediction, gold):
        return 1.0
    said, expected = normalize_answer(prediction), normalize_answer(gold)
    if said != expected and (said in _CLOSED or expected in _CLOSED):
        return 0.0
    said_tokens, expected_tokens = said.split(), expected.split()
    common = sum((Counter(said_tokens) & Counter(expected_tokens)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(said_tokens), common / len(expected_tokens)
    return 2 * precision * recall / (precision + recall)
