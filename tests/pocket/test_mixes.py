"""Each mix rewards what it says: scripts show what searches bring, and the packaged policy begins on the wrong side."""

import asyncio
import json
import re
from collections import defaultdict
from statistics import mean

import pytest
from transformers import AutoTokenizer

from agentrl.agent.codec import Codec
from agentrl.agent.scripted import ScriptPlayer
from agentrl.config import load_config
from agentrl.config.paths import packaged
from agentrl.data.errors import DataError
from agentrl.data.questions import read_questions, validate_questions
from agentrl.demo.passages import CURRENCY_WORDINGS
from agentrl.pocket.mixes import write_mix
from agentrl.rewards import exact_match
from agentrl.rollout.local import local_config, local_pool
from retrievers.backends import build_index, open_index

MIXES = ("practise", "distract")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder as `data.root` with the mixes in it, without indexes."""
    folder = tmp_path_factory.mktemp("mixes")
    for mix in MIXES:
        write_mix(mix, folder / mix)
    return folder


def passages(root, mix):
    rows = [json.loads(line) for line in (root / mix / "corpus.jsonl").read_text("utf-8").splitlines()]
    return {row["id"]: row["contents"] for row in rows}


def currency_in(text):
    """The currency that a text states last, None where it states none."""
    patterns = [re.escape(form).replace(r"\{currency\}", "(.+?)") for form in CURRENCY_WORDINGS]
    patterns = [form.replace(r"\{c\}", ".+?").replace(r"\{code\}", "[A-Z]{3}") for form in patterns]
    found = [match for form in patterns for match in re.finditer(form, text)]
    return max(found, key=lambda match: match.start())[1] if found else None


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_a_seed_makes_one_mix_and_no_file_is_overwritten(tmp_path, root, mix):
    again, other = tmp_path / "again", tmp_path / "other"
    write_mix(mix, again)
    write_mix(mix, other, seed=1)
    for path in sorted((root / mix).iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert (again / "dev.jsonl").read_bytes() != (other / "dev.jsonl").read_bytes()
    with pytest.raises(DataError, match="not an empty folder"):
        write_mix(mix, again)


@pytest.mark.parametrize("mix", MIXES)
def test_no_country_is_in_both_question_files(root, mix):
    files = {split: root / mix / f"{split}.jsonl" for split in ("train", "dev")}
    for file in files.values():
        assert validate_questions(file) == []
    train, dev = ({q.metadata["chain"][1] for q in read_questions(file)} for file in files.values())
    assert not train & dev
    assert len(read_questions(files["dev"])) == 240
    assert len(read_questions(files["train"])) > 600


@pytest.mark.parametrize("mix", MIXES)
def test_every_word_that_the_policy_copies_is_one_piece(root, mix):
    tokenizer = AutoTokenizer.from_pretrained(packaged("pocket_policy"))
    of, *rest = tokenizer(
        ["of", *(f"of {q.golden_answers[0]}" for q in read_questions(root / mix / "dev.jsonl"))],
        add_special_tokens=False,
    )["input_ids"]
    assert {len(ids) - len(of) for ids in rest} == {1}


def test_practise_first_pages_are_right_for_seven_in_ten_and_the_register_for_all(root):
    corpus = passages(root, "practise")
    for split in ("train", "dev"):
        questions = read_questions(root / "practise" / f"{split}.jsonl")
        first, second = (
            [currency_in(corpus[q.metadata["gold_passage_ids"][hop]]) == q.golden_answers[0] for q in questions]
            for hop in (0, 1)
        )
        assert mean(first) == pytest.approx(0.7, abs=0.002)
        assert all(second)


def test_distract_half_of_the_questions_state_the_answer_and_the_first_pages_of_the_others_do(root):
    corpus = passages(root, "distract")
    for split in ("train", "dev"):
        questions = read_questions(root / "distract" / f"{split}.jsonl")
        stated = [q for q in questions if q.metadata["hops"] == 0]
        assert len(stated) == pytest.approx(len(questions) / 2, abs=1)
        assert all(currency_in(q.text) == q.golden_answers[0] for q in stated)
        for question in questions:
            if question.metadata["hops"] == 1:
                (gold,) = question.metadata["gold_passage_ids"]
                assert currency_in(corpus[gold]) == question.golden_answers[0]


class Searched:
    """A mix with its index: what scripts and the packaged policy earn in it."""

    def __init__(self, root, mix):
        folder = root / mix
        build_index(folder / "corpus.jsonl", folder / "index")
        self.config = load_config(f"pocket_{mix}.yaml", [f"data.root={root}", "engine.max_concurrent=64"])
        self.questions = read_questions(folder / "dev.jsonl")

    def scripted(self, *queries):
        """The share of questions that are answered by the currency that the last page (without searches, the question) states."""
        retriever = open_index(self.config.data.resolve_index(self.config.retriever.index))
        try:
            codec = Codec(AutoTokenizer.from_pretrained(packaged("pocket_policy")))
            player = ScriptPlayer(self.config.agent, codec, retriever, self.config.retriever.k)
            return mean(asyncio.run(self._all(player, queries)))
        finally:
            retriever.close()

    async def _all(self, player, queries):
        return [await self._one(player, question, queries) for question in self.questions]

    async def _one(self, player, question, queries):
        city, country = question.metadata["chain"]
        searches = [f"<search> {query.format(city=city, country=country)} </search>" for query in queries]
        seen = await player.play(question, searches)
        text = seen.turns[len(searches) - 1].observation if searches else question.text
        answer = currency_in(text) or "unknown"
        return exact_match(await player.play(question, [*searches, f"<answer> {answer} </answer>"]))

    def sampled(self, questions, samples, temperature=1.0):
        """The rewards of the packaged policy by the number of searches."""
        requests = [(q, [f"{q.id}/{sample}" for sample in range(samples)]) for q in self.questions[:questions]]
        with local_pool(local_config(self.config)) as pool:
            groups = pool.sample(requests, temperature)
        rewards = defaultdict(list)
        for episode in (episode for group in groups for episode in group):
            rewards[len(episode.searches)].append(episode.reward)
        return rewards


@pytest.fixture(scope="module")
def practise(root):
    return Searched(root, "practise")


@pytest.fixture(scope="module")
def distract(root):
    return Searched(root, "distract")


@pytest.mark.slow
def test_practise_two_searches_pay_where_the_second_is_for_the_register_and_not_where_it_is_for_the_page_on_money(
    practise,
):
    assert practise.scripted() == 0
    assert practise.scripted("{city}") == pytest.approx(0.7, abs=0.02)
    assert practise.scripted("{city}", "currency of {country}") > 0.98
    assert practise.scripted("{city}", "Money and language in {country}") < 0.02


@pytest.mark.slow
def test_practise_the_policy_begins_with_a_second_search_that_earns_less_than_the_first(practise):
    rewards = practise.sampled(60, 4)
    assert len(rewards[2]) > 20
    # What one search earns with practice is far above what two do without.
    assert mean(rewards[2]) < mean(rewards[1]) < 0.5


@pytest.mark.slow
def test_distract_each_search_beyond_the_first_misleads(distract):
    assert distract.scripted() == pytest.approx(0.5, abs=0.01)
    assert distract.scripted("{city}") == pytest.approx(0.5, abs=0.02)
    for query in ("currency of {country}", "Money and language in {country}", "{country}"):
        assert distract.scripted("{city}", query) < 0.02


@pytest.mark.slow
def test_distract_the_policy_begins_with_more_searches_than_are_needed_and_earns_least_where_it_searches_most(distract):
    rewards = distract.sampled(60, 4)
    searches = mean(number for number, earned in rewards.items() for _ in earned)
    assert searches > 0.5
    twice = [reward for number, earned in rewards.items() for reward in earned if number > 1]
    once = [reward for number, earned in rewards.items() for reward in earned if number <= 1]
    assert len(twice) > 15
    assert mean(twice) < 0.6 * mean(once)
