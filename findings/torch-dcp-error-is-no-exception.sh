#!/usr/bin/env bash
# Guess: what torch.distributed.checkpoint raises for a checkpoint that does not fit can be caught
# with `except Exception`, for example to try an older checkpoint or to write a line to a log.
#
# Really: CheckpointException derives from BaseException, as KeyboardInterrupt and SystemExit do, so
# it passes by every `except Exception` up to the top, though the fault within it (here a ValueError
# about a tensor's shape) is an ordinary one.
#
# Seen with torch 2.13.0.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" -I -W ignore - "$work/checkpoint" <<'PY'
import sys

import torch
import torch.distributed.checkpoint as dcp

print("torch", torch.__version__.split("+")[0])
dcp.save({"weight": torch.zeros(3)}, checkpoint_id=sys.argv[1])
try:
    try:
        dcp.load({"weight": torch.zeros(4)}, checkpoint_id=sys.argv[1])
    except Exception as error:
        sys.exit(f"the behaviour changed: `except Exception` caught {type(error).__name__}")
    sys.exit("the behaviour changed: another shape is loaded")
except dcp.CheckpointException as error:
    causes = [type(failure[0]).__name__ for failure in error.failures.values()]
    print("passed by `except Exception`:", [c.__name__ for c in type(error).__mro__], causes)
PY
