"""Every way to spread a memory model that docs/parallelism.md lists, and a choice of them in which
every two settings that can meet do meet.

Axes: TP, PP, CP, DP, M as everywhere.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from megatron_memory.config import Config, DataConfig, PrecisionConfig, RecomputeConfig
from megatron_memory.config.pools import with_share_groups
from tests.tiny import tiny_config

MAX_RANKS = 8

TENSOR: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
PIPELINE: dict[str, dict[str, Any]] = {
    "pp1": {},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp4": {"pipeline_model_parallel_size": 4},
    # Memory layers 1 and 3 of four are both on rank 1.
    "pp2-vpp2": {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    # Again, with an embedding alone on its stage, and stages of different sizes.
    "pp2-layout": {
        "pipeline_model_parallel_size": 2,
        "pipeline_model_parallel_layout": "E|tt|t|tL",
    },
}
OPTIMIZER: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole-overlap": {"overlap_grad_reduce": True},
    "distopt": {"use_distributed_optimizer": True},
    "distopt-overlap": {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "keep": {},
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "mlp": dict(
        recompute_granularity="selective", recompute_modules=("core_attn", "mlp", "layernorm")
    ),
    "memory": dict(recompute_granularity="selective", recompute_modules=("core_attn", "memory")),
}
AXES: dict[str, tuple] = {
    "variant": ("memory+", "pkm", "peer"),
    "tensor": tuple(TENSOR),
    "pipeline": tuple(PIPELINE),
    "context": (1, 2),
    "data": (1, 2),
    "memory_parallel": (1, 2),
    "sharing": ("model", "stage", "layer", "copies"),
    "optimizer": tuple(OPTIMIZER),
    "precision": ("fp32", "bf16"),
    "recompute": tuple(RECOMPUTE),
    "loss": ("microbatch", "token"),
}
_ON_ONE_RANK = ("pp1", "pp2-vpp2", "pp2-layout")


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting of each axis."""

    variant: str = "memory+"
    tensor: str = "tp1"
    pipeline: str = "pp1"
    context: int = 1
    data: int = 1
    memory_parallel: int = 1
    sharing: str = "model"
    optimizer: str = "whole"
    precision: str = "fp32"
    recompute: str = "keep"
    loss: str = "microbatch"

    def __str__(self) -> str:
        parts = [
            self.variant,
            self.tensor,
            self.pipeline,
            f"cp{self.context}",
            f"dp{self.data}",
            f"m{self.memory_parallel}",
            self.sharing,
            self.optimizer,
            self.precision,
            self.recompute,
            self.loss,
        ]
        return "-".join(parts)

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        tensor = TENSOR[self.tensor].get("tensor_model_parallel_size", 1)
        pipeline = PIPELINE[self.pipeline].get("pipeline_model_parallel_size", 1)
        return tensor * pipeline * self.context * self.data

    @property
    def why_illegal(self) -> str | None:
        """Part of the error that it must get; None where it must work."""
        if self.sharing == "model" and self.pipeline not in _ON_ONE_RANK:
            return "read one table"
        if (self.context * self.data) % self.memory_parallel:
            return f"--memory-parallel-size {self.memory_parallel}"
        if self.recompute == "memory" and self.variant != "memory+":
            return "--recompute-modules memory saves nothing"
        return None

    def config(self) -> Config:
        """Of the run; see `tiny_config`."""
        memory = {"parallel_size": self.memory_parallel, "replicate_pool": self.sharing == "copies"}
        memory["share_scope"] = self.sharing if self.sharing != "copies" else "model"
        config = tiny_config(
            self.variant,
            TENSOR[self.tensor]
            | PIPELINE[self.pipeline]
            | OPTIMIZER[self.optimizer]
            | {"context_parallel_size": self.context},
            memory=memory,
            precision=PrecisionConfig(bf16=self.precision == "bf16"),
            recompute=RecomputeConfig(**RECOMPUTE[self.recompute]),
            data=DataConfig(data_path=("corpus",), vocab_size=64),
        )
        training = dataclasses.replace(
            config.training, calculate_per_token_loss=self.loss == "token"
        )
        return dataclasses.replace(config, training=training)

    def on_one_rank(self) -> Config:
        """The same model and training on one rank: nothing spread, overlapped or recomputed."""
        config = with_share_groups(self.config())
        alone = Case(precision=self.precision, loss=self.loss).config()
        return dataclasses.replace(
            config,
            parallel=alone.parallel,
            recompute=alone.recompute,
            memory=dataclasses.replace(config.memory, parallel_size=1, replicate_pool=False),
        )


@cache
def legal_cases(max_ranks: int = MAX_RANKS) -> tuple[Case, ...]:
    """All that must work, of at most so many ranks."""
    cases = (Case(*values) for values in itertools.product(*AXES.values()))
    return tuple(
        case for case in cases if case.world_size <= max_ranks and case.why_illegal is None
    )


def settings_of(case: Case) -> frozenset[tuple]:
    """(axis, value) of each axis."""
    return frozenset(dataclasses.asdict(case).items())


def pairs_of(case: Case) -> frozenset[tuple]:
    """Every two of its settings."""
    return frozenset(itertools.combinations(dataclasses.asdict(case).items(), 2))


@cache
def pairwise_cases() -> tuple[Case, ...]:
    """Legal cases in which every two settings that can meet do meet."""
    return tuple(_greedy(legal_cases()))


@cache
def covering_cases() -> tuple[Case, ...]:
    """The first that such a choice makes of two to four ranks, until every setting is there."""
    several = tuple(case for case in legal_cases(max_ranks=4) if case.world_size > 1)
    missing = {(axis, value) for axis, values in AXES.items() for value in values}
    chosen = []
    for case in _greedy(several):
        chosen.append(case)
        missing -= settings_of(case)
        if not missing:
            break
    return tuple(chosen)


def _greedy(cases: tuple[Case, ...]) -> Iterator[Case]:
    """Always the case with most pairs that are still missing; of several, the one of fewest ranks.

    Libraries for pairwise testing give up some pairs where settings exclude each other.
    """
    number: dict[tuple, int] = {}
    columns = [[number.setdefault(pair, len(number)) for pair in pairs_of(c)] for c in cases]
    has = np.zeros((len(cases), len(number)), dtype=np.float32)
    np.put_along_axis(has, np.array(columns), 1, axis=1)
    ranks = np.array([case.world_size for case in cases])
    missing = np.ones(len(number), dtype=np.float32)
    while missing.any():
        best = int(np.argmax((has @ missing) * (MAX_RANKS + 1) - ranks))
        yield cases[best]
        missing[has[best] > 0] = 0
