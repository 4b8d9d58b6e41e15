"""Run the GPU tests, several files at a time: they compile kernels, for minutes, and the GPU waits.

    python tests/gpu/run_files.py [--jobs N] [FLAGS OF PYTEST ...]

Each file's output is printed whole when it has ended. The exit status is 1 if any file failed.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The longest ones first: the others fit beside them.
FILES = [
    *sorted((ROOT / "tests/kernels/triton").glob("test_*.py")),
    *sorted((ROOT / "tests/gpu").glob("test_*.py")),
]


def run_file(file: Path, flags: list[str]) -> tuple[int, str]:
    """pytest's exit status and output, with a line that says how long it took."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(file), *flags],
        env={**os.environ, "TEST_DEVICE": "cuda"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    title = f"== {file.relative_to(ROOT)}, {time.monotonic() - began:.0f} s\n"
    return done.returncode, title + done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="at a time")
    options, flags = parser.parse_known_args()
    failed = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(run_file, file, flags): file for file in FILES}
        for done in concurrent.futures.as_completed(running):
            status, output = done.result()
            print(output, flush=True)
            if status:
                failed.append(str(running[done].relative_to(ROOT)))
    print(f"{len(FILES) - len(failed)} of {len(FILES)} files passed", *failed, sep="\n  failed: ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
