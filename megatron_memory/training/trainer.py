"""The training loop: step, report, evaluate, save, stop."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_memory.data.datasets import Datasets, Samples
from megatron_memory.data.loader import batch_iterator
from megatron_memory.exceptions import CheckpointError, TrainingError
from megatron_memory.planning.flops import flops_per_token
from megatron_memory.runtime.distributed import seed_step
from megatron_memory.training.bad_steps import BadSteps, LossSpikes, Rewind, SpikeState
from megatron_memory.training.checkpoint.changes import DATA_ORDER
from megatron_memory.training.checkpoint.data_order import as_plain, read_parts
from megatron_memory.training.checkpoint.replicas import check_replicas
from megatron_memory.training.checkpoint.saver import CheckpointSaver
from megatron_memory.training.checkpoint.state import Position
from megatron_memory.training.finite import check_finite
from megatron_memory.training.metrics import Interval, Report
from megatron_memory.training.progress import Console, duration, report_line
from megatron_memory.training.ranks.watch import RankWatch
from megatron_memory.training.setup import TrainingSetup, sample_group, whole_weights
from megatron_memory.training.step import Batch, StepResult, evaluate_loss, train_step
from megatron_memory.training.stopping import SignalCatcher, Stop, StopChecker
from megatron_memory.training.tensorboard import Curves
from megatron_memory.training.throughput import fullest_rank_gib, model_flops_utilization

OnStep = Callable[[int, StepResult], None]

EVALUATION_IS_DUE = "evaluation_is_due"
"""Of a checkpoint: whether its run should have evaluated there, and was stopped."""
LOSS_SPIKES = "loss_spikes"
"""Of a checkpoint: `LossSpikes.state`."""


class Trainer:
    """Trains from a position to the last iteration, or until it is told to stop.

    Args:
        setup: of this rank, loaded.
        datasets: of the run.
        position: where to go on.
        saver: None where nothing is saved.
        signals: of this rank.
        console: where to report.
        watch: entered; told of progress.
        padded_vocab_size: of the model, for its FLOPs.
        rewind: what `--on-bad-step rewind` calls; None where there is nothing to go back to.
        on_step: called on every rank with each iteration's number and result.
        evaluation_is_due: the run before stopped when it should have evaluated.
        loss_spikes: what the run before knew of them.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        datasets: Datasets,
        position: Position,
        *,
        saver: CheckpointSaver | None,
        signals: SignalCatcher,
        console: Console,
        watch: RankWatch,
        padded_vocab_size: int,
        rewind: Rewind | None = None,
        on_step: OnStep | None = None,
        evaluation_is_due: bool = False,
        loss_spikes: SpikeState | None = None,
    ):
        self.setup = setup
        self.position = position
        self._training, self._config = setup.config.training, setup.config
        self._datasets, self._saver, self._console = datasets, saver, console
        self._on_step, self._watch = on_step, watch
        self._world_size = torch.distributed.get_world_size()
        self._num_microbatches = setup.config.num_microbatches(self._world_size)
        self._flops_per_token = sum(flops_per_token(setup.config, padded_vocab_size).values())
        self._stop_checker = StopChecker(self._training, signals, setup.backend.device)
        self._bad_steps = BadSteps(self._training, rewind, console.say)
        self._spikes = LossSpikes(self._training.loss_spike_factor, console.say, loss_spikes)
        self._usage = setup.usage
        self._interval = Interval()
        self._last_saved = position
        self._evaluation_is_due = evaluation_is_due or position.iteration == 0
        self._curves = Curves(
            setup.config.logging.tensorboard_dir,
            first_iteration=position.iteration + 1,
            is_writer=torch.distributed.get_rank() == 0,
            say=console.say,
        )

    def run(self) -> int:
        """Train. A collective call.

        Returns:
            the program's exit code: 0, or 128 + n after signal n.

        Raises:
            TrainingError: a loss, gradient or weight is not finite, or ranks' copies differ.
            SaveError: checkpoints could not be written.
            CheckpointError: another run writes to --save now.
        """
        self._started, self._start_iteration = time.monotonic(), self.position.iteration
        self._console.start(self.position.iteration, self._training.train_iters)
        try:
            stop = self._validate() if self._evaluation_is_due else None
            if stop is None:
                stop = self._run_steps()
            stop = self._finish(stop)
        except Exception as error:
            # All ranks meet it, so that together they can complete what is being written.
            if isinstance(error, TrainingError) or self._world_size == 1:
                self._complete_pending_save()
            raise
        finally:
            self._console.stop()
            self._curves.close()
        return 0 if stop is None else stop.exit_code

    def _run_steps(self) -> Stop | None:
        if self.position.iteration >= self._training.train_iters:
            self._console.say(
                f"nothing is left to train: --train-iters is {self._training.train_iters}, and "
                f"iteration {self.position.iteration} is reached"
            )
            return None
        assert self._datasets.train is not None, (
            "build_datasets refuses a run without training data"
        )
        batches = self._batches(self._datasets.train, self.position.consumed_samples)
        self._usage.turn(on=True)
        while self.position.iteration < self._training.train_iters:
            self._step(batches)
            stop = self._stop_checker.check(self.position.iteration)
            if self._is_due(self._config.logging.log_interval) or stop:
                self._report()
            self._evaluation_is_due = self._is_due(self._training.eval_interval)
            # torchrun kills 30 seconds after a SIGTERM: an evaluation would cost the checkpoint.
            # The run that goes on makes up for it.
            if self._evaluation_is_due and stop is None:
                with self._saved_before_error():
                    stop = self._validate()
            if self._is_due(self._config.checkpoint.save_interval) or stop:
                self._save()
            elif self._saver is not None:
                with self._watch.phase("saving"):
                    self._saver.poll()
            if stop:
                return stop
        return None

    def _step(self, batches: Iterator[Batch]) -> StepResult:
        began = time.perf_counter()
        seed_step(self._training.seed, self.position.iteration)
        result = train_step(
            self.setup, batches, self._num_microbatches, self._stop_checker.may_update
        )
        self.position = Position(
            iteration=self.position.iteration + 1,
            consumed_samples=self.position.consumed_samples + self._training.global_batch_size,
        )
        self._watch.advance(self.position.iteration)
        self._judge(result, time.perf_counter() - began)
        self._console.advance(self.position.iteration)
        if self._on_step is not None:
            self._on_step(self.position.iteration, result)
        return result

    def _judge(self, result: StepResult, seconds: float) -> None:
        """Count the step, and go on after a bad one as the flags say."""
        iteration = self.position.iteration
        self._interval.add(result, seconds, is_spike=self._spikes.look(iteration, result))
        if self._saver is not None:
            spike = self._spikes.spike
            self._saver.keep_before = None if spike is None else spike.first_iteration
        with self._watch.phase("rewinding" if result.skipped else "training"):
            self._bad_steps.look(iteration, result)
        if self._is_due(self._training.check_replicas_interval):
            self._check_replicas()

    def _check_replicas(self) -> None:
        with whole_weights(self.setup):
            check_replicas(self.setup, self.position.iteration)

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.position.iteration % interval == 0

    def _batches(self, dataset: Samples, consumed_samples: int) -> Iterator[Batch]:
        group = sample_group()
        batches = batch_iterator(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=self._training.micro_batch_size,
            data_parallel_rank=group.rank(),
            data_parallel_size=group.size(),
            num_workers=self._config.data.num_workers,
        )
        for batch in batches:
            self._watch.advance()
            yield batch

    def _report(self) -> None:
        interval, config, device = self._interval, self._config, self.setup.backend.device
        tokens = self._training.global_batch_size * config.model.seq_length * interval.num_steps
        per_second = tokens / interval.seconds
        tflops = per_second * self._flops_per_token / self._world_size / 1e12
        done = self.position.iteration - self._start_iteration
        pace = (time.monotonic() - self._started) / done
        dtype = torch.bfloat16 if config.precision.bf16 else torch.float32
        report = Report(
            iteration=self.position.iteration,
            loss=interval.loss,
            last=interval.results[-1],
            num_skipped=interval.num_skipped,
            num_spikes=interval.num_spikes,
            seconds_per_iteration=interval.seconds / interval.num_steps,
            tokens_per_second=per_second,
            tflops_per_device=tflops,
            mfu=model_flops_utilization(tflops, device, dtype),
            memory_gib=fullest_rank_gib(device),
            seconds_left=pace * (self._training.train_iters - self.position.iteration),
            usage=self._usage.take(),
        )
        self._interval = Interval()
        self._console.say(report_line(report, self._training.train_iters))
        self._curves.add(report.iteration, report.curves())

    def _validate(self) -> Stop | None:
        stop = self._evaluate("validation", self._datasets.valid)
        self._evaluation_is_due = stop is not None
        return stop

    def _evaluate(self, name: str, dataset: Samples | None) -> Stop | None:
        """The loss on the first batches of a held-out dataset: the same ones every time.

        Returns:
            the reason where a signal ended it.
        """
        if dataset is None or self._training.eval_iters == 0:
            return None
        began = time.perf_counter()
        self._usage.turn(on=False)
        try:
            with self._watch.phase("evaluating"), whole_weights(self.setup):
                loss = evaluate_loss(
                    self.setup,
                    self._batches(dataset, consumed_samples=0),
                    self._num_microbatches,
                    num_batches=self._training.eval_iters,
                    before_batch=self._require_no_signal,
                )
        except _Interrupted as interrupted:
            return interrupted.stop
        finally:
            self._usage.turn(on=True)
        if not math.isfinite(loss):
            raise TrainingError(
                f"iteration {self.position.iteration}: the {name} loss is {loss}. The training "
                "stops. Look at the data, or go back to a checkpoint whose loss is finite (--load "
                "SAVE/iter_N) and lower --lr"
            )
        self._curves.add(self.position.iteration, {f"loss/{name}": loss})
        self._console.say(
            f"iteration {self.position.iteration}: {name} loss {loss:.6f}, "
            f"perplexity {_perplexity(loss)} ({duration(time.perf_counter() - began)})"
        )
        return None

    def _require_no_signal(self) -> None:
        stop = self._stop_checker.check_signals()
        if stop is not None:
            raise _Interrupted(stop)

    def _save(self) -> None:
        if self._saver is None or self._last_saved == self.position:
            return
        began = time.perf_counter()
        # Also after a training has gone back for it: the last checkpoint may not be missing.
        while (damage := self._find_damage()) is not None:
            with self._watch.phase("rewinding"):
                self._bad_steps.look_at_damage(damage)
        with self._watch.phase("saving"), whole_weights(self.setup):
            check_replicas(self.setup, self.position.iteration)
            folder = self._saver.save(self.position, self._record())
        if folder is None:
            return
        self._last_saved = self.position
        how = "is being saved in the background" if self._config.checkpoint.async_save else "saved"
        self._console.say(f"{folder} {how} ({time.perf_counter() - began:.1f} s)")

    def _complete_pending_save(self) -> None:
        if self._saver is None:
            return
        try:
            with self._watch.phase("saving"):
                self._saver.finish()
        except CheckpointError as error:
            self._console.say(f"{type(error).__name__}: {error}")

    def _record(self) -> dict[str, Any]:
        """What a run that goes on must know, beyond the training's state."""
        parts = []
        if self._datasets.train is not None:
            parts = read_parts(self._datasets.train, self.position.consumed_samples)
        return {
            DATA_ORDER: as_plain(parts),
            EVALUATION_IS_DUE: self._evaluation_is_due,
            LOSS_SPIKES: self._spikes.state(),
        }

    def _find_damage(self) -> TrainingError | None:
        try:
            with self._watch.phase("saving"), whole_weights(self.setup):
                check_finite(self.setup, self.position.iteration)
        except TrainingError as damage:
            return damage
        return None

    def _finish(self, stop: Stop | None) -> Stop | None:
        if stop is None:
            if self._interval.num_steps:
                self._report()
            with self._saved_before_error():
                stop = self._evaluate_at_end()
            self._save()
        if self._saver is not None:
            with self._watch.phase("saving"):
                self._saver.close()
        if stop is not None:
            saved = "nothing is saved without --save" if self._saver is None else "saved"
            if self.position.iteration == 0:
                saved = "there is nothing to save yet"
            self._console.say(
                f"stopped after iteration {self.position.iteration}: {stop.reason}; {saved}"
            )
        return stop

    @contextlib.contextmanager
    def _saved_before_error(self) -> Iterator[None]:
        """Held-out data are no reason to lose what was trained, or the checkpoints before it."""
        try:
            yield
        except TrainingError as error:
            if self._saver is None:
                raise
            self._saver.keep_before = self.position.iteration
            self._save()
            if self._last_saved != self.position:
                raise
            raise TrainingError(
                f"{error}. The weights of this iteration, which are finite, are saved as well, and "
                "no older checkpoint is deleted for them"
            ) from error

    def _evaluate_at_end(self) -> Stop | None:
        stop = None
        if not self._is_due(self._training.eval_interval):
            stop = self._validate()
        return stop or self._evaluate("test", self._datasets.test)


class _Interrupted(Exception):
    """A signal ends an evaluation, on all ranks alike."""

    def __init__(self, stop: Stop):
        super().__init__(stop.reason)
        self.stop = stop


def _perplexity(loss: float) -> str:
    return f"{2.718281828459045**loss:.4g}" if loss < 100 else "inf"
