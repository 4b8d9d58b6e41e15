"""Language models whose knowledge lives in a trainable memory, on Megatron-Core."""

__version__ = "0.1.0"
