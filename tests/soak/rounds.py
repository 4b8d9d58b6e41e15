"""How often a long trial is repeated."""

import os

IS_WHOLE = os.environ.get("SOAK") == "1"
"""Whether this is `make test-slow`, and not the tenth of it that `make test` runs."""


def rounds(whole: int) -> int:
    """How many of a trial's `whole` repetitions to run here."""
    return whole if IS_WHOLE else whole // 10
