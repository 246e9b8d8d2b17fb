"""Scores of an answer against the accepted ones, and the confidence interval of a proportion: pure functions."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

RuleName = Literal["agentrl", "squad", "hotpotqa", "triviaqa", "search_r1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACED_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´", " "))
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalize_answer(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation and a/an/the, with single spaces.

    Source: SQuAD's evaluate-v1.1.py (Rajpurkar et al., arXiv 1606.05250), which HotpotQA and Search-R1 use too.
    """
    return _plain(text.lower().translate(_NO_PUNCTUATION))


def _normalize_triviaqa(text: str) -> str:
    """As `normalize_answer`, but a space takes the place of each punctuation mark, and of the quotes ‘ ’ and ´."""
    return _plain(text.lower().translate(_SPACED_PUNCTUATION))


def _plain(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


@dataclass(frozen=True, slots=True)
class _Rule:
    """How answers are compared.

    Attributes:
        normalize: what is done to both texts first.
        closed: answers whose F1 is 0 with any other answer.
        strict: whether an accepted answer of which normalising leaves nothing is compared unnormalised, and an accepted
            answer is covered by whole words alone.
        has_f1: whether the script that the rule stands for has an F1.
    """

    normalize: Callable[[str], str] = normalize_answer
    closed: frozenset[str] = frozenset()
    strict: bool = False
    has_f1: bool = True


_RULES: Mapping[str, _Rule] = {
    "agentrl": _Rule(closed=_CLOSED, strict=True),
    "squad": _Rule(),
    "hotpotqa": _Rule(closed=_CLOSED),
    "triviaqa": _Rule(normalize=_normalize_triviaqa),
    "search_r1": _Rule(has_f1=False),
}


def exact_match(prediction: str, golds: Sequence[str], rule: RuleName = "agentrl") -> float:
    """Return 1.0 where the normalised prediction equals a normalised accepted answer, else 0.0.

    `squad`, `hotpotqa`, `triviaqa` and `search_r1` give what SQuAD's evaluate-v1.1.py, HotpotQA's hotpot_evaluate_v1.py,
    TriviaQA's triviaqa_evaluation.py and Search-R1's qa_em.py give. `agentrl` is squad with one difference. Of an accepted
    answer such as "A" or "+" the normaliser leaves nothing, and SQuAD's script accepts any article and any punctuation for
    it; `agentrl` compares such an answer word by word, unnormalised.

    Raises:
        ValueError: if there is no accepted answer, or no such rule.
    """
    return _best(prediction, golds, _rule(rule), _same)


def f1(prediction: str, golds: Sequence[str], rule: RuleName = "agentrl") -> float:
    """Return the best token F1 with an accepted answer.

    `squad`, `hotpotqa` and `triviaqa` give what the scripts named under `exact_match` give. By `hotpotqa` the answers yes, no
    and noanswer match themselves and nothing else. `agentrl` is hotpotqa, and what its exact match accepts has F1 1.

    Raises:
        ValueError: if there is no accepted answer, no such rule, or the rule is `search_r1`, whose script has no F1.
    """
    found = _rule(rule)
    if not found.has_f1:
        raise ValueError(f"rule {rule} has no F1, as the script that it stands for has none; use squad")
    return _best(prediction, golds, found, _overlap)


def sub_exact_match(prediction: str, golds: Sequence[str], rule: RuleName = "agentrl") -> float:
    """Return 1.0 where a normalised accepted answer stands within the normalised prediction, else 0.0.

    `search_r1` gives what the substring match of Search-R1's qa_em.py gives, where "art" stands within "Martha"; the other
    scripts have no such score, and their rules normalise as they do. By `agentrl` an answer stands within another as whole
    words, and one of which normalising leaves nothing is looked for unnormalised.

    Raises:
        ValueError: if there is no accepted answer, or no such rule.
    """
    return _best(prediction, golds, _rule(rule), _covers)


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


def _rule(name: str) -> _Rule:
    if name not in _RULES:
        raise ValueError(f"no rule {name!r}; there are {', '.join(_RULES)}")
    return _RULES[name]


def _best(prediction: str, golds: Sequence[str], rule: _Rule, score: Callable[[str, str, _Rule], float]) -> float:
    if not golds:
        raise ValueError("there is no accepted answer to compare with")
    return max(score(prediction, gold, rule) for gold in golds)


def _same(prediction: str, gold: str, rule: _Rule) -> float:
    expected = rule.normalize(gold)
    if rule.strict and not expected:
        return float(prediction.split() == gold.split())
    return float(rule.normalize(prediction) == expected)


def _covers(prediction: str, gold: str, rule: _Rule) -> float:
    said, expected = rule.normalize(prediction), rule.normalize(gold)
    if not rule.strict:
        return float(expected in said)
    if not expected:
        said, expected = " ".join(prediction.split()), " ".join(gold.split())
    return float(f" {expected} " in f" {said} ")


def _overlap(prediction: str, gold: str, rule: _Rule) -> float:
    if rule.strict and _same(prediction, gold, rule):
        return 1.0
    said, expected = rule.normalize(prediction), rule.normalize(gold)
    if said != expected and (said in rule.closed or expected in rule.closed):
        return 0.0
    said_tokens, expected_tokens = said.split(), expected.split()
    common = sum((Counter(said_tokens) & Counter(expected_tokens)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(said_tokens), common / len(expected_tokens)
    return 2 * precision * recall / (precision + recall)
