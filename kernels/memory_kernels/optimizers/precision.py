"""How a table in bf16 is kept in step with arithmetic in fp32.

| rounding | bf16 table |
|---|---|
| `exact` | with a remainder of 16 bits an element the table is the fp32 master itself |
| `stochastic` | no master: rounded up or down at random, so that the mean is right |
| `nearest` | no master: rounded to the nearest, ties to even; small updates are lost |

**Exact.** With the bits of the fp32 value as an integer, high = (bits + 0x8000) >> 16 is stored as
the bf16 table and low = bits - (high << 16), in [-0x8000, 0x7FFF], as int16. high * 2^16 + low is
bits again, every finite value and infinity included. The table is the master rounded to the
nearest, ties away from zero (to even would need a remainder of 17 bits); values above bf16's range
show as infinity there and stay finite in the master. Every NaN becomes 0x7FC00000 first: others
would show as infinity or as zero in the table.

**Stochastic.** 16 random bits are added to the fp32 value's bits and the lower 16 cut off. The bits
come from Philox-4x32 with the seed as key and (column // 4, row, step, 0) as counter, whose output
column % 4 gives its upper 16: the same on every device, independent of who computes what.
"""

import torch
from torch import Tensor

_QUIET_NAN = 0x7FC00000
_LOW_32 = 0xFFFFFFFF
_PHILOX_ROUNDS = 10


def _bits(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), _QUIET_NAN, values.view(torch.int32))


def _as_bf16(high: Tensor) -> Tensor:
    return high.to(torch.int16).view(torch.bfloat16)


def split_master(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 values as a bf16 table and its int16 remainder."""
    bits = _bits(values)
    high = (bits + 0x8000) >> 16
    return _as_bf16(high), (bits - (high << 16)).to(torch.int16)


def join_master(table: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 values of a bf16 table and its int16 remainder."""
    return ((table.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def round_stochastically(values: Tensor, seed: int, step: int, rows: Tensor) -> Tensor:
    """fp32 values [R, D] of table rows [R] in bf16."""
    return _as_bf16((_bits(values) + random_bits(seed, step, rows, values.shape[1])) >> 16)


def random_bits(seed: int, step: int, rows: Tensor, num_columns: int) -> Tensor:
    """[R, D] int32: 16 random bits for each element of table rows [R]."""
    groups = torch.arange(-(-num_columns // 4), device=rows.device)[None, :]
    counter = (
        groups,
        rows.long()[:, None],
        torch.full_like(groups, step),
        torch.zeros_like(groups),
    )
    outputs = torch.stack(torch.broadcast_tensors(*_philox(seed, counter)), dim=-1) >> 16
    return outputs.flatten(1)[:, :num_columns].to(torch.int32)


def _philox(seed: int, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox-4x32-10 (Salmon et al., 2011) in int64, whose products keep the 64 bits wanted."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    for _ in range(_PHILOX_ROUNDS):
        high_0, low_0 = _product(c0, 0xD2511F53)
        high_2, low_2 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32, (k1 + 0xBB67AE85) & _LOW_32
    return c0, c1, c2, c3


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = a * b
    return (product >> 32) & _LOW_32, product & _LOW_32
