"""What the tests of preprocessing share."""

import os

import pytest

from megatron_memory.data.preprocess import outputs, parquet, sources


@pytest.fixture
def often(monkeypatch):
    """Records after each of many small blocks, without waiting for a busy disk."""
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(parquet, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(outputs, "_SECONDS_BETWEEN_RECORDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
