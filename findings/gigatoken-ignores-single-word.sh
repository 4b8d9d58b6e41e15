#!/usr/bin/env bash
# Guess: a faster reader of tokenizer.json gives the same ids as the tokenizers library, or refuses
# a file with a setting that it does not support.
#
# Really: gigatoken loads added tokens with the flag single_word, and a truncation, and obeys
# neither. `art` with single_word is then found inside `start`, and a text cut to 2 tokens by the
# file's own truncation keeps all 3. There is no error and no warning.
#
# Seen with gigatoken 0.10.0 against tokenizers 0.23.3.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile gigatoken==0.10.0 tokenizers==0.23.3 numpy==2.4.6

"$work/venv/bin/python" -I - <<'PY'
import importlib.metadata
import sys
import warnings

import gigatoken
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

warnings.simplefilter("error")
for name in ("gigatoken", "tokenizers"):
    print(name, importlib.metadata.version(name))


def tokenizer(**flags):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_tokens([AddedToken("art", **flags)])
    return made


plain, single, cut = tokenizer(), tokenizer(single_word=True), tokenizer()
cut.enable_truncation(2)
for name, reference, is_same in (
    ("no flag", plain, True),
    ("single_word", single, False),
    ("truncation to 2", cut, False),
):
    expected = reference.encode("start").ids
    found = gigatoken.Tokenizer.from_json(reference.to_str()).encode("start").tolist()
    print(f"{name:16} tokenizers {expected}, gigatoken {found}")
    if (found == expected) != is_same or found != plain.encode("start").ids:
        sys.exit("the behaviour changed")
PY
