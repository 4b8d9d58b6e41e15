"""Train the byte-level BPE in tokenizer/ again.

    python examples/data/prepare.py --output runs/quickstart/corpus
    python examples/data/train_tokenizer.py --input runs/quickstart/corpus.jsonl --output DIR

4096 entries, the first of them <|endoftext|>, learned from the whole corpus.
"""

import argparse
import json
import os
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
NUM_ENTRIES = 4096


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="JSONL with a `text` in each line")
    parser.add_argument("--output", required=True, help="folder for the tokenizer")
    args = parser.parse_args()
    train(args.input, args.output)


def train(corpus: str, folder: str) -> None:
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer reads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_ENTRIES,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus), trainer)
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as stream:
        stream.write(json.dumps(config, indent=2) + "\n")


def _texts(corpus: str) -> Iterator[str]:
    with open(corpus, encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)["text"]


if __name__ == "__main__":
    main()
