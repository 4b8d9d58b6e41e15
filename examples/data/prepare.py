"""Write one training corpus from WordNet and the facts.

    python examples/data/prepare.py --output runs/quickstart/corpus

makes OUTPUT.jsonl, one document a line, and OUTPUT.json, which says how it was made and which
--split holds its last documents out. Held out are WordNet documents only: a fact that is not in the
training text cannot be known. The same options always give the same bytes.
"""

import argparse
import dataclasses
import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
_YEAR_RELATIONS = ("birth_year", "death_year")
# Where WordNet 3.0 keeps its people. Some years in the facts are those of battles and wars, whose
# glosses end in years too, but which nobody would call born.
_PEOPLE = range(9_604_981, 11_409_000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """What a corpus file holds."""

    path: str
    num_documents: int
    num_facts: int
    num_held_out: int
    split: str
    """For --split: trains on everything but the documents held out, which validate."""
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="path of both files without suffix")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of WordNet held out")
    parser.add_argument("--seed", type=int, default=1234, help="of the shuffling")
    args = parser.parse_args()
    corpus = prepare(args.output, held_out=args.held_out, seed=args.seed)
    print(json.dumps(dataclasses.asdict(corpus), indent=2))


def prepare(output: str, *, held_out: float = 0.02, seed: int = 1234) -> Corpus:
    """Write `output`.jsonl and `output`.json.

    Args:
        output: path of both files without suffix; its folder is made.
        held_out: share of the WordNet documents that validate, from 0 to below 1.
        seed: of the shuffling.
    """
    if not 0 <= held_out < 1:
        raise SystemExit(f"--held-out {held_out}: must be at least 0 and below 1")
    shuffle = random.Random(seed).shuffle
    wordnet = [row["text"] for row in read_rows("wordnet")]
    shuffle(wordnet)
    num_held_out = round(held_out * len(wordnet))
    first_held_out = len(wordnet) - num_held_out
    facts = [row["statement"] for row in true_facts()]
    training = wordnet[:first_held_out] + facts
    shuffle(training)
    documents = training + wordnet[first_held_out:]
    corpus = Corpus(
        path=f"{output}.jsonl",
        num_documents=len(documents),
        num_facts=len(facts),
        num_held_out=num_held_out,
        split=f"{len(training)},{num_held_out},0",
        seed=seed,
    )
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    _write(corpus.path, "".join(line + "\n" for line in lines))
    _write(f"{output}.json", json.dumps(dataclasses.asdict(corpus), indent=2) + "\n")
    return corpus


def read_rows(name: str) -> Iterator[dict]:
    """Rows of `wordnet` or `facts`, as README.md describes them."""
    with gzip.open(_FOLDER / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def true_facts() -> Iterator[dict]:
    """The facts without years of birth or death of what is not a person."""
    for row in read_rows("facts"):
        if row["relation"] in _YEAR_RELATIONS:
            synset = int(row["id"].rpartition(":n")[2])
            if synset not in _PEOPLE:
                continue
        yield row


def _write(path: str, text: str) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
