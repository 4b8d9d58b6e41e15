"""What tests expect of the two lines of megatron-core."""

from megatron_memory.upstream import LINE

COMMON_FILES = ("common.pt",) if LINE == "0.16" else ()
"""Files of a checkpoint that hold plain values alone."""
