"""What happens to the gradients between the last backward pass and the update."""

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from megatron_memory.memory.table import ValueTable
from megatron_memory.training.wrapping import tables_of


def finalize_gradients(model: list[DistributedDataParallel], *args, **kwargs) -> None:
    """Megatron's `finalize_model_grads`, then the sum over the copies of replicated tables."""
    finalize_model_grads(model, *args, **kwargs)
    for chunk in model:
        for table in tables_of(chunk):
            if table.replicas is not None and table.learns:
                _sum_over_replicas(table, chunk)


def _sum_over_replicas(table: ValueTable, ddp: DistributedDataParallel) -> None:
    """As for tied embeddings. With the distributed optimizer, of this data-parallel rank's shares:
    the others were left unfinished here."""
    for parameter in table.chunks:
        gradient: Tensor = getattr(parameter, "main_grad")  # noqa: B009
        if ddp.ddp_config.use_distributed_optimizer:
            gradient = _own_share(parameter, table, ddp)
        torch.distributed.all_reduce(gradient, group=table.replicas)


def _own_share(
    parameter: torch.nn.Parameter, table: ValueTable, ddp: DistributedDataParallel
) -> Tensor:
    """What reduce-scatter gave this rank of the parameter's bucket, which has no other parameter
    (`ValueTable` asks for that), so that every copy is shared out alike."""
    (bucket,) = (
        bucket
        for bucket in ddp.param_to_bucket_group[parameter].buckets
        if parameter in bucket.params
    )
    assert bucket.params == {parameter}, "a replicated table shares its bucket"
    copies = table.group.copies
    return bucket.grad_data.view(copies.size(), -1)[copies.rank()]
