"""Every launch that ships, planned by the kernels' own functions from tensors of the meta device.

Shapes are those of the paper's models: 16k tokens a batch, four heads of 32 slots, tables of 1M
rows, values as wide as the model, and the slices of them that tensor parallelism leaves a rank.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

import memory_kernels
from memory_kernels.bag.triton_forward import plan_bag_sum
from memory_kernels.launch import Launch

TOKENS, READS, ROWS = 16 * 1024, 128, 1024**2
WIDTHS = (64, 128, 256, 512, 768, 1024, 2048, 4096)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8, INT32, INT64 = torch.float8_e4m3fn, torch.int32, torch.int64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shipped:
    """One launch in one configuration."""

    name: str
    launch: Launch
    main: bool = False
    """Compiled by the tests too: each path through a kernel is in one of these."""
    wide: bool = False
    """Reads rows that begin and end at a multiple of 16 bytes, so most bytes must come in loads of
    16."""
    archs: tuple[int, ...] = (80, 90)
    """Where it ships. Ampere has no fp8."""


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor without data: a plan needs no more."""
    return torch.empty(shape, dtype=dtype, device="meta")


def rows_are_wide(columns: int, dtype: torch.dtype) -> bool:
    """Whether Triton sees that rows are multiples of 16 bytes: of an integer it knows no more than
    whether 16 divides it."""
    return columns % 16 == 0 and columns * dtype.itemsize % 16 == 0


def shipped() -> list[Shipped]:
    """All of them."""
    launches = [*bag_sum()]
    names = [one.name for one in launches]
    assert len(set(names)) == len(names), "two launches of one name"
    return launches


def kernels_without_launch(launches: list[Shipped], *, main: bool = False) -> list[str]:
    """Kernels of the package, module.function, that no launch (no main one) is of."""
    covered = {id(one.launch.kernel) for one in launches if one.main or not main}
    missing = []
    for module in pkgutil.walk_packages(memory_kernels.__path__, "memory_kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            is_kernel = isinstance(value, KernelInterface) and name.endswith("_kernel")
            # A kernel that another module imports is listed where it is defined.
            if is_kernel and value.fn.__module__ == module.name and id(value) not in covered:
                missing.append(f"{module.name}.{name}")
    return missing


def bag_sum() -> Iterator[Shipped]:
    def case(
        what: str,
        columns: int,
        dtype=BF16,
        *,
        main=False,
        gated=False,
        fp8=False,
        chunks=1,
        reads=READS,
        rows=ROWS,
        indices=INT32,
    ) -> Shipped:
        stored = FP8 if fp8 else dtype
        output = meta(TOKENS, columns, dtype=dtype)
        launch = plan_bag_sum(
            output,
            output if gated else None,
            [meta(rows // chunks, columns, dtype=stored)] * chunks,
            meta(rows, dtype=FP32) if fp8 else None,
            meta(TOKENS, reads, dtype=indices),
            meta(TOKENS, reads, dtype=dtype),
            output if gated else None,
        )
        return Shipped(
            name=f"bag_sum D={columns} {what}",
            launch=launch,
            main=main,
            wide=rows_are_wide(columns, stored),
            archs=(90,) if fp8 else (80, 90),
        )

    for columns in WIDTHS:
        yield case("bf16", columns, main=columns == 1024)
        yield case("bf16 gated", columns, gated=True, main=columns == 1024)
        yield case("fp8", columns, fp8=True)
        yield case("fp8 gated", columns, fp8=True, gated=True, main=columns == 1024)
        yield case("bf16 chunked", columns, chunks=8, main=columns == 512)
    for columns in (512, 1024):
        yield case("fp32", columns, FP32, main=columns == 512)
        yield case("fp16", columns, FP16)
    yield case("fp8 chunked", 1024, fp8=True, chunks=8)
    yield case("bf16 int64 indices", 1024, indices=INT64, main=True)
    yield case("bf16 2^31 rows", 1024, rows=2**31, indices=INT64)
    yield case("bf16 32 reads", 1024, reads=32)
    yield case("bf16 100 reads", 1024, reads=100)
    yield case("bf16 1 read", 1024, reads=1)
    for columns in (3, 100, 257):
        yield case("bf16", columns, main=columns == 257)
        yield case("fp32", columns, FP32)
