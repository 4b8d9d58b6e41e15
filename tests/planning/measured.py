"""A real training step on this rank, measured tensor by tensor."""

import dataclasses
from collections.abc import Iterable

import torch
from megatron.core import parallel_state

from megatron_memory.config import Config
from megatron_memory.memory.mlp import memory_of
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.training import step as step_module
from megatron_memory.training.setup import TrainingSetup, build_training_setup
from megatron_memory.training.wrapping import unwrap
from tests.planning.live_memory import LiveBytes


@dataclasses.dataclass
class Measured:
    """Bytes on this rank."""

    weights: int
    gradients: int
    main_weights: int
    optimizer_states: int
    activations: dict[str, int]
    """Alive after the forward pass of a microbatch, when the most are kept, by part."""
    peak: int
    """The most that was alive besides weights, gradients, main weights and states."""


def batches(config: Config, vocab_size: int):
    """Microbatches of random tokens, for ever."""
    generator = torch.Generator().manual_seed(5)
    shape = (config.training.micro_batch_size, config.model.seq_length)
    while True:
        tokens = torch.randint(0, vocab_size, (shape[0], shape[1] + 1), generator=generator)
        yield {
            "tokens": tokens[:, :-1].clone(),
            "labels": tokens[:, 1:].clone(),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).expand(shape[0], -1),
        }


def measure(config: Config, padded_vocab_size: int) -> Measured:
    """Two steps on this rank; the second is measured, when all states are there."""
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    setup = build_training_setup(config, backend, padded_vocab_size)
    data = batches(config, padded_vocab_size)
    number = config.num_microbatches(torch.distributed.get_world_size())
    step_module.train_step(setup, data, number)
    live = _Watched(setup)
    snapshots: list[dict[str, int]] = [{}]
    forward = step_module._forward

    def observed_forward(*arguments, **options):
        result = forward(*arguments, **options)
        snapshots.append(dict(live.by_label))
        return result

    step_module._forward = observed_forward
    try:
        with live:
            step_module.train_step(setup, data, number)
    finally:
        step_module._forward = forward
    states = _states(setup)
    parallel_state.destroy_model_parallel()
    largest = max(snapshots, key=lambda sizes: sum(sizes.values()))
    return Measured(**states, activations=largest, peak=live.peak)


def measure_all(configs: list[Config], padded_vocab_size: int) -> list[Measured]:
    """One after the other in this process."""
    return [measure(config, padded_vocab_size) for config in configs]


class _Watched(LiveBytes):
    """Live bytes by the part of the model that made them."""

    def __init__(self, setup: TrainingSetup):
        super().__init__()
        for chunk in setup.model:
            for layer in unwrap(chunk).decoder.layers:
                self.label_calls(layer.self_attention, "attention")
                memory = memory_of(layer.mlp)
                if memory is not layer.mlp:
                    self.label_calls(layer.mlp, "mlp")
                if memory is not None:
                    self.label_calls(memory, "memory")


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the tensors' storages, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _states(setup: TrainingSetup) -> dict[str, int]:
    parameters = [p for chunk in setup.model for p in chunk.parameters()]
    buffers = [b for c in setup.model for b in (*c.buffers, *c.expert_parallel_buffers)]
    chained = getattr(setup.optimizer, "chained_optimizers", [setup.optimizer])
    weights = {p.untyped_storage()._cdata for p in parameters}
    mains, states = [], []
    for optimizer in (o.optimizer for o in chained):
        for group in optimizer.param_groups:
            mains += [p for p in group["params"] if p.untyped_storage()._cdata not in weights]
        for state in optimizer.state.values():
            states += [t for t in state.values() if isinstance(t, torch.Tensor)]
    return dict(
        weights=_bytes(parameters),
        gradients=_bytes(b.grad_data for b in buffers),
        main_weights=_bytes(mains),
        optimizer_states=_bytes(states),
    )
