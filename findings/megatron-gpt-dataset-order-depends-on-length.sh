#!/usr/bin/env bash
# Guess: with one seed, the samples that GPTDataset gives first do not depend on how many are asked
# for: a run that is made longer sees the same first pass over the documents, and then more.
#
# Really: the documents of all passes but a partial last one are shuffled as one list, and so are the
# samples. Another number of samples gives another order from the first sample on, even for the same
# number of passes (8 and 11 samples below). Nor is the beginning one pass over the documents: some
# come twice before others come once.
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

import megatron.core
import numpy
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

print("megatron-core", megatron.core.__version__)
count = 6


class Tokenizer:
    vocab_size, eod, pad = 100, 1, 0
    unique_identifiers = {"class": "Tokenizer"}


prefix = f"{sys.argv[1]}/data"
builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
for document in range(count):
    builder.add_document(torch.tensor([10 * document + 10 + i for i in range(7)] + [1]), [8])
builder.finalize(f"{prefix}.idx")
indexed = IndexedDataset(prefix)

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


def first_six(samples):
    documents = numpy.arange(count, dtype=numpy.int32)
    data = GPTDataset(indexed, prefix, documents, samples, Split.train, config)
    return [data[i]["tokens"][0].item() for i in range(min(count, len(data)))]


orders = {samples: first_six(samples) for samples in (5, 8, 11, 17)}
for samples, order in orders.items():
    print(f"{samples:2} samples asked for; the first six begin with the tokens {order}")
if first_six(8) != orders[8]:
    sys.exit("the order is not repeatable here, so this shows nothing")
if len(set(map(tuple, orders.values()))) != len(orders):
    sys.exit("the behaviour changed: the order is the same")
if len(set(orders[17])) == count:
    sys.exit("the behaviour changed: the first six samples are the six documents")
PY
