"""The errors that a user can fix. Each message names the flag or file, the value and the fix."""


class ConfigurationError(ValueError):
    """A flag, a key of the configuration file, or a combination of them cannot work."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to another model."""


class SaveError(CheckpointError):
    """Checkpoints cannot be written, for lack of space, permission, or a disk that works."""


class DataError(RuntimeError):
    """A data file or tokenizer is missing, damaged, or does not fit the model."""


class TrainingError(RuntimeError):
    """The training cannot go on: its loss or gradient is not a number."""


USER_ERRORS = (ConfigurationError, CheckpointError, DataError, TrainingError)
"""Programs print these without a traceback."""
