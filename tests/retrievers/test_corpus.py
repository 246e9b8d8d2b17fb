import bz2
import gzip
import hashlib
import json
import lzma
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrievers.base import Hit, RetrieverError
from retrievers.index import corpus as corpus_module
from retrievers.index.corpus import CorpusReader, Passage

GOOD = b'{"id": "a", "contents": "\\"Ada\\"\\nShe wrote programs."}\n'


def read(tmp_path, content):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)
    reader = CorpusReader(path)
    return reader, list(reader)


def test_a_corpus_is_read_in_order_with_its_hash_and_count(tmp_path):
    content = GOOD + b'{"id": "b", "contents": "no title", "extra": 1}'
    reader, passages = read(tmp_path, content)
    assert [passage.id for passage in passages] == ["a", "b"]
    assert passages[0].contents == '"Ada"\nShe wrote programs.'
    assert reader.count == 2
    assert reader.sha256 == hashlib.sha256(content).hexdigest()


def test_reading_twice_gives_the_same(tmp_path):
    reader, passages = read(tmp_path, GOOD)
    digest = reader.sha256
    assert list(reader) == passages
    assert reader.sha256 == digest
    assert reader.count == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "b", "contents": "\xff"}', "not UTF-8"),
        (b"not json", "not JSON"),
        (b'{"id": "b", "contents": "x"} {"id": "c", "contents": "y"}', "not JSON"),
        (b'{"id": "b", "contents": "x", "n": NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"id": "b", "contents": "cut o', "not JSON"),
        (b'["b", "x"]', "not a JSON object"),
        (b'{"contents": "x"}', "'id' is missing"),
        (b'{"id": 7.0, "contents": "x"}', "'id' is a float"),
        (b'{"id": true, "contents": "x"}', "'id' is a bool"),
        (b'{"docid": "", "contents": "x"}', "'docid' is empty"),
        (b'{"id": "", "contents": "x"}', "'id' is empty"),
        (b'{"id": "b", "title": "x"}', "'contents' is missing; write contents, or title and text"),
        (b'{"id": "b", "title": 7, "text": "x"}', "'title' is a int"),
        (b'{"id": "b", "title": "x", "text": ""}', "'text' is empty"),
        (b'{"id": "b", "contents": null}', "'contents' is a NoneType"),
        (b'{"id": "b", "contents": " \\u0000\\u3000"}', "'contents' is empty"),
        (b'{"id": "b", "contents": "\\ud800"}', "surrogate"),
        (b'{"id": "a", "contents": "again"}', "stands on line 1"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path, line, reason):
    with pytest.raises(RetrieverError) as raised:
        read(tmp_path, GOOD + line + b"\n")
    assert f"{tmp_path / 'corpus.jsonl'}:2: " in str(raised.value)
    assert reason in str(raised.value)


RIVER = b'{"id": "0", "contents": "\\"River Tay\\"\\nThe Tay."}\n'


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + RIVER,
        RIVER + b"\n",
        b"\n" + RIVER + b" \r\n\n",
        b'{"docid": "0", "contents": "\\"River Tay\\"\\nThe Tay."}',
        b'{"id": 0, "contents": "\\"River Tay\\"\\nThe Tay."}',
        b'{"id": "0", "title": "River Tay", "text": "The Tay."}',
        b'{"_id": "0", "title": " River\\nTay", "text": "The Tay."}',
        gzip.compress(RIVER),
        bz2.compress(RIVER),
        lzma.compress(RIVER),
        b"[" + RIVER.strip() + b"]",
        b'\xef\xbb\xbf\n[\n  {\n    "_id": 0, "title": "River Tay",\n    "text": "The Tay."\n  }\n]\n',
        gzip.compress(b" [" + RIVER + b"]\n\n"),
        gzip.compress(b'\xef\xbb\xbf{"_id": 0, "title": "River Tay", "text": "The Tay."}\n\n'),
    ],
)
def test_a_common_variant_of_the_format_is_read_to_the_same_passage(tmp_path, content):
    reader, passages = read(tmp_path, content)
    assert passages == [Passage("0", '"River Tay"\nThe Tay.')]
    assert not reader.plain
    assert read(tmp_path, RIVER)[0].plain


PASSAGES = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=6)


@given(texts=PASSAGES, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), chunk=st.integers(1, 40))
def test_an_array_is_read_as_the_same_objects_on_lines_wherever_it_is_split(texts, indent, ascii_only, chunk):
    objects = [
        {"id": number, "contents": f'"[{text}"\n{text}\\', "more": [{}, [text], "]"]}
        for number, text in enumerate(texts)
    ]
    lines = "\n".join(map(json.dumps, objects)).encode()
    array = json.dumps(objects, indent=indent, ensure_ascii=ascii_only).encode()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "_CHUNK_BYTES", chunk)
        reader, passages = read(Path(folder), array)
        assert passages == read(Path(folder), lines)[1]
    assert (reader.count, reader.sha256) == (len(texts), hashlib.sha256(array).hexdigest())


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        (b"7", "element 2: not a JSON object"),
        (b'["b", "x"]', "element 2: not a JSON object"),
        (b"", "element 2: not JSON"),
        (b'{"id": "b", "contents": "\xff"}', "element 2: not UTF-8"),
        (b'{"id": "b", "contents": "x"}}', "element 2: not JSON"),
        (b'{"id": "b", "contents": "x"} {"id": "c", "contents": "y"}', "element 2: not JSON"),
        (b'{"id": "b"}, 7', "element 2: 'contents' is missing"),
        (
            b'{"id": "b", "contents": "x"}, {"id": "a", "contents": "x"}',
            "element 3: id 'a' stands in element 1 already",
        ),
        (b'{"id": "b", "contents": "x"', "element 2: the file ends here and its array does not"),
        (b'{"id": "b", "contents": "x}', "element 2: the file ends here and its array does not"),
    ],
)
def test_a_bad_element_of_an_array_is_named_by_its_position(tmp_path, elements, reason):
    with pytest.raises(RetrieverError, match=rf"corpus\.jsonl: {reason}"):
        read(tmp_path, b"[" + GOOD + b", " + elements + b"]")


@pytest.mark.parametrize(("after", "element"), [(b", ", 2), (b"", 1)])
def test_an_array_that_does_not_end_is_refused(tmp_path, after, element):
    with pytest.raises(RetrieverError, match=f"element {element}: the file ends here"):
        read(tmp_path, b"[" + GOOD + after)


def test_what_follows_an_array_is_not_dropped(tmp_path):
    with pytest.raises(RetrieverError, match="something follows the array, which ends with element 1"):
        read(tmp_path, b"[" + GOOD + b"]" + b" " * (2 << 20) + b"[" + GOOD + b"]")


def test_an_empty_array_is_an_empty_corpus(tmp_path):
    with pytest.raises(RetrieverError, match="is empty"):
        read(tmp_path, b"[ ]")


def test_a_text_without_a_title_has_an_empty_one(tmp_path):
    for title in (b"", b'"title": null, ', b'"title": "", '):
        (passage,) = read(tmp_path, b'{"id": "0", ' + title + b'"text": "First line.\\nSecond."}')[1]
        assert passage.contents == '""\nFirst line.\nSecond.'


def test_a_packed_file_has_the_hash_of_what_is_in_it(tmp_path):
    assert read(tmp_path, gzip.compress(RIVER))[0].sha256 == read(tmp_path, RIVER)[0].sha256


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RIVER.decode().encode("utf-16"), "is UTF-16; convert the file to UTF-8"),
        (b"PAR1\x15\x04", "is a Parquet file"),
        (b"PK\x03\x04\x14\x00", "is a zip archive"),
        (b"\x28\xb5\x2f\xfd\x04", "is packed with zstd; unpack it"),
        (gzip.compress(RIVER)[:-8], "cannot be read .*; the file is damaged or not whole"),
        (b"\x1f\x8bnot gzip", "cannot be unpacked .*; the file is damaged"),
        (b"id\ttext\ttitle\n1\tx\ty\n", r":1: not JSON"),
    ],
)
def test_a_file_of_another_form_is_called_by_its_name(tmp_path, content, reason):
    with pytest.raises(RetrieverError, match=rf"corpus\.jsonl.*{reason}"):
        read(tmp_path, content)


def test_a_missing_file_and_an_empty_one_are_errors(tmp_path):
    with pytest.raises(RetrieverError, match="not a file"):
        list(CorpusReader(tmp_path / "nothing.jsonl"))
    with pytest.raises(RetrieverError, match="empty"):
        read(tmp_path, b"")


@pytest.mark.parametrize(
    ("begin", "place"), [(GOOD, "2"), (b"[" + GOOD + b",", " element 2"), (b'[{"id": "a', " element 1")]
)
def test_an_entry_without_end_is_refused_before_it_fills_the_memory(tmp_path, begin, place):
    path = tmp_path / "corpus.jsonl"
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(100 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(RetrieverError, match=rf"corpus\.jsonl:{place}: longer than 16777216 bytes"):
            list(CorpusReader(path))
        assert tracemalloc.get_traced_memory()[1] < 4 * corpus_module.MAX_LINE_BYTES
    finally:
        tracemalloc.stop()


def test_a_long_array_is_never_in_memory_whole(tmp_path):
    path = tmp_path / "corpus.json"
    text = "x" * 100_000
    with path.open("w") as file:
        file.write("[")
        file.writelines(f'{"," * (number > 0)}{{"id": {number}, "contents": "{text}"}}' for number in range(1000))
        file.write("]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in CorpusReader(path)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_an_entry_of_exactly_the_bound_is_read_and_one_byte_more_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_LINE_BYTES", len(GOOD))
    assert read(tmp_path, GOOD)[0].count == 1
    assert read(tmp_path, b"[" + GOOD + b"]")[0].count == 1
    with pytest.raises(RetrieverError, match=":1: longer"):
        read(tmp_path, b" " + GOOD)
    with pytest.raises(RetrieverError, match="element 1: longer"):
        read(tmp_path, b"[ " + GOOD + b"]")


def test_a_hit_splits_title_and_text():
    contents = json.loads(GOOD)["contents"]
    assert (Hit("a", contents, 1.0).title, Hit("a", contents, 1.0).text) == ("Ada", "She wrote programs.")
    assert (Hit("b", "no title", 1.0).title, Hit("b", "no title", 1.0).text) == ("", "no title")
