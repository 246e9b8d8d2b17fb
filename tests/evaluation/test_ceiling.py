"""The ceiling counts a question where some sequence of stated queries reads the answer, hop after hop, within the limits."""

import asyncio
import json

import pytest
from fakes import passage

from agentrl.agent.scripted import ScriptPlayer
from agentrl.config import AgentConfig, Config, ConfigError, DataConfig, QuestionSet
from agentrl.data.errors import DataError
from agentrl.data.inputs import evaluation_questions
from agentrl.evaluation.ceiling import measure_ceiling, perfect_episodes, queries_of
from agentrl.evaluation.run import evaluation_of
from agentrl.scores import exact_match
from agentrl.types import End, FailureCause, Question
from retrievers.base import Hit, RetrieverError

PLACES = {
    "Brikama": "Brikama is a city in Gambia.",
    "Gambia": "The capital of Gambia is Banjul. Its only land neighbour is Senegal.",
    "Senegal": "Senegal lies in West Africa. Its capital city is Dakar.",
    "Money of Senegal": "People in Senegal pay with the franc.",
}
CHAIN = ("Brikama", "Gambia", "Senegal")


class Titles:
    """Finds the passages whose titles a query is, or those that `also` has for it."""

    def __init__(self, also=(), error=None):
        self.also, self.error = dict(also), error

    async def search(self, queries, k):
        if self.error is not None:
            raise self.error
        found = [self.also.get(query, [query] if query in PLACES else []) for query in queries]
        return [[Hit(f"id-{title}", passage(title, PLACES[title]), 1.0) for title in titles[:k]] for titles in found]


def question(*titles, answer, kind="city_neighbour_currency", text="What is paid with next to the home of Brikama?"):
    metadata = {
        "supporting_titles": list(titles),
        "gold_passage_ids": [f"id-{title}" for title in titles],
        "kind": kind,
        "chain": list(CHAIN),
    }
    return Question(f"q:{kind}:{len(titles)}", text, (answer,), "set", metadata)


THREE = question("Brikama", "Gambia", "Money of Senegal", answer="franc")


def perfect(codec, questions, retriever=None, k=3, on_done=lambda done: None, **limits):
    config = AgentConfig(**{"instruction": "", "max_turn_tokens": 120} | limits)
    return asyncio.run(perfect_episodes(questions, ScriptPlayer(config, codec, retriever or Titles(), k), on_done))


def queries(episode):
    return [search.query for search in episode.searches]


def test_a_question_of_three_hops_takes_three_searches_in_the_order_of_its_hops(codec):
    (episode,) = perfect(codec, [THREE])
    assert queries(episode) == ["Brikama", "Gambia", "Money of Senegal"]
    assert (episode.end, episode.answer) == (End.ANSWERED, "franc")


def test_searches_are_no_more_than_an_episode_may_have(codec):
    (cut,) = perfect(codec, [THREE], max_turns=2)
    assert (len(cut.searches), cut.answer) == (2, "unknown")
    (whole,) = perfect(codec, [THREE], max_turns=3)
    assert whole.answer == "franc"


def test_a_query_that_finds_several_hops_at_once_saves_searches(codec):
    text = THREE.text.rstrip("?")
    retriever = Titles(also={text: ["Brikama", "Gambia", "Money of Senegal"]})
    assert queries(perfect(codec, [THREE], retriever)[0]) == [text]
    assert len(queries(perfect(codec, [THREE], retriever, k=1)[0])) == 3


def test_no_query_names_what_was_not_read_yet(codec):
    # Nothing finds the first passage, so nobody knows of Gambia.
    retriever = Titles(also={"Brikama": []})
    (episode,) = perfect(codec, [THREE], retriever)
    assert (queries(episode), episode.answer) == ([], "unknown")


def test_a_query_for_what_is_wanted_counts_where_a_title_finds_something_else(codec):
    capital = question("Senegal", answer="Dakar", kind="country_capital")
    capital.metadata["chain"][:] = ["Senegal", "Dakar"]
    misled = {"Senegal": ["Money of Senegal"]}
    assert perfect(codec, [capital], Titles(also=misled))[0].answer == "unknown"
    (episode,) = perfect(codec, [capital], Titles(also=misled | {"capital of Senegal": ["Senegal"]}))
    assert (queries(episode), episode.answer) == (["capital of Senegal"], "Dakar")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("country_capital", ["capital of Brikama"]),
        ("province_code", ["ISO code of Brikama"]),
        ("country_calling_code", ["calling code of Brikama"]),
        ("city_country", []),
        ("city_language", ["main language of Gambia"]),
        ("city_province_code", ["ISO code of Gambia"]),
        ("neighbour_tld", ["land neighbour of Brikama", "internet domain of Gambia"]),
        ("city_neighbour", ["land neighbour of Gambia"]),
        ("city_neighbour_capital", ["land neighbour of Gambia", "capital of Senegal"]),
        ("province_neighbour_currency", ["land neighbour of Gambia", "currency of Senegal"]),
    ],
)
def test_what_is_wanted_of_a_place_follows_from_the_kind_of_a_question(kind, wanted):
    hops = 1 + sum(part in kind for part in ("neighbour", "city_l", "city_p", "city_n", "province_n"))
    if kind == "city_neighbour":
        hops = 2
    asked = [query.text for query in queries_of(question(*list(PLACES)[:hops], answer="x", kind=kind))]
    titles = list(PLACES)[:hops]
    assert [text for text in asked[:-1] if text not in titles] == wanted


def test_a_question_without_kind_and_chain_is_searched_for_by_itself_and_by_titles():
    metadata = {"supporting_titles": ["Elbe", "Cuxhaven"], "gold_passage_ids": ["1", "2"]}
    asked = queries_of(Question("q", "where does it end?", ("x",), metadata=metadata))
    assert [(query.text, query.hop) for query in asked] == [("Elbe", 0), ("Cuxhaven", 1), ("where does it end", 0)]


def test_an_answer_that_is_read_by_luck_in_another_passage_does_not_count(codec):
    misled = Titles(also={"Gambia": ["Senegal"], "capital of Gambia": ["Senegal"]})
    asked = question("Brikama", "Gambia", answer="Dakar", kind="city_capital")
    assert perfect(codec, [asked], misled)[0].answer == "unknown"


def test_an_answer_that_the_question_itself_finds_counts_without_the_passages_before(codec):
    retriever = Titles(also={THREE.text.rstrip("?"): ["Money of Senegal"], "Gambia": []})
    (episode,) = perfect(codec, [THREE], retriever)
    assert (queries(episode), episode.answer) == ([THREE.text.rstrip("?")], "franc")


def test_longer_sequences_are_played_where_the_shortest_is_cut_off(codec):
    text = "Which " + "very " * 60 + "large city is it?"
    asked = question("Brikama", "Gambia", answer="Banjul", kind="city_capital", text=text)
    retriever = Titles(also={text.rstrip("?"): ["Gambia"]})
    room = {"max_episode_tokens": 4000}
    assert queries(perfect(codec, [asked], retriever, max_turn_tokens=1000, **room)[0]) == [text.rstrip("?")]
    assert queries(perfect(codec, [asked], retriever, max_turn_tokens=60, **room)[0]) == ["Brikama", "Gambia"]


def test_a_yes_counts_as_read_where_the_last_gold_passage_is(codec):
    asked = question("Brikama", "Gambia", answer="yes", kind="comparison")
    assert perfect(codec, [asked])[0].answer == "yes"
    assert perfect(codec, [asked], Titles(also={"Gambia": []}))[0].answer == "unknown"


def test_an_answer_that_the_observation_limit_cuts_off_is_not_read(codec):
    contents = passage("Gambia", "Gambia " + "and so on " * 200 + "Banjul")
    asked = question("Gambia", answer="Banjul", kind="x")

    class Long:
        async def search(self, queries, k):
            return [[Hit("id-Gambia", contents, 1.0)] for _ in queries]

    room = {"max_episode_tokens": 8000}
    assert perfect(codec, [asked], Long(), max_observation_tokens=64, **room)[0].answer == "unknown"
    assert perfect(codec, [asked], Long(), max_observation_tokens=4000, **room)[0].answer == "Banjul"


def test_episodes_come_in_the_order_of_their_questions_and_are_scored_by_set(codec):
    asked = [THREE, question("Nowhere", answer="x"), question("Senegal", answer="Dakar", kind="country_capital")]
    done = []
    episodes = perfect(codec, asked, on_done=done.append)
    assert [episode.question for episode in episodes] == asked
    assert done == [1, 2, 3]
    (result,) = evaluation_of(asked, episodes).sets
    assert (result.dataset, result.n, result.em) == ("set", 3, pytest.approx(2 / 3))
    assert all(exact_match(e.answer, e.question.golden_answers) == (e.answer != "unknown") for e in episodes)


def test_a_retriever_that_fails_leaves_a_question_without_a_score(codec):
    (episode,) = perfect(codec, [THREE], Titles(error=RetrieverError("gone")))
    assert (episode.valid, episode.cause) == (False, FailureCause.RETRIEVER)


def test_a_protocol_with_other_calls_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = Config.model_validate(
        {
            "name": "x",
            "model": {"path": str(tmp_path)},
            "retriever": {"index": "none"},
            "agent": {"protocol": "json_tools"},
        }
    )
    with pytest.raises(ConfigError, match=r"evaluation\.ceiling.*json_tools does not read"):
        measure_ceiling(config, [], [THREE])


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({}, r"set\.jsonl: question set:1 has no list metadata\.supporting_titles"),
        ({"supporting_titles": ["a"]}, r"set\.jsonl: question set:1 has no list metadata\.gold_passage_ids"),
        ({"supporting_titles": ["a"], "gold_passage_ids": []}, r"no list metadata\.gold_passage_ids"),
        ({"supporting_titles": ["a"], "gold_passage_ids": ["1", "2"]}, r"1 metadata\.supporting_titles and 2 metadata"),
    ],
)
def test_questions_without_gold_passages_are_refused_by_file_and_key(tmp_path, metadata, problem):
    file = tmp_path / "set.jsonl"
    row = {"id": "1", "question": "who?", "golden_answers": ["x"], "metadata": metadata}
    file.write_text(json.dumps(row) + "\n")
    data = DataConfig(root=str(tmp_path), eval=[QuestionSet(path="set.jsonl", name="set")])
    with pytest.raises(DataError, match=problem):
        evaluation_questions(data, with_gold=True)
    assert len(evaluation_questions(data)) == 1


def test_a_recording_and_a_ceiling_exclude_each_other():
    sections = {"name": "x", "model": {"path": "m"}, "retriever": {"replay": "r.jsonl", "index": "i"}}
    with pytest.raises(ValueError, match=r"evaluation\.ceiling searches for queries of its own"):
        Config.model_validate(sections | {"evaluation": {"ceiling": True}})
