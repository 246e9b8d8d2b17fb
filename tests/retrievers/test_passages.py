import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrievers.base import RetrieverError
from retrievers.index import passages as passages_module
from retrievers.index.corpus import Passage
from retrievers.index.passages import PassageStore, write_passages

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.dictionaries(TEXTS, TEXTS, min_size=1, max_size=20), TEXTS)
def test_every_passage_is_found_by_row_and_by_id_letter_for_letter(tmp_path_factory, contents, other):
    folder = tmp_path_factory.mktemp("store")
    passages = [Passage(name, text) for name, text in contents.items()]
    assert write_passages(folder, iter(passages)) == len(passages)
    store = PassageStore(folder)
    assert [store[row] for row in range(len(store))] == passages
    assert [store.find(passage.id) for passage in passages] == passages
    assert store.find(other) == (Passage(other, contents[other]) if other in contents else None)
    assert store.find("\ud800") is None
    store.close()


def test_ids_of_equal_digest_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(passages_module, "_digest", lambda name: 7)
    passages = [Passage(name, name * 2) for name in "abc"]
    write_passages(tmp_path, passages)
    store = PassageStore(tmp_path)
    assert [store.find(name) for name in "abc"] == passages
    assert store.find("d") is None


def test_a_store_whose_files_do_not_fit_is_refused(tmp_path):
    write_passages(tmp_path, [Passage("a", "x"), Passage("b", "y")])
    with (tmp_path / "passages.jsonl").open("ab") as file:
        file.write(b"more")
    with pytest.raises(RetrieverError, match="do not fit"):
        PassageStore(tmp_path)
    np.save(tmp_path / "offsets.npy", np.zeros(1, np.int64))
    with pytest.raises(RetrieverError, match="do not fit"):
        PassageStore(tmp_path)
    (tmp_path / "offsets.npy").write_bytes(b"no array")
    with pytest.raises(RetrieverError, match="cannot be opened"):
        PassageStore(tmp_path)
    (tmp_path / "ids.npy").unlink()
    with pytest.raises(RetrieverError, match="cannot be opened"):
        PassageStore(tmp_path)
