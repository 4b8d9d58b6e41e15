"""One run of the training program on one rank, from a checked configuration to the exit code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_memory.config import Config
from megatron_memory.data.datasets import Datasets, build_datasets
from megatron_memory.data.tokenizer_hash import TOKENIZER_HASH, hash_of
from megatron_memory.data.tokenizers import build_tokenizer, check_vocab_size, padded_vocab_size
from megatron_memory.exceptions import CheckpointError
from megatron_memory.planning.copies import copies_notes
from megatron_memory.planning.fit import check_parameters_fit
from megatron_memory.runtime import Backend
from megatron_memory.runtime.available_memory import available_bytes
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.runtime.kernels import choose_kernels
from megatron_memory.training.bad_steps import SpikeState, is_spike_state
from megatron_memory.training.checkpoint.changes import (
    check_data_order,
    check_optimizer_kind,
    setting_changes,
)
from megatron_memory.training.checkpoint.finding import find_start, start_position
from megatron_memory.training.checkpoint.generation import carried
from megatron_memory.training.checkpoint.lease import Lease
from megatron_memory.training.checkpoint.loader import load_checkpoint
from megatron_memory.training.checkpoint.save_folder import (
    clear_save,
    only_writer,
    settle_save,
)
from megatron_memory.training.checkpoint.saver import CheckpointSaver
from megatron_memory.training.checkpoint.shared import check_save_is_shared
from megatron_memory.training.checkpoint.state import Position
from megatron_memory.training.progress import Console
from megatron_memory.training.ranks.watch import RankWatch
from megatron_memory.training.rewinding import Rewinder
from megatron_memory.training.setup import build_training_setup
from megatron_memory.training.stopping import SignalCatcher
from megatron_memory.training.trainer import EVALUATION_IS_DUE, LOSS_SPIKES, OnStep, Trainer


def run_training(config: Config, backend: Backend, on_step: OnStep | None = None) -> int:
    """Train as the configuration says, in Megatron's groups, which stay. A collective call.

    Args:
        config: checked for this run's world size; Megatron must be prepared for its device.
        backend: of this rank.
        on_step: see `Trainer`.

    Returns:
        the exit code, see `Trainer.run`.

    Raises:
        ConfigurationError, DataError, CheckpointError, TrainingError: the first three before the
            first step, on every rank alike.
    """
    kernels = choose_kernels(config.memory.kernels, backend) if config.memory.enabled else None
    initialize_distributed(config, backend)
    console = Console(is_speaker=torch.distributed.get_rank() == 0)
    if kernels is not None:
        console.say(kernels)
    tokenizer = tokenizer_of(config)
    vocab_size = check_vocab_size(tokenizer, config.data.vocab_size)
    padded = padded_vocab_size(
        vocab_size,
        config.data.make_vocab_size_divisible_by,
        config.parallel.tensor_model_parallel_size,
    )
    check_parameters_fit(
        config, torch.distributed.get_world_size(), padded, available_bytes(backend)
    )
    if config.checkpoint.save is not None:
        check_save_is_shared(Path(config.checkpoint.save))
    with (
        RankWatch(config.parallel.rank_timeout, Path(config.checkpoint.save or ".")) as watch,
        only_writer(config.checkpoint, console.say) as lease,
    ):
        trainer = _build_trainer(
            config, backend, console, tokenizer, (vocab_size, padded), lease, on_step, watch
        )
        exit_code = trainer.run()
        # torchrun ends all ranks as soon as one of them has ended with another code than 0.
        torch.distributed.barrier()
    return exit_code


def _build_trainer(
    config: Config,
    backend: Backend,
    console: Console,
    tokenizer,
    vocab_sizes: tuple[int, int],
    lease: Lease | None,
    on_step: OnStep | None,
    watch: RankWatch,
) -> Trainer:
    """`vocab_sizes`: before and after padding."""
    vocab_size, padded = vocab_sizes
    hashed = hash_of(tokenizer)
    found = find_start(config, vocab_size, console.say)
    loaded = None if found is None else found.folder
    settle_save(config.checkpoint, loaded)
    position = start_position(found, config)
    if found is not None and not config.checkpoint.finetune:
        check_optimizer_kind(found, config)
        for change in setting_changes(found.saved, config) if found.saved is not None else ():
            console.say(f"changed since {found.folder}: {change}")
    if found is not None and found.common.get(TOKENIZER_HASH, hashed) != hashed:
        console.say(
            f"warning: {found.folder} was trained with another tokenizer than this run's: its "
            "tokens mean something else. Give the training's --tokenizer-model, if that is not "
            "meant"
        )
    datasets = _datasets(config, tokenizer, padded, position)
    for line in datasets.summary:
        console.say(line)
    for line in copies_notes(config, torch.distributed.get_world_size()):
        console.say(line)
    if found is not None:
        check_data_order(found, config, datasets.train, console.say)
    setup = build_training_setup(config, backend, padded)
    if found is not None:
        load_checkpoint(setup, found, console.say)
    clear_save(config.checkpoint, loaded, console.say)
    saver, rewind = None, None
    if config.checkpoint.save is not None:
        kept = {} if found is None else carried(found.common)
        kept[TOKENIZER_HASH] = hashed
        saver = CheckpointSaver(setup, vocab_size, lease, console.say, kept)
        start = None if config.checkpoint.finetune else found
        rewind = Rewinder(setup, saver, start, vocab_size, console.say)
    before = {} if found is None or config.checkpoint.finetune else found.common
    # From here on there is something to save. Before, a signal ends the program at once.
    signals = SignalCatcher()
    signals.install()
    return Trainer(
        setup,
        datasets,
        position,
        saver=saver,
        signals=signals,
        console=console,
        watch=watch,
        padded_vocab_size=padded,
        rewind=rewind,
        on_step=on_step,
        evaluation_is_due=before.get(EVALUATION_IS_DUE) is True,
        loss_spikes=_spikes_of(before),
    )


def _spikes_of(common: Mapping[str, Any]) -> SpikeState | None:
    state = common.get(LOSS_SPIKES)
    if not is_spike_state(state):
        raise CheckpointError(
            f"the checkpoint's {LOSS_SPIKES} is damaged: {state!r:.80}. Load an older one"
        )
    return state


def tokenizer_of(config: Config):
    """The tokenizer that the configuration names; plain numbers where it names none."""
    data = config.data
    if data.tokenizer_type is None:
        assert data.vocab_size is not None, "check_config asks for a tokenizer or a vocabulary"
        # Its end of document comes on top of the size it is given.
        return build_tokenizer("NullTokenizer", vocab_size=data.vocab_size - 1)
    return build_tokenizer(data.tokenizer_type, data.tokenizer_model, vocab_size=data.vocab_size)


def _datasets(config: Config, tokenizer, padded_vocab_size: int, position: Position) -> Datasets:
    data, training = config.data, config.training
    batch = training.global_batch_size
    iterations_left = max(0, training.train_iters - position.iteration)
    return build_datasets(
        tokenizer=tokenizer,
        padded_vocab_size=padded_vocab_size,
        seq_length=config.model.seq_length,
        num_train_samples=position.consumed_samples + iterations_left * batch,
        num_valid_samples=training.eval_iters * batch,
        num_test_samples=training.eval_iters * batch,
        seed=training.seed,
        data_path=data.data_path,
        split=data.split,
        train_data_path=data.train_data_path,
        valid_data_path=data.valid_data_path,
        test_data_path=data.test_data_path,
        data_cache_path=data.data_cache_path,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
    )
