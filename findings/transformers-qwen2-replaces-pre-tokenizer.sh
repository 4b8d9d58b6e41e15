#!/usr/bin/env bash
# Guess: where a folder has a tokenizer.json and tokenizer_class "PreTrainedTokenizerFast",
# AutoTokenizer gives the ids that tokenizer.json gives: that class only reads the file.
#
# Really: with model_type "qwen2" in config.json, AutoTokenizer takes its own Qwen2 class whatever
# tokenizer_class says, and that one puts its own normalizer and pre-tokenizer in place of the
# file's. The ids differ, without a warning. An entry auto_map in tokenizer_config.json prevents it,
# though the code that it names is not run: the entry's mere presence does.
#
# Seen with transformers 5.24.0 (other model types are treated so as well).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 tokenizers==0.23.3

HF_HUB_OFFLINE=1 "$work/venv/bin/python" -I - "$work/model" <<'PY'
import json
import logging
import logging.handlers
import queue
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
said = queue.Queue()
logging.getLogger("transformers").addHandler(logging.handlers.QueueHandler(said))
folder = Path(sys.argv[1])
folder.mkdir()
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {c: i for i, c in enumerate([*letters, "12"])}
own = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2")]))
own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
own.save(str(folder / "tokenizer.json"))
expected = own.encode("12").ids


def ids_by_auto_tokenizer(model_type, **more):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    made = transformers.AutoTokenizer.from_pretrained(str(folder))
    return type(made).__name__, made("12")["input_ids"]


(folder / "own_tokenizer.py").write_text("raise RuntimeError('this file is run')\n")
auto_map = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
print("tokenizer.json itself:", expected)
for name, found, is_same in (
    ("llama", ids_by_auto_tokenizer("llama"), True),
    ("qwen2", ids_by_auto_tokenizer("qwen2"), False),
    ("qwen2 and auto_map", ids_by_auto_tokenizer("qwen2", auto_map=auto_map), True),
):
    print(f"{name}: {found[0]} {found[1]}")
    if (found[1] == expected) != is_same:
        sys.exit("the behaviour changed")
if not said.empty():
    sys.exit(f"the behaviour changed: {said.get().getMessage()}")
PY
