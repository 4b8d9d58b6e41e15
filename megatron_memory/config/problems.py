"""Reporting everything that is wrong at once, instead of one thing a run."""

from collections.abc import Iterable

from megatron_memory.exceptions import ConfigurationError


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one `ConfigurationError` with all messages; do nothing where there are none."""
    messages = list(dict.fromkeys(problems))
    if len(messages) == 1:
        raise ConfigurationError(messages[0])
    if messages:
        listed = "\n".join(f"- {message}" for message in messages)
        raise ConfigurationError(f"The configuration has {len(messages)} problems:\n{listed}")
