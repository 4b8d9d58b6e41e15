"""Our own checkpoints, as megatron-core writes them: read in any layout, written for one."""

import dataclasses
import json
import re
from pathlib import Path

import torch

from megatron_memory.config import (
    CheckpointConfig,
    Config,
    ParallelConfig,
    PrecisionConfig,
    save_config,
)
from megatron_memory.config.checks_memory import memory_problems
from megatron_memory.config.checks_parallel import parallel_problems
from megatron_memory.config.pools import with_share_groups
from megatron_memory.config.problems import raise_problems
from megatron_memory.conversion.dcp_files import StoredTensors, write_dcp
from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.links import check_checkpoint_links
from megatron_memory.conversion.options import Target
from megatron_memory.conversion.own_tokenizer import count_ids
from megatron_memory.conversion.saved_state import SavedState, Tensors
from megatron_memory.conversion.tokenizer_files import copy_tokenizer
from megatron_memory.data.tokenizers import padded_vocab_size
from megatron_memory.exceptions import CheckpointError
from megatron_memory.memory.usage import USAGE_PREFIX
from megatron_memory.training.checkpoint import folders
from megatron_memory.training.checkpoint.architecture import saved_config
from megatron_memory.training.checkpoint.checksums import MARK, NO_SUMS, check_sums, write_sums
from megatron_memory.training.checkpoint.finding import locate, read_common
from megatron_memory.training.checkpoint.generation import GENERATION, GenerationSettings
from megatron_memory.training.checkpoint.integrity import check_whole
from megatron_memory.training.checkpoint.state import USAGE_SINCE

_STATE = re.compile(r"optimizer\.state\.(\w+?)\.(.+)")
_MAIN_WEIGHTS = ("param", "fp32_param")
_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
TOKENIZER = "tokenizer"
"""The folder of a converted checkpoint's tokenizer, beside its iteration's."""
# Settings of a training: a checkpoint that no training wrote leaves them to the user.
_OF_TRAINING = ("optimizer", "training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The ranks that a checkpoint is written for; any others can load it as well."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    memory_parallel_size: int = 1


def layout_of(target: Target) -> Layout:
    """The ranks that a conversion's flags name."""
    return Layout(
        tensor_parallel_size=target.target_tensor_parallel_size,
        pipeline_parallel_size=target.target_pipeline_parallel_size,
        memory_parallel_size=target.target_memory_parallel_size,
    )


def read_megatron(load: Path, *, with_sums: bool = True) -> SavedState:
    """A training's checkpoint: the newest in a directory, or an iteration's folder.

    Args:
        load: where it is.
        with_sums: compare its files with their checksums first.

    Raises:
        CheckpointError: there is none, it is damaged, or it does not say what model it is.
    """
    folder = locate(load)
    if folder is None:
        raise CheckpointError(
            f"--load {load}: holds no checkpoint of this program. Check the path; of another "
            "program's, tools/convert_checkpoint.py --from hf or lingua makes one"
        )
    check_checkpoint_links(load, folder)
    metadata = check_whole(folder)
    common = read_common(folder)
    notes: tuple[str, ...] = ()
    if with_sums and not check_sums(folder, common):
        notes = (NO_SUMS.format(folder),)
    config = saved_config(folder)
    if config is None:
        raise CheckpointError(
            f"{folder / folders.CONFIG_FILE} is missing, which describes the model. Copy the "
            "training's config.yaml there"
        )
    vocab_size = common.get("vocab_size", config.data.vocab_size)
    if vocab_size is None:
        raise CheckpointError(f"{folder} does not say how many tokens its vocabulary has")
    stored = StoredTensors(folder, metadata).tensors()
    usage = {name: t for name, t in stored.items() if name.startswith(USAGE_PREFIX)}
    others = {name: t for name, t in stored.items() if name not in usage}
    weights, main_weights, moments = _by_kind(others, vocab_size)
    return SavedState(
        config=with_share_groups(config),
        vocab_size=vocab_size,
        weights=weights,
        main_weights=main_weights,
        moments=moments,
        usage=usage,
        iteration=common.get("iteration", 0),
        consumed_samples=common.get("consumed_samples", 0),
        common=common,
        tokenizer=_tokenizer(config),
        generation=GenerationSettings.of_common(common, folder),
        notes=notes,
    )


def read_generation_back(save: Path) -> GenerationSettings | None:
    """The generation settings that `write_megatron` wrote.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    folder = locate(save)
    if folder is None:
        raise CheckpointError(f"{save}: holds no checkpoint")
    return GenerationSettings.of_common(read_common(folder), folder)


def _by_kind(stored: Tensors, vocab_size: int) -> tuple[Tensors, Tensors, dict[str, Tensors]]:
    """Weights, main weights and moments, all without the vocabulary's padding."""
    weights: Tensors = {}
    main_weights: Tensors = {}
    moments: dict[str, Tensors] = {}
    for key, tensor in stored.items():
        match = _STATE.fullmatch(key)
        kind, name = match.groups() if match else (None, key)
        if name in _PADDED:
            tensor = tensor.first_rows(min(vocab_size, tensor.num_rows))
        if kind is None:
            weights[name] = tensor
        elif kind in _MAIN_WEIGHTS:
            main_weights[name] = tensor
        else:
            moments.setdefault(kind, {})[name] = tensor
    return weights, main_weights, moments


def _tokenizer(config: Config) -> Path | None:
    model = config.data.tokenizer_model
    return Path(model) if model is not None and Path(model).exists() else None


def write_megatron(
    state: SavedState, folder: Path, save: Path, layout: Layout, dtype: torch.dtype | None = None
) -> list[str]:
    """Write a directory that `--load` takes.

    Args:
        state: what to write.
        folder: where to, empty.
        save: the name that the folder is going to have.
        layout: decides the vocabulary's padding and the sizes in config.yaml.
        dtype: of the weights, float32 or bfloat16; None: as they are. With bfloat16 and an
            optimizer, the exact weights become its fp32 main weights.

    Returns:
        what to tell the user.

    Raises:
        ConfigurationError: the model cannot be laid out so.
        CheckpointError, OSError: a tensor cannot be read, or the folder not be written.
    """
    ids = count_ids(state)
    config = config_to_write(state, save, layout, dtype, ids)
    any_run, ranks = _with_divisible_batch(config, layout), _num_ranks(layout)
    raise_problems([*memory_problems(any_run), *parallel_problems(any_run, ranks)])
    iteration = folders.begin(folder, state.iteration)
    write_dcp(iteration, _tensors(state, max(ids, state.vocab_size), config, dtype))
    torch.save(_common(state, layout), iteration / "common.pt")
    format_name = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    format_name |= {"common_backend": "torch", "common_backend_version": 1}
    (iteration / "metadata.json").write_text(json.dumps(format_name), "utf-8")
    save_config(config, iteration / folders.CONFIG_FILE)
    write_sums(iteration, CheckpointConfig().checksums)
    if state.tokenizer is not None:
        copy_tokenizer(state.tokenizer, folder / TOKENIZER)
    omit = () if state.iteration else _OF_TRAINING
    save_config(config, folder / folders.CONFIG_FILE, omit=omit)
    folders.publish(folder, state.iteration)
    if ids <= state.vocab_size:
        return []
    return [
        f"the tokenizer has ids up to {ids - 1}, and the model rows for {state.vocab_size} tokens: "
        "rows of zeros stand for the others. Train them before you use them"
    ]


def _with_divisible_batch(config: Config, layout: Layout) -> Config:
    """The batch of the training that wrote a checkpoint says nothing of the one that loads it."""
    batch = _num_ranks(layout) * layout.pipeline_parallel_size
    training = dataclasses.replace(config.training, micro_batch_size=1, global_batch_size=batch)
    return dataclasses.replace(config, training=training)


def _num_ranks(layout: Layout) -> int:
    return layout.tensor_parallel_size * layout.pipeline_parallel_size * layout.memory_parallel_size


def config_to_write(
    state: SavedState, save: Path, layout: Layout, dtype: torch.dtype | None, ids: int
) -> Config:
    """What config.yaml says; `ids` is `count_ids(state)`, the others are as of `write_megatron`."""
    replace, config = dataclasses.replace, state.config
    is_bf16 = _dtype_of(state, dtype) == torch.bfloat16
    data = config.data
    if data.vocab_size is not None and ids > state.vocab_size:
        data = replace(data, vocab_size=ids)
    if state.tokenizer is not None:
        # So that the model can be used from any directory.
        place = save.absolute() / TOKENIZER
        if state.tokenizer.is_file():
            place /= state.tokenizer.name
        data = replace(
            data,
            tokenizer_type=data.tokenizer_type or "HuggingFaceTokenizer",
            tokenizer_model=str(place),
        )
    return replace(
        config,
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tensor_parallel_size,
            sequence_parallel=layout.tensor_parallel_size > 1,
            pipeline_model_parallel_size=layout.pipeline_parallel_size,
        ),
        memory=replace(
            config.memory,
            parallel_size=layout.memory_parallel_size,
            # A copy of bf16 values that trainings make: nothing of it is stored.
            fp8_values=config.memory.fp8_values and is_bf16,
        ),
        precision=PrecisionConfig(bf16=is_bf16),
        checkpoint=CheckpointConfig(),
        data=data,
    )


def _dtype_of(state: SavedState, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or state.weights["embedding.word_embeddings.weight"].dtype


def _tensors(
    state: SavedState, num_tokens: int, config: Config, dtype: torch.dtype | None
) -> Tensors:
    padded = padded_vocab_size(
        num_tokens,
        config.data.make_vocab_size_divisible_by,
        config.parallel.tensor_model_parallel_size,
    )

    def pad(name: str, tensor: LazyTensor) -> LazyTensor:
        return tensor.with_zero_rows(padded) if name in _PADDED else tensor

    dtype = _dtype_of(state, dtype)
    tensors = {n: pad(n, t.to(dtype, n)) for n, t in state.exact_weights.items()}
    if state.moments and dtype != torch.float32:
        for name, tensor in state.exact_weights.items():
            tensors[f"optimizer.state.fp32_param.{name}"] = pad(
                name, tensor.to(torch.float32, name)
            )
    for kind, moments in state.moments.items():
        for name, tensor in moments.items():
            tensors[f"optimizer.state.{kind}.{name}"] = pad(name, tensor)
    return tensors | state.usage


def _common(state: SavedState, layout: Layout) -> dict:
    """The plain values that `checkpoint.finding` looks for."""
    common = dict(state.common)
    for name in ("optimizer", "opt_param_scheduler"):
        if not state.moments:
            common.pop(name, None)
    if not state.usage:
        common.pop(USAGE_SINCE, None)
    if state.generation is not None:
        common[GENERATION] = state.generation.as_common()
    if state.moments and "optimizer" not in common:
        common["optimizer_step"] = state.iteration
    return common | {
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "vocab_size": state.vocab_size,
        "layout": {
            "tensor": layout.tensor_parallel_size,
            "pipeline": layout.pipeline_parallel_size,
            "context": 1,
            "expert": layout.memory_parallel_size,
            "data": layout.memory_parallel_size,
            "sequence_parallel": int(layout.tensor_parallel_size > 1),
        },
        "device": "cpu",
        "has_generators": False,
        MARK: True,
        "content_metadata": {"chained_optim_avoid_prefix": True},
    }
