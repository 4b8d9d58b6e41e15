"""Speed and memory of memory_kernels, as ratios within one run and as shares of physical limits.

    python kernels/benchmarks/run.py all
    python kernels/benchmarks/run.py bag retrieval --device cpu

| benchmark | compares |
|---|---|
| bag | weighted_bag: forward with the memory bus, forward + backward with F.embedding_bag |
| backward | the bag's backward with the public reference's and FBGEMM's |
| retrieval | product_key_topk with matmul, topk, sums, topk, softmax |
| optimizer | backward + clip + Adam on rows with the same on a dense gradient |
| layer | a memory+ layer with the SwiGLU FFN it replaces, forward + backward |
| memory | peak memory of a training step with that of a dense gradient |

Each benchmark runs in a process of its own. A figure below its target is a result: only an error
makes the exit status 1. README.md beside this file says how to read the table.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The folder of the packages `benchmarks` and `memory_kernels`, in place of this file's own.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from benchmarks.speed.program import main

    sys.exit(main(__doc__))
