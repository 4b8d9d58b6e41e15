"""The one place that decides between CUDA + NCCL and CPU + gloo."""

import dataclasses
import logging
import os
import warnings

import torch

from megatron_memory.exceptions import ConfigurationError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """The device of this process and the library that carries its collectives."""

    device: torch.device
    """This rank's device: `cuda:LOCAL_RANK` or `cpu`."""
    distributed: str
    """Name of the torch.distributed backend: `nccl` or `gloo`."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def select_backend(device: str = "auto", distributed_backend: str | None = None) -> Backend:
    """Choose this process's device and collectives.

    Args:
        device: `auto` (CUDA where there is a GPU), `cpu` or `cuda`.
        distributed_backend: `nccl` or `gloo`; None for the device's own.

    Raises:
        ConfigurationError: a GPU is asked for and absent, or nccl is asked for on the CPU.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and num_gpus == 0:
        raise ConfigurationError(
            "--device cuda: torch sees no GPU here. Use --device cpu (or auto), or check the "
            "driver and that torch is a CUDA build: python tools/doctor.py"
        )
    if device == "cpu" or num_gpus == 0:
        if distributed_backend == "nccl":
            raise ConfigurationError(
                "--distributed-backend nccl needs GPUs, and this run is on the CPU: leave the flag "
                "out or use gloo"
            )
        return Backend(device=torch.device("cpu"), distributed="gloo")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= num_gpus:
        raise ConfigurationError(
            f"--nproc-per-node: local rank {local_rank} has no GPU of its own, this node has "
            f"{num_gpus}. Start at most {num_gpus} processes a node, or use --device cpu"
        )
    return Backend(
        device=torch.device("cuda", local_rank), distributed=distributed_backend or "nccl"
    )


_prepared_for: str | None = None


def prepare_megatron(device: str = "auto") -> Backend:
    """Fit megatron-core to this machine. Call before the first `import megatron.core`.

    Repeated calls do nothing more, but must name the same kind of device.

    Raises:
        ConfigurationError: see `select_backend`.
        RuntimeError: megatron-core was imported before, or prepared for another device.
    """
    global _prepared_for
    backend = select_backend(device)
    kind = backend.device.type
    if _prepared_for is not None:
        if _prepared_for != kind:
            raise RuntimeError(f"megatron-core is prepared for {_prepared_for}, not for {kind}")
        return backend
    _quieten_megatron()
    if kind == "cuda":
        # Megatron's overlap of tensor-parallel communication needs kernels in launch order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    else:
        from megatron_memory.runtime import megatron_cpu

        megatron_cpu.install()
    from megatron_memory.runtime import megatron_repairs

    megatron_repairs.install()
    _prepared_for = kind
    return backend


def _quieten_megatron() -> None:
    """Silence what megatron-core says at every start, about itself and not about the run."""
    for message in (
        ".*Transformer Engine.*",  # tools/doctor.py says which optional packages are missing
        ".*Apex is not installed.*",
        ".*nvidia-modelopt.*",
        ".*megatron-energon.*",
        ".*full scope is deprecated.*",
        ".*CUDA_DEVICE_MAX_CONNECTIONS.*",
        ".*torch.distributed.* is deprecated.*",
        ".*grad attribute of a Tensor that is not a leaf.*",  # it looks at views of main weights
    ):
        warnings.filterwarnings("ignore", message=message)
