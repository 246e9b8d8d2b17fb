"""Each official rule gives what the official script gives, to the bit, for any text.

The references are written from what the scripts do, in other words than `agentrl.scores`: SQuAD's evaluate-v1.1.py,
HotpotQA's hotpot_evaluate_v1.py, TriviaQA's triviaqa_evaluation.py and Search-R1's qa_em.py.
"""

import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentrl.scores import exact_match, f1, sub_exact_match

# Pieces that the rules treat in a way of their own, in any mixture with any text.
PIECES = [
    *[
        "a",
        "an",
        "the",
        "The",
        "A",
        "yes",
        "no",
        "noanswer",
        "NO",
        "theatre",
        "Σ",
        "ΑΣ",
        "İ",
        "ß",
        "é",
        "e\u0301",
        "东京",
    ],
    *[
        "_",
        "'",
        "‘",
        "’",
        "´",
        "`",
        "“",
        "-",
        ".",
        "+",
        "&",
        " ",
        "  ",
        "\t",
        "\n",
        "\u00a0",
        "\u2028",
        "\u200b",
        "2",
        "0",
    ],
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)
golds = st.lists(texts, min_size=1, max_size=3)


def squad_words(text):
    kept = [letter for letter in text.lower() if letter not in string.punctuation]
    return re.sub(r"\b(?:the|an|a)\b", " ", "".join(kept)).split()


def triviaqa_words(text):
    spaced = [
        " " if letter in string.punctuation or letter in "‘’´`" else letter for letter in text.replace("_", " ").lower()
    ]
    return re.sub(r"\b(?:the|an|a)\b", " ", "".join(spaced)).split()


def token_f1(said, expected):
    left, common = list(expected), 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = 1.0 * common / len(said), 1.0 * common / len(expected)
    return (2 * precision * recall) / (precision + recall)


def hotpotqa_f1(said, expected):
    for one, other in ((said, expected), (expected, said)):
        if one in (["yes"], ["no"], ["noanswer"]) and one != other:
            return 0.0
    return token_f1(said, expected)


WORDS = {"squad": squad_words, "hotpotqa": squad_words, "triviaqa": triviaqa_words, "search_r1": squad_words}
F1 = {"squad": token_f1, "hotpotqa": hotpotqa_f1, "triviaqa": token_f1}


@given(texts, golds, st.sampled_from(list(WORDS)))
@example("the", ["A"], "squad")
@example("d’Artagnan", ["d Artagnan"], "triviaqa")
def test_exact_match_by_an_official_rule_is_the_scripts(prediction, accepted, rule):
    words = WORDS[rule]
    assert exact_match(prediction, accepted, rule) == float(any(words(prediction) == words(gold) for gold in accepted))


@given(texts, golds, st.sampled_from(list(F1)))
@example("no", ["no idea"], "hotpotqa")
@example("no", ["no idea"], "squad")
def test_f1_by_an_official_rule_is_the_scripts_to_the_bit(prediction, accepted, rule):
    words = WORDS[rule]
    assert f1(prediction, accepted, rule) == max(F1[rule](words(prediction), words(gold)) for gold in accepted)


@given(texts, golds)
@example("x", ["+"])
def test_the_substring_match_of_search_r1_is_the_scripts(prediction, accepted):
    said = " ".join(squad_words(prediction))
    expected = [" ".join(squad_words(gold)) for gold in accepted]
    assert sub_exact_match(prediction, accepted, "search_r1") == float(any(gold in said for gold in expected))


@given(texts, golds)
def test_our_own_rule_differs_from_squads_only_where_an_accepted_answer_normalises_to_nothing(prediction, accepted):
    plain = [gold for gold in accepted if squad_words(gold)]
    if plain == accepted:
        assert exact_match(prediction, accepted) == exact_match(prediction, accepted, "squad")
        assert f1(prediction, accepted) == f1(prediction, accepted, "hotpotqa")
    assert exact_match(prediction, accepted) <= sub_exact_match(prediction, accepted)


# Computed by hand from the scripts; None where the script has no such score.
CASES = [
    # prediction, accepted, rule, exact match, F1, the line of the script that decides
    ("The Beatles!", ["beatles"], "squad", 1, 1, "remove_articles and remove_punc"),
    ("the", ["A"], "squad", 1, 0, "both normalise to nothing: equal, and without a common token"),
    ("no", ["no idea"], "squad", 0, 2 / 3, "no rule for yes and no"),
    ("no", ["no idea"], "hotpotqa", 0, 0, "a prediction in yes, no, noanswer that is not the answer"),
    ("yes indeed", ["yes"], "hotpotqa", 0, 0, "an answer in yes, no, noanswer that is not the prediction"),
    ("well-known", ["wellknown"], "squad", 1, 1, "remove_punc joins what a hyphen parts"),
    ("well-known", ["well known"], "triviaqa", 1, 1, "handle_punc puts a space"),
    ("well-known", ["wellknown"], "triviaqa", 0, 0, "handle_punc puts a space"),
    ("Rock_n_roll", ["rock n roll"], "triviaqa", 1, 1, "replace_underscore"),
    ("Rock_n_roll", ["rock n roll"], "squad", 0, 0, "remove_punc joins what an underscore parts"),
    ("O’Hara", ["o hara"], "triviaqa", 1, 1, "handle_punc knows the quotes ‘ ’ ´ `"),
    ("O’Hara", ["ohara"], "squad", 0, 0, "string.punctuation has no ’"),
    ("“Emma”", ["emma"], "triviaqa", 0, 0, "handle_punc knows no “"),
    ("new new york", ["new york"], "squad", 0, 0.8, "Counter counts the common tokens"),
    ("Tokyo", ["Kyoto", "tokyo."], "search_r1", 1, None, "em_check takes any of the answers"),
    ("Tokyo, Japan", ["Tokyo"], "search_r1", 0, None, "em_check compares whole answers"),
]


@pytest.mark.parametrize(("prediction", "accepted", "rule", "em", "overlap", "line"), CASES)
def test_cases_computed_by_hand(prediction, accepted, rule, em, overlap, line):
    assert exact_match(prediction, accepted, rule) == em
    if overlap is not None:
        assert f1(prediction, accepted, rule) == pytest.approx(overlap)


@pytest.mark.parametrize(
    ("prediction", "accepted", "by_words", "by_letters"),
    [
        ("Tokyo, Japan", ["Tokyo"], 1, 1),
        ("Martha", ["Art"], 0, 1),
        ("Vitamin C or A", ["A"], 1, 1),
        ("Vitamin C", ["A"], 0, 1),
        ("Kyoto", ["Tokyo"], 0, 0),
    ],
)
def test_our_own_rule_covers_by_words_and_search_r1s_by_letters(prediction, accepted, by_words, by_letters):
    assert sub_exact_match(prediction, accepted) == by_words
    assert sub_exact_match(prediction, accepted, "search_r1") == by_letters


def test_search_r1_has_no_f1():
    with pytest.raises(ValueError, match="search_r1 has no F1"):
        f1("x", ["x"], "search_r1")


@pytest.mark.parametrize("score", [exact_match, f1, sub_exact_match])
def test_a_rule_that_does_not_exist_is_refused(score):
    with pytest.raises(ValueError, match="no rule 'sqad'; there are agentrl, squad"):
        score("x", ["x"], "sqad")


@pytest.mark.parametrize("rule", ["agentrl", *WORDS])
def test_no_rule_scores_without_an_accepted_answer(rule):
    with pytest.raises(ValueError, match="no accepted answer"):
        exact_match("x", [], rule)
