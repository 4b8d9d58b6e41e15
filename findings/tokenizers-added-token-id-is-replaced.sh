#!/usr/bin/env bash
# Guess: an entry of `added_tokens` in a tokenizer.json gets the id that the entry says, or loading
# fails. The field is there, and the id is what the model was trained with.
#
# Really: where the vocabulary does not have the token, the entry's id is ignored without a word and
# the token gets the next free id. Here 70000 becomes 3; saved again, the file says 3.
#
# Seen with tokenizers 0.23.3.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile tokenizers==0.23.3

"$work/venv/bin/python" -I - <<'PY'
import json
import sys

import tokenizers
from tokenizers import Tokenizer, models

print("tokenizers", tokenizers.__version__)
vocabulary = {"a": 0, "b": 1, "[UNK]": 2}
definition = json.loads(Tokenizer(models.WordLevel(vocabulary, "[UNK]")).to_str())
definition["added_tokens"] = [
    {
        "id": 70000,
        "content": "<tool>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
]
tokenizer = Tokenizer.from_str(json.dumps(definition))
saved = [(t["content"], t["id"]) for t in json.loads(tokenizer.to_str())["added_tokens"]]
print("the file says 70000; encoded:", tokenizer.encode("<tool>").ids, "saved again:", saved)
print("token of 70000:", tokenizer.id_to_token(70000))
if tokenizer.encode("<tool>").ids != [3] or saved != [("<tool>", 3)]:
    sys.exit("the behaviour changed")
PY
