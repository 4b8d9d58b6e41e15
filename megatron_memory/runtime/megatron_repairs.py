"""What megatron-core 0.16 needs without Transformer Engine and Apex, on CPU and GPU alike.

Everything that depends on megatron-core's version and internals is here or in `megatron_cpu`.
"""

import logging

from megatron_memory.runtime.adam import FusedAdam

_SAID_ELSEWHERE = ("Unknown MLP type",)


def install() -> None:
    """Repair the imported megatron-core; with Transformer Engine or Apex there is little to do."""
    _use_group_step_adam()
    _allow_recompute_without_transformer_engine()
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


def _quieten_known_messages() -> None:
    """megatron-core warns about MLP classes that it does not know; ours are meant to be there."""
    import megatron.core.transformer.transformer_layer as transformer_layer

    logging.getLogger(transformer_layer.__name__).addFilter(
        lambda record: not any(text in record.getMessage() for text in _SAID_ELSEWHERE)
    )
