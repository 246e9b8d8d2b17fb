"""The benchmarks of retrieval compare equal answers, and count what they say they count."""

import asyncio
import json
import math

import pytest
from measuring import in_turns, percentiles
from recall import ANSWER, GOLD, answer_stands_in, bootstrap, measure_of, recall, scores, search_all
from retrieval import ratios_of
from retrieval_lucene import Rivals, search_r1_hits
from retrieval_work import check_equal, portions, shuffled_texts, sound_questions

from agentrl.scores import wilson
from agentrl.types import Question
from retrievers.base import Hit

ROW = [Hit("a", '"A"\nfirst', 2.0), Hit("b", '"B"\nsecond', 1.0)]


def question(gold, answers=("x",), kind="annotated-title"):
    return Question("q", "text", tuple(answers), metadata={"gold_passage_ids": gold, "gold_kind": kind})


def hits(*names):
    return [Hit(name, f'"{name}"\nabout {name}', 1.0) for name in names]


def test_equal_answers_may_differ_in_the_last_bits_of_scores():
    check_equal("rival", ["q"], [[Hit("a", '"A"\nfirst', 2.000001), ROW[1]]], [ROW])


@pytest.mark.parametrize(
    "row",
    [
        [],
        ROW[:1],
        ROW[::-1],
        [*ROW, Hit("c", "third", 0.5)],
        [Hit("x", '"A"\nfirst', 2.0), ROW[1]],
        [Hit("a", '"A"\nother', 2.0), ROW[1]],
        [Hit("a", '"A"\nfirst', 2.0001), ROW[1]],
    ],
)
def test_a_different_answer_is_refused_with_its_query(row):
    with pytest.raises(RuntimeError, match=r"rival found .* for 'which'"):
        check_equal("rival", ["other", "which"], [ROW, row], [ROW, ROW])


def test_missing_answers_are_refused():
    with pytest.raises(RuntimeError, match="1 answers to 2 queries"):
        check_equal("rival", ["one", "two"], [ROW], [ROW, ROW])


def test_percentiles_are_nearest_ranks():
    assert percentiles([float(n) for n in range(1, 101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": 3.0, "p99": 3.0}
    assert percentiles([7.0]) == {"p50": 7.0, "p95": 7.0, "p99": 7.0}


def test_rounds_have_texts_of_their_own_and_as_many_each():
    parts = portions([str(n) for n in range(11)], 3, 1000)
    assert [len(part) for part in parts] == [3, 3, 3]
    assert len({text for part in parts for text in part}) == 9
    with pytest.raises(ValueError, match="2 questions are not enough for 3 rounds"):
        portions(["a", "b"], 3, 10)


def test_every_method_is_first_as_often_as_the_others():
    turns = [in_turns("abc", number) for number in range(6)]
    assert [turn[0] for turn in turns] == list("abcabc")
    assert all(sorted(turn) == list("abc") for turn in turns)


def test_a_ratio_is_taken_round_by_round():
    seconds = {"agentrl": [1.0, 2.0, 4.0], "loop": [2.0, 6.0, 4.0]}
    assert ratios_of(seconds, {"r": ("agentrl", "loop")}) == {"r": {"median": 2.0, "least": 1.0, "most": 3.0}}


def test_texts_are_distinct_and_rows_that_cannot_be_used_are_counted(tmp_path):
    rows = [
        {"id": "1", "question": "b?", "golden_answers": ["x"]},
        {"id": "2", "question": "broken?", "golden_answers": []},
        {"id": "3", "question": "a?", "golden_answers": ["x"]},
        {"id": "4", "question": "b?", "golden_answers": ["x"]},
    ]
    file = tmp_path / "dev.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions, unusable = sound_questions(file)
    assert ([q.id.rpartition(":")[2] for q in questions], unusable) == (["1", "3", "4"], 1)
    assert {q.id.rpartition(":")[0] for q in questions} == {f"{tmp_path.name}-dev"}
    assert sorted(shuffled_texts([file, file])) == ["a?", "b?"]


class Found:
    """A hit of Java's."""

    def __init__(self, name, score):
        self.docid, self.score = name, score


class Searcher:
    """A searcher of Java's, with what was called of it."""

    def __init__(self):
        self.calls = []

    def search(self, query, k):
        self.calls.append(("search", query, k))
        return [Found("a", 2.0), Found("b", 1.0)]

    def doc(self, name):
        self.calls.append(("doc", name))
        return {"raw": json.dumps({"id": name, "contents": f'"{name.upper()}"\ntext\nmore'})}


def test_search_r1s_loop_looks_each_document_up_again():
    rivals = object.__new__(Rivals)
    rivals._searcher = Searcher()
    answers = rivals._search_r1(["q1", "q2"])
    one = [("doc", "a"), ("doc", "b")]
    assert rivals._searcher.calls == [("search", "q1", 3), *one, ("search", "q2", 3), *one]
    assert answers[0][0]["document"] | {"id": "a"} == answers[1][0]["document"]
    assert (answers[0][1]["document"]["title"], answers[0][1]["document"]["text"]) == ("B", "text\nmore")
    assert search_r1_hits(answers)[0] == [Hit("a", '"A"\ntext\nmore', 2.0), Hit("b", '"B"\ntext\nmore', 1.0)]


def test_recall_is_the_share_of_the_gold_passages_averaged_over_questions():
    questions = [question(["a", "b"]), question(["c"]), question(["d", "e", "f", "g"])]
    rows = [hits("a", "x", "y", "b"), hits("x", "y", "z"), hits("d", "e", "f", "g")]
    at_3 = scores(questions, rows, GOLD, 3)
    assert at_3["recall"]["value"] == pytest.approx((1 / 2 + 0 + 3 / 4) / 3)
    assert (at_3["all"]["value"], at_3["any"]["value"]) == (0.0, pytest.approx(2 / 3))
    assert (at_3["any"]["low"], at_3["any"]["high"]) == wilson(2, 3)
    at_4 = scores(questions, rows, GOLD, 4)
    assert at_4["recall"]["value"] == at_4["all"]["value"] == pytest.approx(2 / 3)
    assert at_4["recall"]["low"] <= at_4["recall"]["value"] <= at_4["recall"]["high"]


def test_a_passage_that_is_named_or_found_twice_counts_once():
    assert recall(["a", "a"], ["a", "a", "b"]) == 0.5
    with pytest.raises(ValueError, match="no gold passage"):
        recall(["a"], [])


def test_an_answer_must_stand_in_a_text_as_whole_words():
    assert answer_stands_in("He lived in the New York, of 1900.", ["Boston", "new york"])
    assert not answer_stands_in("Yorkshire", ["York"])
    # The normaliser leaves nothing of it, and nothing stands everywhere.
    assert not answer_stands_in("some text", ["The", "!"])
    rows = [hits("x", "paris"), hits("x", "y")]
    found = scores([question([], ["Paris"]), question([], ["Rome"])], rows, ANSWER, 2)
    assert found == {"answer": {"value": 0.5, "low": wilson(1, 2)[0], "high": wilson(1, 2)[1]}}
    # The title is no part of the text.
    assert scores([question([], ["T"])], [[Hit("t", '"T"\nother', 1.0)]], ANSWER, 1)["answer"]["value"] == 0.0


def test_gold_that_bm25_picked_is_not_counted():
    weak = "answer-string-in-bm25-top20 (weak)"
    assert measure_of([question(["a"]), question(["b"], kind="title+answer")]) == GOLD
    assert measure_of([question(["a"], kind=weak)]) == ANSWER
    assert measure_of([question(["a"]), question([])]) == ANSWER


def test_the_bootstrap_covers_the_mean_and_is_the_same_each_time():
    values = [0.0, 1.0] * 200
    low, high = bootstrap(values)
    assert bootstrap(values) == (low, high)
    half = 1.96 * 0.5 / math.sqrt(400)
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.01), pytest.approx(0.5 + half, abs=0.01))
    assert bootstrap([1.0, 1.0]) == (1.0, 1.0)


def test_all_questions_are_searched_in_their_order():
    class Echo:
        async def search(self, queries, k):
            return [[Hit(query, "", float(k))] for query in queries]

    asked = [Question(str(n), f"text {n}", ("x",)) for n in range(130)]
    rows = asyncio.run(search_all(Echo(), asked))
    assert [row[0].id for row in rows] == [q.text for q in asked]
    assert {row[0].score for row in rows} == {10.0}
