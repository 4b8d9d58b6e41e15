"""GPUs as their data sheets have them. Nothing here was measured."""

import dataclasses

from megatron_memory.exceptions import ConfigurationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU in a node of eight, as its maker sells it; all figures are peaks."""

    name: str
    memory: float
    """Bytes, from the sheet's gigabytes of 10^9 (devices report some percent more)."""
    bandwidth: float
    """Of its memory, bytes a second."""
    bf16_flops: float
    """A second, dense, on tensor cores."""
    fp32_flops: float
    """A second, without tensor cores."""
    nvlink: float
    """Bytes a second that it sends to the other GPUs of its node: half of what sheets give, which
    is both directions."""
    network: float
    """Bytes a second that it sends to other nodes, through its own adapter."""
    source: str


def _gpu(name, gigabytes, terabytes, bf16, fp32, nvlink, network, source) -> Gpu:
    return Gpu(
        name=name,
        memory=gigabytes * 1e9,
        bandwidth=terabytes * 1e12,
        bf16_flops=bf16 * 1e12,
        fp32_flops=fp32 * 1e12,
        nvlink=nvlink / 2 * 1e9,
        network=network / 8 * 1e9,
        source=source,
    )


# Name, GB, TB/s, bf16 and fp32 TFLOPS, GB/s of NVLink (both directions), Gb/s of network.
_TABLE = (
    ("a100", 80, 2.039, 312, 19.5, 600, 200, "NVIDIA A100 80GB SXM, DGX A100 data sheets"),
    ("h100", 80, 3.35, 989, 67, 900, 400, "NVIDIA H100 SXM, DGX H100 data sheets"),
    ("h200", 141, 4.8, 989, 67, 900, 400, "NVIDIA H200 SXM, DGX H200 data sheets"),
    ("b200", 180, 8.0, 2250, 75, 1800, 400, "NVIDIA HGX B200, DGX B200 data sheets"),
)
GPUS = {gpu.name: gpu for gpu in (_gpu(*row) for row in _TABLE)}


def gpu_named(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        ConfigurationError: it is not in the table.
    """
    if name not in GPUS:
        raise ConfigurationError(
            f"--gpu {name} is not known: choose one of {', '.join(GPUS)}, and correct it by "
            "--gpu-memory, --gpu-bandwidth, --gpu-tflops, --gpu-nvlink and --gpu-network."
        )
    return GPUS[name]
