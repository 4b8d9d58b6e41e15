"""How fast, and how fast compared with what the hardware can do."""

import resource
import sys

import torch

GIB = 2**30

# Dense bf16 matrix throughput with fp32 accumulation, in TFLOP/s, from NVIDIA's data sheets (which
# often print the doubled figure with sparsity). The first entry counts whose words a name has.
_PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.5),
    ("GH200", 989.5),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.5),
    ("H800", 989.5),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L40S", 362.05),
    ("L4", 121.0),
    ("RTX A6000", 154.8),
    ("RTX 4090", 165.2),
)


def peak_tflops(device_name: str) -> float | None:
    """Largest dense bf16 TFLOP/s of a GPU, by its name; None where it is not in the table."""
    for name, tflops in _PEAK_TFLOPS:
        words = device_name.replace("-", " ").split()
        if all(word in words for word in name.split()):
            return tflops
    return None


def model_flops_utilization(
    tflops: float, device: torch.device, dtype: torch.dtype
) -> float | None:
    """Part of the device's peak that the model's own FLOPs use; None where the peak is not known.

    Args:
        tflops: model TFLOP/s of one device.
        device: of this rank.
        dtype: of the matrix products; the peaks known are bf16's.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    peak = peak_tflops(torch.cuda.get_device_name(device))
    return None if peak is None else tflops / peak


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this rank has held so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def fullest_rank_gib(device: torch.device) -> float:
    """The largest `peak_memory_gib` of all ranks, which pipeline stages share unevenly; a
    collective call."""
    peak = torch.tensor(peak_memory_gib(device), device=device)
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    return peak.item()
