"""Question files are read as they are meant, every bad row is named, and the stream's order is a law of its seed."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.config import DataConfig
from agentrl.data.errors import DataError, RowError
from agentrl.data.inputs import evaluation_questions, first_of_each_set
from agentrl.data.prompts import question_of
from agentrl.data.questions import read_questions, validate_files, validate_questions
from agentrl.data.stream import QuestionStream
from agentrl.types import Question

ROW = {"id": "q1", "question": "Who wrote Faust?", "golden_answers": ["Goethe"], "metadata": {"hops": 1}}
PROMPT = "Answer the given question. Write your Question: no. Question: who wrote faust?\n"
SEARCH_R1 = {
    "data_source": "nq",
    "prompt": [{"role": "user", "content": PROMPT}],
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Goethe", "Johann Wolfgang von Goethe"]}},
    "extra_info": {"split": "test", "index": 7},
}


def verl(ground_truth, **extra):
    """A row as verl's own preparation of Search-R1's data writes it, which may also be a text or a number."""
    model = {"style": "rule", "ground_truth": ground_truth}
    return SEARCH_R1 | {"reward_model": model, "extra_info": {"split": "train", "index": 0, **extra}}


def asks(prompt):
    return verl("x") | {"prompt": [{"role": "user", "content": prompt}]}


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_parquet(path, *rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_a_json_line_becomes_a_question(tmp_path):
    path = write_lines(tmp_path / "nq" / "train.jsonl", ROW)
    assert read_questions(path) == [Question("nq-train:q1", "Who wrote Faust?", ("Goethe",), "nq-train", {"hops": 1})]


def test_a_name_prefixes_ids_and_is_the_dataset(tmp_path):
    (question,) = read_questions(write_lines(tmp_path / "train.jsonl", ROW), name="nq")
    assert (question.id, question.dataset) == ("nq:q1", "nq")


def test_limit_reads_no_further_than_it_needs(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", ROW, ROW | {"id": 2}, b"not json")
    assert [question.id for question in read_questions(path, name="s", limit=2)] == ["s:q1", "s:2"]


def test_unusual_line_separators_inside_a_question_do_not_split_it(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", ROW | {"question": "one\u2028two\x85three"})
    assert read_questions(path)[0].text == "one\u2028two\x85three"


def test_parquet_in_flashrag_columns_reads_like_json_lines(tmp_path):
    from_parquet = read_questions(write_parquet(tmp_path / "train.parquet", ROW), name="nq")
    assert from_parquet == read_questions(write_lines(tmp_path / "train.jsonl", ROW), name="nq")


def test_search_r1_parquet_takes_the_question_after_the_prompts_last_mark(tmp_path):
    (question,) = read_questions(write_parquet(tmp_path / "test.parquet", SEARCH_R1), name="mix")
    assert question.text == "who wrote faust?"
    assert question.golden_answers == ("Goethe", "Johann Wolfgang von Goethe")
    assert (question.id, question.dataset) == ("mix:nq:test_7", "nq")
    assert question.metadata == {"split": "test", "index": 7}


def test_search_r1_parquet_prefers_its_own_columns(tmp_path):
    row = SEARCH_R1 | {"id": "test_0", "question": "Who wrote it?", "golden_answers": ["He"]}
    (question,) = read_questions(write_parquet(tmp_path / "test.parquet", row), name="mix")
    assert (question.id, question.text, question.golden_answers) == ("mix:nq:test_0", "Who wrote it?", ("He",))


def test_search_r1_sources_that_count_alike_do_not_collide(tmp_path):
    path = write_parquet(tmp_path / "test.parquet", SEARCH_R1, SEARCH_R1 | {"data_source": "hotpotqa"})
    assert [question.dataset for question in read_questions(path)] == ["nq", "hotpotqa"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Bizet", ("Bizet",)),
        (1875, ("1875",)),
        (1875.0, ("1875",)),
        (0.5, ("0.5",)),
        ([1875, "in 1875"], ("1875", "in 1875")),
        ({"target": "Bizet"}, ("Bizet",)),
        ({"target": [1875]}, ("1875",)),
        ("[untitled]", ("[untitled]",)),
    ],
)
def test_a_single_answer_is_a_list_of_one_and_a_number_is_its_digits(tmp_path, given, expected):
    assert read_questions(write_lines(tmp_path / "a.jsonl", verl(given)))[0].golden_answers == expected


def test_an_answer_with_its_aliases_and_an_id_with_an_underscore_are_read(tmp_path):
    row = {"_id": "a1", "question": "Who wrote Carmen?", "answer": "Bizet", "answer_aliases": ["Georges Bizet"]}
    (question,) = read_questions(write_lines(tmp_path / "a.jsonl", row), name="s")
    assert (question.id, question.golden_answers) == ("s:a1", ("Bizet", "Georges Bizet"))
    (question,) = read_questions(write_lines(tmp_path / "b.jsonl", row | {"answer": 1875, "answer_aliases": None}))
    assert question.golden_answers == ("1875",)


def test_a_question_beside_the_prompt_goes_before_what_the_prompt_holds(tmp_path):
    (question,) = read_questions(write_lines(tmp_path / "a.jsonl", verl("x", question="Is it Question: Time?")))
    assert question.text == "Is it Question: Time?"


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (
            "Answer briefly. Question: Which album has the song The Question: Live?\n",
            "Which album has the song The Question: Live?",
        ),
        ("Answer briefly. Question: Who hosted the show Question: Time?\n", "Who hosted the show Question: Time?"),
        ("For example, <answer> Beijing </answer>. Question: who?\n", "who?"),
        ('Say "I do not know." Question: who?', "who?"),
        ("### Question:\nwho dug the canal?\n\n### Answer:\n", "who dug the canal?"),
        ("Question: who dug the canal?\nAnswer:", "who dug the canal?"),
        ("Question: who dug the canal\r\nYour final answer:", "who dug the canal"),
        ("Question: who dug the canal? Answer:", "who dug the canal?"),
        ('Question: who sings "where are you?" in the film', 'who sings "where are you?" in the film'),
        ("Question: who made Are We There Yet? and Fame?", "who made Are We There Yet? and Fame?"),
        ("Question: who dug the canal?  (two words)\nAnswer:", "who dug the canal?  (two words)"),
    ],
)
def test_a_prompt_gives_its_question_whole_and_nothing_else(tmp_path, prompt, question):
    assert read_questions(write_lines(tmp_path / "a.jsonl", asks(prompt)))[0].text == question


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Which album has the Question: Live?", "only inside a sentence"),
        ("Which SubQuestion: Live?", "only inside a sentence"),
        ("Question: a?\nAnswer: b\nQuestion: c?\nAnswer:", "2 places"),
        ("Answer. Question: I like TV. Question: Time is good. Who hosts it?", "2 places"),
        ("Question: who dug the canal?\nAnswer in one word.", "but with 'Answer in one word.'"),
        ("Question: who dug the canal? Answer in one word.", "does not end with its question"),
        ("Question: who dug the canal? let us think step by step.", "does not end with its question"),
        ("Question: who dug the canal? /no_think", "does not end with its question"),
        ("Question: who dug the canal Answer:", "does not end with its question"),
        ("Question: who?<|im_end|>\n<|im_start|>assistant\n", "does not end with its question"),
        ("Question: who? [/INST]", "does not end with its question"),
        ("Question: \n", "`prompt` is empty"),
    ],
)
def test_a_prompt_whose_question_cannot_be_told_apart_is_refused(tmp_path, prompt, message):
    (problem,) = validate_questions(write_lines(tmp_path / "a.jsonl", asks(prompt)))
    assert message in problem


WORDS = ["who", "Live?", "Question:", "I like TV.", '"so?"', "Mr.", "show", "\n", "1910", "Who!", "</b>"]


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join))
def test_a_question_survives_its_prompt_unchanged_or_the_prompt_is_refused(question):
    try:
        found = question_of(f"Answer briefly. Question: {question}\n", "prompt")
    except RowError:
        return
    assert found == question.strip()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"extra_info": {"split": "train"}}, "`extra_info.index` is missing"),
        ({"extra_info": {"split": None, "index": 3}}, "`extra_info.split` is null"),
        ({"extra_info": {"split": "train", "index": 3.0}}, "`extra_info.index` is 3.0"),
        ({"id": float("nan")}, "`id` is nan"),
    ],
)
def test_what_is_no_id_is_named_as_it_stands_in_the_file(tmp_path, columns, message):
    (problem,) = validate_questions(write_lines(tmp_path / "a.jsonl", verl("x") | columns))
    assert message in problem


def test_null_is_no_index_in_any_row(tmp_path):
    row = verl("x") | {"extra_info": {"split": "train", "index": None}}
    path = write_lines(tmp_path / "a.jsonl", row, row)
    assert [problem.split(":")[1] for problem in validate_questions(path)] == ["1", "2"]
    assert all("`extra_info.index` is null" in problem for problem in validate_questions(path))


BAD_ROWS = {
    "no question": ({k: v for k, v in ROW.items() if k != "question"}, "`question` is missing"),
    "empty question": (ROW | {"question": "  "}, "`question` is empty"),
    "question is a number": (ROW | {"question": 3}, "`question` is a number"),
    "prompt without a mark": (
        {k: v for k, v in SEARCH_R1.items() if k != "prompt"} | {"prompt": [{"role": "user", "content": "who?"}]},
        "`question` is missing",
    ),
    "no answers": ({k: v for k, v in ROW.items() if k != "golden_answers"}, "`golden_answers` is missing"),
    "answers empty": (ROW | {"golden_answers": []}, "`golden_answers` is empty"),
    "answers are text": (ROW | {"golden_answers": "Goethe"}, "`golden_answers` is text"),
    "an answer is null": (ROW | {"golden_answers": ["x", None]}, "`golden_answers` holds null"),
    "an answer is not a number": (ROW | {"golden_answers": [float("nan")]}, "`golden_answers` holds nan"),
    "an answer is a list in text": (ROW | {"golden_answers": ["['a', 'b']"]}, "holds a list that was written as text"),
    "an answer is empty": (ROW | {"golden_answers": ["x", " "]}, "`golden_answers` holds an empty text"),
    "answers taken apart": (ROW | {"golden_answers": list('["a", "b"]')}, "taken apart into letters"),
    "no id": ({k: v for k, v in ROW.items() if k != "id"}, "`id` is missing"),
    "id is a list": (ROW | {"id": ["q"]}, "`id` is a list"),
    "id is empty": (ROW | {"id": ""}, "`id` is empty"),
    "id is true": (ROW | {"id": True}, "`id` is true or false"),
    "metadata is text": (ROW | {"metadata": "x"}, "`metadata` is text"),
    "data_source is a number": (ROW | {"data_source": 3}, "`data_source` is a number"),
    "duplicate id": (ROW | {"id": "good"}, "id 'good' is already in line 1"),
    "ground_truth is missing": (verl(None), "`reward_model.ground_truth` is missing"),
    "ground_truth is empty": (verl([]), "`reward_model.ground_truth` is empty"),
    "ground_truth is true": (verl(True), "`reward_model.ground_truth` holds true or false"),
    "ground_truth has another key": (verl({"value": "x"}), "`reward_model.ground_truth.target` is missing"),
    "target is an object": (verl({"target": {}}), "`reward_model.ground_truth.target` is an object"),
    "reward_model is text": (verl("x") | {"reward_model": "rule"}, "`reward_model` is text"),
    "an alias is null": (
        {"_id": "a", "question": "q?", "answer": "x", "answer_aliases": [None]},
        "`answer_aliases` holds",
    ),
    "answer is null": ({"_id": "a", "question": "q?", "answer": None}, "`answer` is missing"),
    "reward_model is null": (verl("x") | {"reward_model": None}, "`reward_model` is missing"),
    "_id is null": ({"_id": None, "question": "q?", "answer": "x"}, "`_id` is missing"),
    "_id is a list": ({"_id": [], "question": "q?", "answer": "x"}, "`_id` is a list"),
    "split is missing": (verl("x") | {"extra_info": {"index": 3}}, "`extra_info.split` is missing"),
    "question of extra_info is empty": (verl("x", question=" "), "`extra_info.question` is empty"),
    "prompt is a number": (verl("x") | {"prompt": 3}, "`prompt` is a number"),
    "a list": ([1], "holds a list where an object is needed"),
    "not JSON": (b"{'id': 3}", "not JSON"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8 at byte 8"),
    "empty line": (b"", "an empty line"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name):
    row, expected = BAD_ROWS[name]
    path = write_lines(tmp_path / "train.jsonl", ROW | {"id": "good"}, row)
    (problem,) = validate_questions(path)
    assert problem.startswith(f"{path}:2: ")
    assert expected in problem
    with pytest.raises(DataError, match=r"train\.jsonl:2: .*agentrl data validate") as raised:
        read_questions(path)
    assert expected in str(raised.value)


def test_every_bad_row_is_reported_once(tmp_path):
    rows = [row for row, _ in BAD_ROWS.values()]
    path = write_lines(tmp_path / "train.jsonl", ROW | {"id": "good"}, *rows)
    problems = validate_questions(path)
    assert [problem.split(":")[1] for problem in problems] == [str(line) for line in range(2, len(rows) + 2)]


def test_a_truncated_last_line_is_told_from_bad_json(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", ROW, ROW | {"id": "q2"})
    path.write_bytes(path.read_bytes()[:-20])
    assert validate_questions(path) == [
        f"{path}:2: the last line is cut off in the middle; copy or download the file again"
    ]


def test_a_last_line_without_a_line_break_is_fine(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", ROW)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert validate_questions(path) == []


def test_five_letters_are_five_answers(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", ROW | {"golden_answers": list("aeiou")})
    assert read_questions(path)[0].golden_answers == tuple("aeiou")


def test_an_empty_file_is_a_problem(tmp_path):
    path = write_lines(tmp_path / "train.jsonl")
    assert len(validate_questions(path)) == 1
    with pytest.raises(DataError, match="holds no question"):
        read_questions(path)


def test_bad_rows_of_a_parquet_file_are_counted_from_one(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", ROW, ROW | {"id": "q2", "question": ""})
    assert validate_questions(path) == [f"{path}:2: `question` is empty; write the question or remove the row"]


@pytest.mark.parametrize("reader", [read_questions, validate_questions])
def test_files_that_cannot_be_read_say_so(tmp_path, reader):
    with pytest.raises(DataError, match="no such file"):
        reader(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").write_text("id")
    with pytest.raises(DataError, match=r"read from \.jsonl and \.parquet"):
        reader(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        reader(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([ROW, ROW]).encode(), "is one JSON array; write one object a line"),
        (b"\xef\xbb\xbf\n" + json.dumps([ROW, ROW], indent=2).encode(), "is one JSON array; write one object a line"),
        (gzip.compress(json.dumps(ROW).encode()), "is packed with gzip; unpack it"),
        (json.dumps(ROW).encode("utf-16"), "is UTF-16; save the file as UTF-8"),
        (b"PAR1", "is a Parquet file; rename it"),
    ],
)
def test_a_file_of_another_form_is_called_by_its_name_once(tmp_path, content, message):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    [problem] = validate_files([path])
    assert problem.startswith(f"{path}: {message}")


def test_a_folder_is_not_called_missing(tmp_path):
    assert validate_files([tmp_path]) == [f"{tmp_path}: is a folder; give the files in it"]


def test_a_byte_order_mark_means_nothing(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", ROW)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert validate_questions(path) == []


def test_every_file_is_validated_whatever_another_holds(tmp_path):
    bad, missing = write_lines(tmp_path / "bad.jsonl", ROW | {"question": ""}), tmp_path / "not_there.jsonl"
    good = write_lines(tmp_path / "good.jsonl", ROW)
    problems = validate_files([bad, missing, good, bad])
    assert [problem.split(": ")[0] for problem in problems] == [f"{bad}:1", str(missing)]


def test_the_folder_of_the_sets_is_named_only_where_a_file_was_looked_up_in_it(tmp_path):
    data = DataConfig(root=str(tmp_path), eval=[{"path": "none.jsonl"}])
    with pytest.raises(DataError, match=rf"none\.jsonl: no such file; .*data\.root \({tmp_path}\)"):
        evaluation_questions(data)
    with pytest.raises(DataError, match=r"none\.jsonl: no such file; check the path$"):
        evaluation_questions(data, ["none.jsonl"])


def make_set(name, size):
    return [Question(f"{name}:{i}", "?", ("!",)) for i in range(size)]


sets = st.lists(st.tuples(st.integers(1, 7), st.floats(0.1, 10)), min_size=1, max_size=4).map(
    lambda shape: [(make_set(str(i), size), weight) for i, (size, weight) in enumerate(shape)]
)


@given(sets, st.integers(0, 5), st.integers(0, 60), st.integers(0, 60))
def test_a_shorter_order_begins_a_longer_one(mix, seed, n, more):
    assert QuestionStream(mix, seed).take(0, n + more)[:n] == QuestionStream(mix, seed).take(0, n)


@given(sets, st.integers(0, 5), st.integers(1, 5), st.lists(st.integers(0, 9), max_size=6))
def test_steps_are_the_same_in_whatever_order_they_are_taken(mix, seed, count, steps):
    stream = QuestionStream(mix, seed)
    whole = QuestionStream(mix, seed).take(0, 10 * count)
    for step in steps:
        assert stream.take(step * count, count) == whole[step * count : (step + 1) * count]


@given(sets, st.integers(0, 5))
def test_no_question_returns_before_its_set_is_exhausted(mix, seed):
    order = QuestionStream(mix, seed).take(0, 80)
    for questions, _ in mix:
        drawn = [question for question in order if question in questions]
        for start in range(0, len(drawn), len(questions)):
            epoch = drawn[start : start + len(questions)]
            assert len(set(map(id, epoch))) == len(epoch)


@given(sets, st.integers(0, 5), st.integers(1, 80))
def test_any_beginning_has_the_weights_proportions(mix, seed, n):
    order = QuestionStream(mix, seed).take(0, n)
    total = sum(weight for _, weight in mix)
    for questions, weight in mix:
        drawn = sum(question in questions for question in order)
        assert abs(drawn - n * weight / total) < len(mix)


def test_epochs_and_seeds_differ_in_their_permutation():
    questions = make_set("a", 50)
    first = QuestionStream([(questions, 1.0)], seed=0).take(0, 100)
    assert first[:50] != first[50:]
    assert first[:50] != QuestionStream([(questions, 1.0)], seed=1).take(0, 50)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ([], "no question set"),
        ([([], 1.0)], "set 0 is empty"),
        ([(make_set("a", 2), 0.0)], "weight 0.0"),
        ([(make_set("a", 2), float("nan"))], "weight nan"),
        ([(make_set("a", 2), 1.0), (make_set("a", 1), 1.0)], "'a:0' is in the sets twice"),
    ],
)
def test_a_mix_that_cannot_be_drawn_from_is_refused(mix, message):
    with pytest.raises(DataError, match=message):
        QuestionStream(mix, seed=0)


def test_a_question_that_would_be_evaluated_twice_is_refused(tmp_path):
    first, second = (tmp_path / name / "nq" / "dev.jsonl" for name in ("a", "b"))
    for file in (first, second):
        write_lines(file, ROW)
    assert len(evaluation_questions(DataConfig(), [first])) == 1
    with pytest.raises(DataError, match=r"2 questions to evaluate have the id 'nq-dev:q1'; give each file once"):
        evaluation_questions(DataConfig(), [first, second])
    sets = [{"path": str(first), "name": "one"}, {"path": str(second), "name": "two"}]
    assert len(evaluation_questions(DataConfig(eval=sets))) == 2


@given(st.lists(st.sampled_from("abc")), st.integers(1, 4))
def test_the_first_questions_of_each_set_stay_in_their_order(sets, limit):
    questions = [Question(str(number), "?", ("so",), dataset) for number, dataset in enumerate(sets)]
    first = first_of_each_set(questions, limit)
    for name in "abc":
        members = [question for question in questions if question.dataset == name]
        assert [question for question in first if question.dataset == name] == members[:limit]
    assert first == sorted(first, key=lambda question: int(question.id))
    assert first_of_each_set(questions, None) == questions
