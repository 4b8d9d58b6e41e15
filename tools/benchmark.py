"""Benchmarks that print ratios measured in one run.

    python tools/benchmark.py preprocess
    python tools/benchmark.py checksums
    python tools/benchmark.py train-step

The first two are in benchmark_preprocess.py and benchmark_checksums.py; their --help says what they
do. The third compares the training step of a memory+ model with that of the dense model of the same
shape: forward, backward and optimizer, on random tokens. Each round measures every model in a
process of its own, one after the other, so that a machine that slows down slows all of them.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": dict(num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4),
    "134m": dict(num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12),
    "373m": dict(num_layers=24, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16),
    "1.3b": dict(num_layers=24, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=16),
}
"""The quickstart's model and the paper's bases (docs/architecture.md has their source)."""
MEMORY_LAYERS = {
    "quickstart": "centered:2:2",
    "134m": "centered:3:4",
    "373m": "centered:3:8",
    "1.3b": "centered:3:8",
}
MODELS = ("dense", "memory+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model to measure."""

    model: str
    """`dense` or `memory+`."""
    shape: str
    """A key of SHAPES."""
    num_half_keys: int
    """The table has the square of it as rows."""
    seq_length: int
    """Tokens a sequence."""
    micro_batch_size: int
    """Sequences a step."""
    bf16: bool
    """bf16 with fp32 main weights, else fp32."""
    num_steps: int
    """Steps timed, after three that are not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a process measured."""

    milliseconds: float
    """Median step."""
    peak_gib: float
    """Of the GPU's memory, or of the process's on the CPU."""
    tflops: float
    """The model's FLOPs over the median step; value lookups are not counted."""
    matmul_tflops: float
    """Of a large matrix product in the same process: the physical limit of `tflops`."""


def main() -> None:
    """Run the benchmark that the first argument names."""
    if sys.argv[1:2] == ["preprocess"]:
        sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
        from tools import benchmark_preprocess

        sys.exit(benchmark_preprocess.main(sys.argv[2:]))
    if sys.argv[1:2] == ["checksums"]:
        sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
        from tools import benchmark_checksums

        sys.exit(benchmark_checksums.main(sys.argv[2:]))
    _compare_training_steps()


def _compare_training_steps() -> None:
    """Measure every model in turn, round after round, and print the table."""
    args = _parse_arguments()
    if args.worker is not None:
        print(json.dumps(dataclasses.asdict(_measure(Case(**json.loads(args.worker))))))
        return
    on_gpu = _has_gpu()
    shape = args.shape or ("373m" if on_gpu else "quickstart")
    options = dict(
        shape=shape,
        num_half_keys=args.num_half_keys or (1024 if on_gpu else 128),
        seq_length=args.seq_length or (2048 if on_gpu else 128),
        micro_batch_size=args.micro_batch_size or (2 if on_gpu else 16),
        bf16=on_gpu,
        num_steps=args.num_steps,
    )
    rounds = [[_in_process(Case(model=m, **options)) for m in MODELS] for _ in range(args.rounds)]
    _print_table(options, rounds)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "benchmark", choices=["train-step", "preprocess", "checksums"], help="what to measure"
    )
    parser.add_argument("--shape", choices=SHAPES, help="default: 373m on a GPU, else quickstart")
    parser.add_argument("--num-half-keys", type=int, help="default: 1024 on a GPU, else 128")
    parser.add_argument("--seq-length", type=int, help="default: 2048 on a GPU, else 128")
    parser.add_argument("--micro-batch-size", type=int, help="default: 2 on a GPU, else 16")
    parser.add_argument("--num-steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each model")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("num_half_keys", "seq_length", "micro_batch_size", "num_steps", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: at least 1 is wanted")
    return args


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _in_process(case: Case) -> Measurement:
    command = [sys.executable, __file__, "train-step", "--worker"]
    result = subprocess.run(
        [*command, json.dumps(dataclasses.asdict(case))], stdout=subprocess.PIPE, text=True
    )
    if result.returncode:
        sys.exit(f"measuring {case} failed with exit code {result.returncode}; see above")
    return Measurement(**json.loads(result.stdout.splitlines()[-1]))


def _measure(case: Case) -> Measurement:
    from megatron_memory.runtime import prepare_megatron

    backend = prepare_megatron()
    from megatron_memory.planning.flops import flops_per_token
    from megatron_memory.runtime.distributed import initialize_distributed, shutdown_distributed
    from megatron_memory.training.setup import build_training_setup
    from megatron_memory.training.step import train_step
    from megatron_memory.training.throughput import peak_memory_gib

    config, vocab_size = _config(case), 32_000 if backend.is_cuda else 4096
    initialize_distributed(config, backend)
    setup = build_training_setup(config, backend, vocab_size)
    batches = _random_batches(case, vocab_size)
    seconds = []
    for _ in range(3 + case.num_steps):
        began = time.perf_counter()
        train_step(setup, batches, num_microbatches=1)  # its loss on the host waits for the GPU
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[3:])
    flops = sum(flops_per_token(config, vocab_size).values())
    measurement = Measurement(
        milliseconds=1e3 * median,
        peak_gib=peak_memory_gib(backend.device),
        tflops=flops * case.seq_length * case.micro_batch_size / median / 1e12,
        matmul_tflops=_matmul_tflops(backend.device, case.bf16),
    )
    shutdown_distributed()
    return measurement


def _config(case: Case):
    from megatron_memory.config import (
        Config,
        MemoryConfig,
        ModelConfig,
        OptimizerSettings,
        PrecisionConfig,
        TrainingConfig,
    )

    batch = case.micro_batch_size
    return Config(
        model=ModelConfig(
            **SHAPES[case.shape],
            seq_length=case.seq_length,
            position_embedding_type="rope",
            normalization="RMSNorm",
            swiglu=True,
            disable_bias_linear=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        ),
        memory=MemoryConfig(
            layers=MEMORY_LAYERS[case.shape] if case.model == "memory+" else None,
            num_half_keys=case.num_half_keys,
        ),
        precision=PrecisionConfig(bf16=case.bf16),
        optimizer=OptimizerSettings(lr=1e-4),
        training=TrainingConfig(micro_batch_size=batch, global_batch_size=batch, train_iters=1000),
    )


def _random_batches(case: Case, vocab_size: int):
    import torch

    shape = (case.micro_batch_size, case.seq_length)
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(vocab_size, (shape[0], shape[1] + 1), generator=generator)
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).expand(shape),
        }


def _matmul_tflops(device, bf16: bool) -> float:
    import torch

    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds) / 1e12


def _print_table(options: dict[str, Any], rounds: list[list[Measurement]]) -> None:
    import torch

    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    print(f"training step on {where}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(", ".join(f"{name} {value}" for name, value in options.items()))
    tokens = options["seq_length"] * options["micro_batch_size"]
    columns = ("ms/step", "tokens/s", "peak GiB", "TFLOP/s", "of matmul")
    print(f"{'model':10}" + "".join(f"{column:>12}" for column in columns))
    for number, model in enumerate(MODELS):
        runs = [measured[number] for measured in rounds]
        milliseconds = statistics.median(run.milliseconds for run in runs)
        share = statistics.median(run.tflops / run.matmul_tflops for run in runs)
        print(
            f"{model:10}{milliseconds:12.1f}{tokens / milliseconds * 1e3:12,.0f}"
            f"{statistics.median(run.peak_gib for run in runs):12.2f}"
            f"{statistics.median(run.tflops for run in runs):12.3f}{share:12.1%}"
        )
    ratios = [memory.milliseconds / dense.milliseconds for dense, memory in rounds]
    print(
        f"memory+ / dense, round by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)} "
        f"(median {statistics.median(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
