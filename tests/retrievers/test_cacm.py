"""Anserini's own numbers for the CACM collection, as its `cacm.yaml` states them, from this project's index."""

import json
import multiprocessing
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import lucene_process
import pytest
from real_data import real_data

from retrievers.backends import build_index

pytestmark = pytest.mark.slow


class Text(HTMLParser):
    """What a page says, without its markup: all that Anserini's generator indexes of it."""

    def __init__(self, page):
        super().__init__()
        self.pieces = []
        self.feed(page)
        self.close()

    def handle_data(self, data):
        self.pieces.append(data)

    def __str__(self):
        return "".join(self.pieces).strip()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cacm")
    with tarfile.open(real_data("ir/cacm/cacm.tar.gz")) as pages, (folder / "cacm.jsonl").open("w") as corpus:
        for page in pages:
            html = pages.extractfile(page).read().decode("utf-8", "replace")
            record = {"id": Path(page.name).stem, "contents": str(Text(html))}
            corpus.write(json.dumps(record) + "\n")
    assert build_index(folder / "cacm.jsonl", folder / "index").documents == 3204
    return str(folder / "index")


@pytest.fixture(scope="module")
def run(index):
    """Answers all topics with some options: hits by topic."""
    topics = {}
    for block in re.findall(r"<DOC>(.*?)</DOC>", real_data("ir/cacm/topics.cacm.txt").read_text(), re.DOTALL):
        name, text = re.fullmatch(r"\s*<DOCNO>\s*(\d+)\s*</DOCNO>(.*)", block, re.DOTALL).groups()
        topics[name] = text
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as java:

        def answer(options):
            calls = [(list(topics.values()), 1000)]
            rows = java.submit(lucene_process.search_in_turn, index, calls, options).result(timeout=300)[0]
            return dict(zip(topics, rows, strict=True))

        yield answer


@pytest.mark.parametrize(
    ("options", "mean_average_precision", "precision_at_30"),
    [
        ({}, 0.3123, 0.1942),
        ({"rm3": True}, 0.3648, 0.2224),
        ({"scoring": "qld"}, 0.3265, 0.1942),
        ({"scoring": "qld", "rm3": True}, 0.3629, 0.2250),
    ],
    ids=["bm25", "bm25+rm3", "ql", "ql+rm3"],
)
def test_average_precision_and_precision_at_30_are_anserinis(run, options, mean_average_precision, precision_at_30):
    trec = pytest.importorskip("pytrec_eval")
    with real_data("ir/cacm/qrels.cacm.txt").open() as file:
        evaluator = trec.RelevanceEvaluator(trec.parse_qrel(file), {"map", "P_30"})
    found = {topic: {hit.id: hit.score for hit in hits} for topic, hits in run(options).items()}
    scores = evaluator.evaluate(found)
    assert len(scores) == 52
    assert round(sum(score["map"] for score in scores.values()) / 52, 4) == mean_average_precision
    assert round(sum(score["P_30"] for score in scores.values()) / 52, 4) == precision_at_30


def test_bm25_ranks_and_scores_as_anserinis_own_run(run):
    expected = {}
    for line in real_data("ir/cacm/cacm-bm25.run.txt").read_text().splitlines():
        topic, _, name, _, score, _ = line.split()
        expected.setdefault(topic, []).append((name, float(score)))
    found = run({})
    for topic, ranking in expected.items():
        hits = found[topic][: len(ranking)]
        assert [hit.id for hit in hits] == [name for name, _ in ranking]
        assert [hit.score for hit in hits] == pytest.approx([score for _, score in ranking], abs=2e-3)
