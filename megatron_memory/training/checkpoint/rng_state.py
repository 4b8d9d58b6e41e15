"""The state of every random-number generator of a rank, as plain tensors and numbers."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

RngState = dict[str, Any]


def capture(device: torch.device) -> RngState:
    """Python's, NumPy's, torch's and Megatron's generators."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict) and numpy["bit_generator"] == "MT19937", "NumPy's generator"
    version, internal, gauss_next = random.getstate()
    return {
        "python": (version, torch.tensor(internal, dtype=torch.int64), gauss_next),
        "numpy": (
            torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            numpy["state"]["pos"],
            numpy["has_gauss"],
            numpy["gauss"],
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }


def restore(state: RngState, device: torch.device) -> None:
    """Put every generator where `capture` found it."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    keys, position, has_gauss, cached_gauss = state["numpy"]
    np.random.set_state(
        ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached_gauss)
    )
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    get_cuda_rng_tracker().set_states({k: v.cpu() for k, v in state["tracker"].items()})
