#!/usr/bin/env bash
# Guess: torch.save to a path on a full disk raises an OSError with errno ENOSPC, as writing to an
# open file does, so that a caller can tell a full disk from a fault of the program.
#
# Really: it raises a RuntimeError that has no errno and names neither the disk nor the path: for a
# large tensor "unexpected pos 704 vs 598", for a small one "iostream error". Only saving into an
# open file gives the OSError.
#
# Seen with torch 2.13.0 on Linux, whose /dev/full is a disk that is always full.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6

"$work/venv/bin/python" -I - <<'PY'
import errno
import sys

import torch

print("torch", torch.__version__.split("+")[0])


def error_of_saving(count, into):
    try:
        if into == "path":
            torch.save(torch.zeros(count), "/dev/full")
        else:
            with open("/dev/full", "wb") as file:
                torch.save(torch.zeros(count), file)
    except Exception as error:
        print(f"{count:9} numbers, {into:9}: {type(error).__name__}: {error}")
        return error


def names_the_disk(error):
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return any(getattr(e, "errno", None) == errno.ENOSPC or "space" in str(e) for e in chain)


for count in (10, 4_000_000):
    by_path, by_file = error_of_saving(count, "path"), error_of_saving(count, "open file")
    if not isinstance(by_path, RuntimeError) or names_the_disk(by_path):
        sys.exit("the behaviour changed: saving to a path now says what is wrong")
    if not isinstance(by_file, OSError):
        sys.exit("the behaviour changed: saving to an open file no longer raises the OSError")
PY
