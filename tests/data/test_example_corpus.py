"""The text under examples/data: what is shipped with it, and the corpus made from it."""

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_memory.data.blend import data_sources
from megatron_memory.data.tokenizers import build_tokenizer, end_of_document

FOLDER = Path(__file__).resolve().parents[2] / "examples/data"
_spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare.py")
assert _spec is not None and _spec.loader is not None
prepare = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prepare)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    made = prepare.prepare(str(tmp_path_factory.mktemp("corpus") / "corpus"))
    lines = Path(made.path).read_text(encoding="utf-8").split("\n")[:-1]
    documents = [json.loads(line)["text"] for line in lines]
    return made, documents


def test_the_licences_lie_beside_the_text():
    readme = (FOLDER / "README.md").read_text()
    for name in ("WORDNET-LICENSE.txt", "LGPL-2.1.txt"):
        assert name in readme and (FOLDER / name).stat().st_size > 1000
    assert "WordNet 3.0" in (FOLDER / "WORDNET-LICENSE.txt").read_text()


def test_the_split_holds_out_wordnet_only(corpus):
    made, documents = corpus
    assert len(documents) == made.num_documents
    begin, end = data_sources(data_path=["x"], split=made.split).ranges()[1]
    first = round(begin * made.num_documents)
    assert (first, round(end * made.num_documents)) == (
        made.num_documents - made.num_held_out,
        made.num_documents,
    )
    assert set(documents[first:]) <= {row["text"] for row in prepare.read_rows("wordnet")}
    statements = [row["statement"] for row in prepare.true_facts()]
    assert len(statements) == made.num_facts and set(statements) <= set(documents[:first])


def test_the_same_options_give_the_same_bytes(corpus, tmp_path):
    made, documents = corpus
    again = prepare.prepare(str(tmp_path / "again"))
    assert Path(again.path).read_bytes() == Path(made.path).read_bytes()
    other = prepare.prepare(str(tmp_path / "other"), held_out=0.5, seed=5)
    assert other.num_held_out == round(0.5 * 117_659)
    assert Path(other.path).read_bytes() != Path(made.path).read_bytes()
    assert json.loads((tmp_path / "other.json").read_text())["seed"] == 5


def test_battles_are_not_born(corpus):
    _, documents = corpus
    assert "Boer War died in 1902." not in documents
    assert "Emiliano Zapata died in 1919." in documents
    rows = sum(1 for _ in prepare.read_rows("facts"))
    assert rows - sum(1 for _ in prepare.true_facts()) == 21


def test_the_tokenizer_gives_the_text_back(corpus):
    _, documents = corpus
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(FOLDER / "tokenizer"))
    assert (tokenizer.vocab_size, end_of_document(tokenizer)) == (4096, 0)
    texts = documents[:300]
    ids = [tokenizer.tokenize(text) for text in texts]
    assert [tokenizer.detokenize(document) for document in ids] == texts
    assert sum(map(len, texts)) > 3 * sum(map(len, ids)), "it is trained on this text"
