"""What a configuration would need and take on GPUs: parameters, memory, bytes sent, time, and the
layouts to choose.

    python tools/estimate.py --config examples/models/1.3b.yaml --num-gpus 64 --gpu h100

Every flag of `python -m megatron_memory.train` may follow and wins over the file. Needs no GPU and
makes no model. All figures are estimates: memory and bytes sent are held to what small real runs on
the CPU allocate and send (tests/planning), times are lower bounds from data sheets.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from megatron_memory.config import Config, check_config, parse_arguments  # noqa: E402
from megatron_memory.entry import run_entry  # noqa: E402
from megatron_memory.exceptions import ConfigurationError  # noqa: E402
from megatron_memory.planning.hardware import GPUS, gpu_named  # noqa: E402
from megatron_memory.planning.plan import Plan, largest_memory, plan  # noqa: E402
from megatron_memory.planning.report import (  # noqa: E402
    describe_largest,
    describe_plan,
    describe_search,
    figures,
    search_figures,
)
from megatron_memory.planning.roofline import Cluster  # noqa: E402
from megatron_memory.planning.search import best_plans, padded_size  # noqa: E402

_EFFICIENCIES = ("matrix", "memory", "link")
_GPU_OPTIONS = {
    "memory": ("GB", 1e9),
    "bandwidth": ("TB/s of its memory", 1e12),
    "tflops": ("TFLOPS in bf16", 1e12),
    "nvlink": ("GB/s that it sends within its node", 1e9),
    "network": ("GB/s that it sends to other nodes", 1e9),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    options, flags = _parser().parse_known_args(argv)
    return run_entry(lambda: _run(options, flags))


def _run(options: argparse.Namespace, flags: list[str]) -> int:
    cluster = _cluster(options)
    given = parse_arguments([*flags, "--dry-run"])
    vocab_size = given.data.vocab_size
    if vocab_size is None:
        raise ConfigurationError(
            "--vocab-size is missing, and this tool reads no tokenizer: give its number of tokens."
        )
    plans = [] if options.no_search else best_plans(given, cluster, vocab_size)
    shown, problem = _plan_to_show(given, cluster, vocab_size, plans)
    padded = padded_size(shown.config, vocab_size)
    most = largest_memory(shown.config, cluster, padded) if given.memory.enabled else 0
    if options.json:
        found = figures(shown, cluster, padded)
        found |= {"largest_half_keys": most, "problem": problem}
        print(json.dumps(found | {"best": search_figures(given, plans)}, indent=1))
        return 0
    if problem:
        print(
            "As given it cannot run, so that this is about the best layout found, whatever sizes "
            f"the flags gave: {_sizes(shown.config)}. {problem}"
        )
    lines = [*describe_plan(shown, cluster, padded), *describe_largest(given, most)]
    print("\n".join([*lines, *([] if options.no_search else describe_search(given, plans))]))
    return 0


def _sizes(config: Config) -> str:
    parallel = config.parallel
    return (
        f"TP {parallel.tensor_model_parallel_size}, PP {parallel.pipeline_model_parallel_size}, "
        f"M {config.memory.parallel_size}, --micro-batch-size {config.training.micro_batch_size}"
    )


def _plan_to_show(
    given: Config, cluster: Cluster, vocab_size: int, plans: list[Plan]
) -> tuple[Plan, str | None]:
    """The given configuration's, or the best one found and why not the given one's."""
    try:
        check_config(given, cluster.num_gpus)
    except ConfigurationError as error:
        if not plans:
            raise
        return plans[0], str(error)
    return plan(given, cluster, padded_size(given, vocab_size)), None


def _cluster(options: argparse.Namespace) -> Cluster:
    for name in ("num_gpus", "gpus_per_node"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigurationError(f"{flag} {getattr(options, name)}: give 1 or more.")
    figures_given = {f"--gpu-{name}": getattr(options, f"gpu_{name}") for name in _GPU_OPTIONS}
    for flag, value in figures_given.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigurationError(f"{flag} {value}: give a number above 0.")
    for name in _EFFICIENCIES:
        if not 0 < (value := getattr(options, f"{name}_efficiency")) <= 1:
            raise ConfigurationError(
                f"--{name}-efficiency {value}: give a part, above 0 and at most 1."
            )
    fields = {"tflops": "bf16_flops"}
    changes = {
        fields.get(name, name): getattr(options, f"gpu_{name}") * unit
        for name, (_, unit) in _GPU_OPTIONS.items()
        if getattr(options, f"gpu_{name}") is not None
    }
    return Cluster(
        gpu=dataclasses.replace(gpu_named(options.gpu), **changes),
        num_gpus=options.num_gpus,
        gpus_per_node=options.gpus_per_node,
        matrix_efficiency=options.matrix_efficiency,
        memory_efficiency=options.memory_efficiency,
        link_efficiency=options.link_efficiency,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--num-gpus", type=int, required=True, help="processes of the run")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)} (default: h100)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: 8")
    for name, (unit, _) in _GPU_OPTIONS.items():
        parser.add_argument(f"--gpu-{name}", type=float, help=f"{unit}, instead of --gpu's")
    for name in _EFFICIENCIES:
        field = f"{name}_efficiency"
        default = Cluster.__dataclass_fields__[field].default
        parser.add_argument(
            f"--{name}-efficiency",
            type=float,
            default=default,
            help=f"part of the peak that is reached, an assumption (default: {default})",
        )
    parser.add_argument("--no-search", action="store_true", help="only what is given")
    parser.add_argument("--json", action="store_true", help="for programs: bytes, seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
