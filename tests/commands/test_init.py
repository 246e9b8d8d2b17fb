"""A first config for a corpus and questions: what it says, what it comes from, and what it refuses."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.commands.init import make_start, settings, split
from agentrl.config import ConfigError, load_config, parse_config
from agentrl.data.errors import DataError
from agentrl.data.questions import read_questions
from agentrl.plug_ins import check_plug_ins
from agentrl.types import Question
from retrievers.base import RetrieverError


@pytest.fixture
def inputs(tmp_path):
    def write(words=20, count=40, metadata=None):
        corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
        passages = [{"id": str(n), "contents": f'"Title {n}"\n' + "word " * words} for n in range(30)]
        corpus.write_text("".join(json.dumps(passage) + "\n" for passage in passages))
        rows = [{"id": f"q{n}", "question": f"Who is {n}?", "golden_answers": [f"é{n}"]} for n in range(count)]
        rows = [row | ({"metadata": metadata} if metadata else {}) for row in rows]
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return corpus, questions

    return write


def test_the_config_is_sound_and_names_what_was_written(inputs, tmp_path):
    start = make_start(tmp_path / "mine", *inputs(), None)
    config = load_config(str(start.config), [])
    check_plug_ins(config)
    assert (config.name, config.folder) == ("mine", tmp_path / "mine" / "runs" / "mine")
    assert config.data.resolve(config.data.train[0].path) == tmp_path / "mine" / "train.jsonl"
    assert config.data.resolve_index(config.retriever.index) == str(tmp_path / "mine" / "index")
    assert start.seen == (
        "30 passages, half of them of at most 22 words, nine in ten of at most 22",
        f"36 questions to train on and 4 to evaluate, in {tmp_path / 'mine'}",
    )


def test_every_setting_has_what_it_means_above_it(inputs, tmp_path):
    start = make_start(tmp_path / "mine", *inputs(), None)
    lines = start.config.read_text().splitlines()
    assert "  # How many episodes of one question are compared with one another." in lines
    for number, line in enumerate(lines):
        if line.lstrip().startswith(("- ", "#")) or line.startswith("    "):
            continue
        assert lines[number - 1].lstrip().startswith("#"), line


def test_the_questions_are_split_and_nothing_of_them_is_lost(inputs, tmp_path):
    corpus, questions = inputs(metadata={"gold_passage_ids": ["1"]})
    make_start(tmp_path / "mine", corpus, questions, None)
    train, held_out = (read_questions(tmp_path / "mine" / f"{part}.jsonl", "x") for part in ("train", "eval"))
    assert len(held_out) == 4
    both = {question.id: question for question in [*train, *held_out]}
    assert both == {question.id: question for question in read_questions(questions, "x")}


@given(st.lists(st.text(min_size=1, max_size=6), min_size=2, max_size=60, unique=True), st.integers(0, 30))
def test_more_questions_leave_those_that_were_held_out_held_out_as_far_as_there_is_room(ids, more):
    questions = [Question(f"set:{name}", "?", ("a",)) for name in ids]
    train, held_out = split(questions)
    assert len(held_out) == max(1, len(questions) // 10)
    assert {q.id for q in train} | {q.id for q in held_out} == {q.id for q in questions}
    assert not {q.id for q in train} & {q.id for q in held_out}
    # The same ones, whatever the order and the name of the set.
    again = [Question(q.id.replace("set:", "other:", 1), "?", ("a",)) for q in reversed(questions)]
    assert {q.id.partition(":")[2] for q in split(again)[1]} == {q.id.partition(":")[2] for q in held_out}


@given(st.integers(1, 5000), st.integers(1, 100_000), st.sampled_from([None, "some/model"]))
def test_whatever_the_lengths_the_config_can_be_run(words, train, model):
    made = parse_config(settings("x", Path("here"), model, passage_words=words, train=train), source="test")
    agent = made.agent
    assert (
        agent.max_episode_tokens
        >= (agent.max_turns + 1) * agent.max_turn_tokens + agent.max_turns * agent.max_observation_tokens
    )
    assert 10 <= made.training.steps <= 200


def test_longer_passages_get_more_room(inputs, tmp_path):
    short = load_config(str(make_start(tmp_path / "short", *inputs(words=10), None).config), [])
    long = load_config(str(make_start(tmp_path / "long", *inputs(words=90), None).config), [])
    assert short.agent.max_observation_tokens < long.agent.max_observation_tokens
    assert short.agent.max_episode_tokens < long.agent.max_episode_tokens


def test_the_command_says_what_it_saw_and_what_comes_next(inputs, tmp_path, agentrl):
    corpus, questions = inputs()
    out = tmp_path / "mine"
    status, shown, err = agentrl("init", out, "--corpus", corpus, "--questions", questions, "--model", "some/model")
    assert (status, err) == (0, "")
    assert f"agentrl index build --corpus {corpus} --out {out / 'index'}" in shown
    assert f"agentrl train --config {out / 'config.yaml'}" in shown
    assert load_config(str(out / "config.yaml"), []).model.path == "some/model"


def test_what_cannot_be_used_is_named_and_nothing_is_written(inputs, tmp_path):
    corpus, questions = inputs()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "1"}\n')
    with pytest.raises(RetrieverError, match=r"bad\.jsonl:1"):
        make_start(tmp_path / "mine", bad, questions, None)
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        make_start(tmp_path / "mine", corpus, bad, None)
    one = tmp_path / "one.jsonl"
    one.write_text(questions.read_text().partition("\n")[0] + "\n")
    with pytest.raises(DataError, match="holds one question"):
        make_start(tmp_path / "mine", corpus, one, None)
    with pytest.raises(ConfigError, match="names the run"):
        make_start(tmp_path / "my run", corpus, questions, None)
    assert not (tmp_path / "mine").exists()
    make_start(tmp_path / "mine", corpus, questions, None)
    with pytest.raises(ConfigError, match="already there"):
        make_start(tmp_path / "mine", corpus, questions, None)
