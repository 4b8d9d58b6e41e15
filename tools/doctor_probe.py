"""Import what training imports and print what is found as JSON, one line a stage.

`tools/doctor.py` runs this in a process of its own, so that a crash or hang becomes a fact too.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def probe_torch() -> dict[str, Any]:
    """torch's build, its collectives, and the GPUs that it sees."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {
        "nccl": torch.distributed.is_nccl_available(),
        "gloo": torch.distributed.is_gloo_available(),
    }
    return {
        "torch_cuda": torch.version.cuda,
        "collectives": [name for name, available in found.items() if available],
        "cuda_says": " ".join(str(warning.message) for warning in caught),
        "gpus": [_probe_gpu(index) for index in range(num_gpus)],
    }


def _probe_gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    gpu = {
        "name": properties.name,
        "gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "error": "",
    }
    try:
        if torch.ones(8, device=f"cuda:{index}").sum().item() != 8:
            gpu["error"] = "a sum has the wrong result"
    except RuntimeError as error:
        gpu["error"] = str(error).partition("\n")[0]
    return gpu


def probe_megatron() -> dict[str, Any]:
    """The device, collectives and Adam that training picks."""
    from megatron_memory.runtime import prepare_megatron

    backend = prepare_megatron()
    import megatron.core.optimizer

    return {
        "device": backend.device.type,
        "distributed": backend.distributed,
        "adam": megatron.core.optimizer.Adam.__module__,
    }


def probe_kernels() -> dict[str, Any]:
    """Where the memory operators come from, and what they run on by themselves."""
    import torch

    import memory_kernels
    from megatron_memory.runtime import prepare_megatron
    from memory_kernels.choice import use_kernels, uses_triton

    backend = prepare_megatron()
    tensor = torch.empty(0, device=backend.device)
    runs_triton = uses_triton(tensor)
    why_not = ""
    if backend.is_cuda and not runs_triton:
        try:
            use_kernels("triton")
            uses_triton(tensor)
        except ValueError as error:
            why_not = str(error)
    return {
        "memory_kernels": os.path.dirname(memory_kernels.__file__),
        "runs_triton": runs_triton,
        "why_no_triton": why_not,
    }


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    for stage in (probe_torch, probe_megatron, probe_kernels):
        print(json.dumps(stage()), flush=True)


if __name__ == "__main__":
    main()
