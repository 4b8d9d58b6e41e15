#!/usr/bin/env bash
# Guess: the NFC and NFKC normalizers do what Python's unicodedata does, at least for the Unicode
# versions that the same library's patterns (\p{L} and so on) know.
#
# Really: they are those of Unicode 9 (2016). Later characters stay as they are: the square era name
# of Reiwa (U+32FF, Unicode 12.1) is not expanded by NFKC, and the vowel signs U+11935 U+11930
# (Unicode 13) are not composed by NFC, while the patterns do know these letters. So text that was
# normalised beforehand by Python gives other tokens than text that the tokenizer normalises.
#
# Seen with tokenizers 0.23.3. Needs a Python of Unicode 13 or later (3.9 or later).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile tokenizers==0.23.3

"$work/venv/bin/python" -I - <<'PY'
import sys
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

print("tokenizers", tokenizers.__version__, "Python's Unicode", unicodedata.unidata_version)
cases = {
    "NFKC of Unicode 1.1": (normalizers.NFKC(), "NFKC", "\u337b", True),
    "NFKC of Unicode 12.1": (normalizers.NFKC(), "NFKC", "\u32ff", False),
    "NFC of Unicode 1.1": (normalizers.NFC(), "NFC", "e\u0301", True),
    "NFC of Unicode 13": (normalizers.NFC(), "NFC", "\U00011935\U00011930", False),
}
for name, (normalizer, form, text, is_same) in cases.items():
    found, expected = normalizer.normalize_str(text), unicodedata.normalize(form, text)
    print(f"{name}: {ascii(text)} -> {ascii(found)}, unicodedata {ascii(expected)}")
    if (found == expected) != is_same or (not is_same and found != text):
        sys.exit("the behaviour changed")

# U+11900 is a letter since Unicode 13: the patterns know it.
split = pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")
pieces = [piece for piece, _ in split.pre_tokenize_str("1\U000119001")]
print(r"\p{L} of Unicode 13:", ascii(pieces))
if pieces != ["1", "\U00011900", "1"]:
    sys.exit("the behaviour changed: the patterns do not know the letters of Unicode 13")
PY
