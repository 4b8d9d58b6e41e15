#!/usr/bin/env bash
# Guess: NullTokenizer with a vocabulary of N has the same ids in every megatron-core, so that data
# and checkpoints made with `--tokenizer-type NullTokenizer --vocab-size N` stay what they were.
#
# Really: up to 0.16 there are N ids and, besides them, the end of document, N: N + 1 in all. In 0.19
# there are N in all, and the last of them, N - 1, is the end of document: an id that is a token in
# older data. The same flags give a smaller embedding, and documents that end elsewhere. Nothing is
# said.
#
# Seen with megatron-core 0.16.1 and 0.19.2 on Python 3.12, where torch comes with CUDA (5 GB).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6 packaging pyyaml
for version in 0.16.1 0.19.2; do
    "$work/venv/bin/pip" install --quiet --no-compile --no-deps --target "$work/$version" \
        "megatron-core==$version"
done

for version in 0.16.1 0.19.2; do
    CUDA_VISIBLE_DEVICES='' PYTHONPATH="$work/$version" "$work/venv/bin/python" -W ignore - <<'PY'
import sys

import megatron.core
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

version = megatron.core.__version__
tokenizer = NullTokenizer(vocab_size=100)
size, end = tokenizer.vocab_size, tokenizer.eod
print(f"megatron-core {version}: vocab_size=100 has {size} ids, the end of document is {end}")
print("  the document '99 98' is", tokenizer.text_to_ids("99 98"), "and its end", end)
expected = {"0.16": (101, 100), "0.19": (100, 99)}[version[:4]]
sys.exit((size, end) != expected)
PY
done
