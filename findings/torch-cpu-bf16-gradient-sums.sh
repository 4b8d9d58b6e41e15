#!/usr/bin/env bash
# Guess: on the CPU, torch sums bfloat16 gradients in float32 and rounds once at the end, as `sum`
# and the bias of Linear do. So a table's row that occurs 4096 times with a gradient of 1 gets 4096.
#
# Really: the gradient of an embedding's weight is added up in bfloat16, one occurrence at a time.
# 256 + 1 rounds to 256 there, so it stops at 256, however often the row occurs. LayerNorm's bias
# does the same within each thread, while RMSNorm's weight is right. There is no warning.
#
# Seen with torch 2.13.0 on the CPU.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" -I - <<'PY'
import sys

import torch

torch.set_num_threads(1)
print("torch", torch.__version__.split("+")[0])
count, width = 4096, 8


def gradients(dtype):
    torch.manual_seed(0)
    ones = torch.ones(count, width, dtype=dtype)
    table = torch.zeros(2, width, dtype=dtype, requires_grad=True)
    ids = torch.zeros(count, dtype=torch.long)
    torch.nn.functional.embedding(ids, table).backward(ones)
    found = {"sum": ones.sum(0)[0].item(), "embedding.weight": table.grad[0, 0].item()}
    inputs = torch.randn(count, width).to(dtype)
    for name, layer in {
        "Linear": torch.nn.Linear(width, width),
        "LayerNorm": torch.nn.LayerNorm(width),
    }.items():
        layer.to(dtype)(inputs).backward(ones)
        found[f"{name}.bias"] = layer.bias.grad[0].item()
    norm = torch.nn.RMSNorm(width).to(dtype)
    norm(inputs.abs()).backward(ones)
    found["RMSNorm.weight"] = norm.weight.grad[0].item()
    return found


exact, found = gradients(torch.float32), gradients(torch.bfloat16)
for name in exact:
    print(f"{name:17} float32 {exact[name]:7.1f}   bfloat16 {found[name]:7.1f}")
stuck = {name for name in exact if abs(found[name] / exact[name] - 1) > 0.02}
expected = {"embedding.weight", "LayerNorm.bias"}
if stuck != expected or any(found[name] != 256 for name in expected):
    sys.exit(f"the behaviour changed: far off are {sorted(stuck)}")
PY
