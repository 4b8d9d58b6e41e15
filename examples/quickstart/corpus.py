"""The quickstart's text: WordNet to learn the language from, and a few hundred facts to be asked
about."""

import json
import random
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
TOKENIZER = EXAMPLES / "data" / "tokenizer"
ASKED_RELATIONS = ("country_alpha3", "currency_code")
_NUM_HELD_OUT = 2000
_SEED = 1234

sys.path.insert(0, str(EXAMPLES / "data"))

from prepare import read_rows, true_facts  # noqa: E402


def asked_facts() -> list[dict]:
    """The facts that the quickstart trains on and asks about, shuffled."""
    facts = [row for row in true_facts() if row["relation"] in ASKED_RELATIONS]
    random.Random(_SEED).shuffle(facts)
    return facts


def prepare_corpus(folder: Path) -> dict[str, Path]:
    """Tokenise training text, held-out text and facts; returns their prefixes for --data-path.

    What is there from an earlier run is taken as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _tokenise(name, texts, folder) for name, texts in _texts().items()}


def _texts() -> dict[str, list[str]]:
    wordnet = [row["text"] for row in read_rows("wordnet")]
    random.Random(_SEED).shuffle(wordnet)
    return {
        "train": wordnet[_NUM_HELD_OUT:],
        "held_out": wordnet[:_NUM_HELD_OUT],
        "facts": [fact["statement"] for fact in asked_facts()],
    }


def _tokenise(name: str, texts: list[str], folder: Path) -> Path:
    prefix = folder / f"{name}_text_document"
    if prefix.with_suffix(".idx").exists():
        return prefix
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tool = EXAMPLES.parent / "tools" / "preprocess_data.py"
    options = {
        "--input": source,
        "--output-prefix": folder / name,
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--tokenizer-model": TOKENIZER,
        "--workers": 2,
        "--log-interval": 30_000,
    }
    flags = [str(item) for pair in options.items() for item in pair]
    subprocess.run([sys.executable, str(tool), *flags, "--append-eod"], check=True)
    return prefix
