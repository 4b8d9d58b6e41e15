"""The tables of docs/scaling.md: the fastest layout that fits, for the paper's models and memories
on 8 to 1024 GPUs, and for a trillion parameters of memory.

    python tools/scaling_tables.py

Takes some minutes. Every row is what tools/estimate.py finds for its configuration.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

from megatron_memory.config import Config, load_config  # noqa: E402
from megatron_memory.planning.hardware import gpu_named  # noqa: E402
from megatron_memory.planning.parameters import count, weights  # noqa: E402
from megatron_memory.planning.plan import Plan  # noqa: E402
from megatron_memory.planning.roofline import Cluster  # noqa: E402
from megatron_memory.planning.search import best_plans, padded_size  # noqa: E402

MODELS = ("134m", "373m", "720m", "1.3b", "8b")
HALF_KEYS = {1024: "1M", 2048: "4M", 4096: "16M", 8192: "64M"}
NUM_GPUS = (8, 64, 256, 1024)
TRILLION = ((15648, 4096), (11072, 8192))
"""Half-keys and value dimensions that make a trillion parameters."""
TRILLION_GPUS = (("h100", 256), ("h100", 512), ("h100", 1024), ("h200", 256), ("b200", 128))
HEADER = (
    "| model | values | parameters | GPUs | TP x PP x M | VPP | microbatch | recompute | "
    "GiB a GPU | s a step | MFU | tokens/s a GPU |"
)
RULE = "|" + "---|" * 12


def row(model: str, half_keys: int, value_dim: int | None, gpu: str, num_gpus: int) -> str:
    """One row of a table."""
    config = load_config(REPOSITORY / "examples" / "models" / f"{model}.yaml")
    changes: dict = {"num_half_keys": half_keys}
    if value_dim is not None:
        changes |= {"value_dim": value_dim, "key_dim": config.model.hidden_size // 2}
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, **changes))
    assert config.data.vocab_size is not None, "the examples name it"
    cluster = Cluster(gpu=gpu_named(gpu), num_gpus=num_gpus)
    plans = best_plans(config, cluster, config.data.vocab_size, most=1)
    return "| " + " | ".join([*_columns(config, model, cluster), *_found(plans, cluster)]) + " |"


def _columns(config: Config, model: str, cluster: Cluster) -> list[str]:
    assert config.data.vocab_size is not None, "the examples name it"
    found = weights(config, padded_size(config, config.data.vocab_size))
    parameters = sum(count(config, found, on_one_rank=False).values())
    values = HALF_KEYS.get(config.memory.num_half_keys)
    if values is None:
        values = f"{config.memory.num_values / 1e6:.0f}M of {config.memory.value_dim}"
    return [model, values, f"{parameters / 1e9:.2f}b", f"{cluster.num_gpus} {cluster.gpu.name}"]


def _found(plans: list[Plan], cluster: Cluster) -> list[str]:
    if not plans:
        return ["does not fit", *[""] * 7]
    (best,) = plans
    config = best.config
    parallel, training = config.parallel, config.training
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        config.memory.parallel_size,
    )
    tokens = training.global_batch_size * config.model.seq_length
    return [
        " x ".join(map(str, sizes)),
        str(parallel.num_virtual_stages_per_pipeline_rank or 1),
        str(training.micro_batch_size),
        config.recompute.recompute_granularity or "none",
        f"{best.memory.total / 2**30:.1f}",
        f"{best.time.with_overlap:.3g}",
        f"{best.time.mfu:.0%}",
        f"{tokens / best.time.with_overlap / cluster.num_gpus:,.0f}",
    ]


def papers_rows() -> Iterator[tuple]:
    """Arguments of `row` for the paper's models."""
    for model in MODELS:
        for half_keys in HALF_KEYS:
            for num_gpus in NUM_GPUS:
                yield model, half_keys, None, "h100", num_gpus


def trillion_rows() -> Iterator[tuple]:
    """Arguments of `row` for a trillion parameters of memory on the 8b base."""
    for half_keys, value_dim in TRILLION:
        for gpu, num_gpus in TRILLION_GPUS:
            yield "8b", half_keys, value_dim, gpu, num_gpus


def main() -> None:
    """Print both tables."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for rows in (papers_rows(), trillion_rows()):
        print(HEADER, RULE, sep="\n")
        for arguments in rows:
            print(row(*arguments), flush=True)
        print()


if __name__ == "__main__":
    main()
