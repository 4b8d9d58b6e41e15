"""The error of a training under way."""


class TrainingError(RuntimeError):
    """The training cannot go on: its loss or gradient is not a number."""
