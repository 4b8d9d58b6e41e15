"""What megatron-core 0.16 needs without Transformer Engine and Apex, on CPU and GPU alike.

Everything that depends on megatron-core's version and internals is here or in `megatron_cpu`.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator

from megatron_memory.runtime.adam import FusedAdam

_SAID_ELSEWHERE = ("Unknown MLP type",)


def install() -> None:
    """Repair the imported megatron-core; with Transformer Engine or Apex there is little to do."""
    _use_group_step_adam()
    _allow_recompute_without_transformer_engine()
    _allow_recompute_of_mlps_with_biases()
    _find_optimizer_states_behind_padding()
    _quieten_known_messages()


def _use_group_step_adam() -> None:
    """torch's AdamW counts steps per parameter, which distributed checkpoints cannot hold."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distributed_optimizer.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed_optimizer.HAVE_APEX_OR_TE = True
        distributed_optimizer.USING_APEX_OPTIMIZER = True


def _allow_recompute_without_transformer_engine() -> None:
    import megatron.core.tensor_parallel.random as rng
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not rng.HAVE_TE:
        # The default fp8=False counts as "fp8 is on" and reaches for Transformer Engine's state.
        rng.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # the MoE router looks the name up unconditionally


def _allow_recompute_of_mlps_with_biases() -> None:
    """Without it, their second backward pass never ends.

    An MLP returns the parameter itself as its bias, which megatron-core's checkpointing makes an
    output of its autograd function: the parameter then hangs on the graph of the first pass.
    """
    from megatron.core.transformer.mlp import MLP

    forward = MLP.forward
    if hasattr(forward, "__wrapped__"):
        return

    @functools.wraps(forward)
    def forward_with_view_of_bias(self, *args, **kwargs):
        output, bias = forward(self, *args, **kwargs)
        return output, None if bias is None else bias.view_as(bias)

    MLP.forward = forward_with_view_of_bias


def _find_optimizer_states_behind_padding() -> None:
    """Without it, checkpoints of a distributed optimizer with several buckets may be wrong.

    To save a buffer's states, megatron-core 0.16 gathers them without the padding at the buckets'
    ends, then looks for each parameter where it was with the padding: the states of all buckets but
    the first are shifted, where a bucket's length is no multiple of 128 and of the ranks.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    shard = DistributedOptimizer.sharded_param_state_fully_reshardable
    if hasattr(shard, "__wrapped__"):
        return

    @functools.wraps(shard)
    def shard_without_padding(self, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            for buffer in self.buffers:
                stack.enter_context(_places_without_padding(buffer))
            return shard(self, *args, **kwargs)

    DistributedOptimizer.sharded_param_state_fully_reshardable = shard_without_padding


@contextlib.contextmanager
def _places_without_padding(buffer) -> Iterator[None]:
    """Say where a buffer's parameters would be if its buckets followed each other closely."""
    places, start, shifts = buffer.param_index_map, 0, []
    for bucket in buffer.buckets:
        shifts.append(bucket.offset - start)
        start += bucket.numel_unpadded
    buffer.param_index_map = {
        param: (first - shifts[bucket], last - shifts[bucket], bucket)
        for param, (first, last, bucket) in places.items()
    }
    try:
        yield
    finally:
        buffer.param_index_map = places


def _quieten_known_messages() -> None:
    """megatron-core warns about MLP classes that it does not know; ours are meant to be there."""
    import megatron.core.transformer.transformer_layer as transformer_layer

    logging.getLogger(transformer_layer.__name__).addFilter(
        lambda record: not any(text in record.getMessage() for text in _SAID_ELSEWHERE)
    )
