#!/usr/bin/env bash
# Guess: torch.distributed.checkpoint.load refuses to load a tensor into one of another dtype, as it
# refuses another shape: the checkpoint's metadata has both. Or it warns at least.
#
# Really: it copies with a silent conversion, whatever is lost. float32 weights loaded into bfloat16
# are rounded, and loaded into int64 (a wrong key, say) lose their fractions.
#
# Seen with torch 2.13.0.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" -I - "$work/checkpoint" <<'PY'
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

print("torch", torch.__version__.split("+")[0])
folder = sys.argv[1]
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
saved = torch.tensor([1.001, 300.7, -2.5])
dcp.save({"weight": saved}, checkpoint_id=folder)
metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata["weight"]
print("saved", saved.tolist(), "metadata:", metadata.properties.dtype)

for dtype, expected in ((torch.bfloat16, [1.0, 300.0, -2.5]), (torch.int64, [1, 300, -2])):
    target = {"weight": torch.zeros(3, dtype=dtype)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(target, checkpoint_id=folder)
        except (Exception, CheckpointException) as error:
            sys.exit(f"the behaviour changed: {dtype} is refused: {error}")
    print(f"into {dtype}: {target['weight'].tolist()}, {len(said)} warnings")
    if target["weight"].tolist() != expected or said:
        sys.exit("the behaviour changed: values or warnings")

try:
    dcp.load({"weight": torch.zeros(4)}, checkpoint_id=folder)
except (Exception, CheckpointException) as error:
    print("into another shape:", type(error).__name__)
else:
    sys.exit("the behaviour changed: another shape is loaded too")
PY
