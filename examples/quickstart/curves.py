"""Reads TensorBoard's curves back."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_curves(folder: Path) -> dict[str, list[float]]:
    """Every scalar's values in the order of the iterations; a resumed run continues the first's."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [event.value for event in sorted(accumulator.Scalars(tag), key=lambda e: e.step)]
        for tag in accumulator.Tags()["scalars"]
    }
