"""What is reported while training."""

from dataclasses import dataclass

from megatron_memory.config.option import option


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Console and TensorBoard."""

    log_interval: int = option(100, at_least=1)
    """Iterations between two reports on the console and in TensorBoard."""
    tensorboard_dir: str | None = option(None, may_differ=True)
    """Directory for TensorBoard's event files. None: no curves are written."""
