"""Compiles every kernel that ships and says what it takes of a GPU; needs none. See --help."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.compiled.report import main

    sys.exit(main())
