"""Names that libraries do not promise to keep, and that this program uses or replaces all the same.

A test looks each up in the installed version: what another version no longer has is then named
here, rather than missed in the middle of a training.
"""

from importlib import import_module

_CORE = "megatron.core"
_CHECKPOINTS = f"{_CORE}.dist_checkpointing"

NAMES: dict[str, tuple[str, ...]] = {
    f"{_CORE}.datasets.gpt_dataset": (
        "GPTDataset._build_document_sample_shuffle_indices",
        "GPTDataset._query_document_sample_shuffle_indices",
    ),
    f"{_CORE}.datasets.blended_dataset": ("BlendedDataset._build_indices",),
    f"{_CORE}.datasets.blended_megatron_dataset_builder": (
        "BlendedMegatronDatasetBuilder.build_generic_dataset",
        "BlendedMegatronDatasetBuilder._build_megatron_datasets_parallel",
        "BlendedMegatronDatasetBuilder._build_megatron_dataset_splits",
    ),
    f"{_CHECKPOINTS}.serialization": ("save_config",),
    f"{_CHECKPOINTS}.strategies.torch": ("_get_filesystem_reader",),
    f"{_CHECKPOINTS}.strategies.filesystem_async": (
        "FileSystemWriterAsync.finish",
        "FileSystemWriterAsync.write_preloaded_data",
        "_results_queue",
    ),
    f"{_CORE}.models.common.embeddings.language_model_embedding": ("LanguageModelEmbedding",),
    f"{_CORE}.optimizer": ("Adam", "USING_PYTORCH_OPTIMIZER"),
    f"{_CORE}.optimizer.distrib_optimizer": (
        "Adam",
        "DistributedOptimizer._get_main_param_and_optimizer_states",
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
        "HAVE_APEX_OR_TE",
        "USING_APEX_OPTIMIZER",
    ),
    f"{_CORE}.tensor_parallel.layers": ("F",),
    f"{_CORE}.tensor_parallel.random": (
        "CheckpointWithoutOutput.__init__",
        "HAVE_TE",
        "_get_cuda_rng_state",
        "_set_cuda_rng_state",
    ),
    f"{_CORE}.transformer.mlp": ("MLP.forward",),
    "torch": ("_fused_adam_", "_fused_adamw_"),
    "torch.distributed.distributed_c10d": ("_get_default_store",),
    "torch.distributed.checkpoint.filesystem": ("FileSystemReader._slice_file", "_StorageInfo"),
}
"""By module. Those of one line of megatron-core alone are in that line's own PRIVATE_NAMES."""


def missing(names: dict[str, tuple[str, ...]]) -> list[str]:
    """Which of the names the installed versions do not have."""
    return [
        f"{module}.{name}"
        for module, of_module in names.items()
        for name in of_module
        if not _has(module, name)
    ]


def _has(module: str, name: str) -> bool:
    try:
        found: object = import_module(module)
    except ImportError:
        return False
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True
