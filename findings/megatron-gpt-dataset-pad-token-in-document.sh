#!/usr/bin/env bash
# Guess: GPTDataset treats as padding what it padded itself, at the end of a sample that the
# documents do not fill. A token inside a document reaches the model as it is.
#
# Really: it looks for the tokenizer's pad id in the whole sample. Where a document has that token,
# the model gets token 0 in its place, as input and as label, and the loss before it is masked.
# There is no warning (one is given only if the pad token is also another special token).
#
# Seen with megatron-core 0.16.1.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --no-compile megatron-core==0.16.1

CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" -I -W ignore - "$work" <<'PY'
import sys
import warnings

import megatron.core
import numpy
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

print("megatron-core", megatron.core.__version__)


class Tokenizer:
    vocab_size, eod, pad = 100, 1, 2
    unique_identifiers = {"class": "Tokenizer"}


prefix = f"{sys.argv[1]}/data"
document = [10, 11, 2, 13, 14, 15, 16, 17, 1]
builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
builder.add_document(torch.tensor(document), [len(document)])
builder.finalize(f"{prefix}.idx")

config = GPTDatasetConfig(
    random_seed=1,
    sequence_length=8,
    blend=([prefix], None),
    split="1,0,0",
    path_to_cache=f"{sys.argv[1]}/cache",
    tokenizer=Tokenizer(),
    reset_position_ids=False,
    reset_attention_mask=False,
    eod_mask_loss=False,
    create_attention_mask=False,
)
documents = numpy.zeros(1, dtype=numpy.int32)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    data = GPTDataset(IndexedDataset(prefix), prefix, documents, None, Split.train, config)
    sample = data[0]
print("document ", document, "with the pad id 2")
for name in ("tokens", "labels", "loss_mask"):
    print(f"{name:9}", sample[name].long().tolist())
expected = {
    "tokens": [10, 11, 0, 13, 14, 15, 16, 17],
    "labels": [11, 0, 13, 14, 15, 16, 17, 1],
    "loss_mask": [1, 0, 1, 1, 1, 1, 1, 1],
}
if any(sample[name].long().tolist() != values for name, values in expected.items()):
    sys.exit("the behaviour changed")
if any("pad" in str(warning.message) for warning in said):
    sys.exit("the behaviour changed: there is a warning")
PY
