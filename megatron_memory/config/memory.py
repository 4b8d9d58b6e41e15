"""The memory layers and the table of values they read."""

from dataclasses import dataclass
from typing import Literal

from megatron_memory.config.option import derived, option


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory layers ("Memory Layers at Scale", arXiv 2412.09764). Flags begin with `--memory-`.

    The paper's and its reference's names, where ours differ: `mem_n_keys` is `num_half_keys`,
    `mem_knn` is `top_k`, `mem_k_dim` is `key_dim`, `mem_v_dim` is `value_dim`.
    The derived fields are computed when the component joins a `Config`.
    """

    layers: str | None = None
    """Layers with a memory, in place of their MLP without --memory-beside-mlp: numbers counted from
    0 ("4,12,20"), or "centered:3:8" for three layers around the middle, eight apart. None: no
    memory."""
    beside_mlp: bool = False
    """Memory layers keep their MLP, and the memory's output is added to the MLP's."""
    variant: Literal["pkm", "memory+", "peer"] = "memory+"
    """pkm: the weighted sum itself; memory+: gated by silu of a projection of the input, then
    projected; peer: table rows as single-neuron experts."""
    num_heads: int = option(4, at_least=1)
    """Heads, each with its own query and its own two sets of half-keys."""
    top_k: int = option(32, at_least=1)
    """Values that each head reads for a token."""
    num_half_keys: int = option(1024, at_least=1, at_most=46340)
    """Half-keys in each of a head's two sets; the table has the square of this many rows."""
    key_dim: int = derived("half of --memory-value-dim", at_least=2)
    """Width of a key: the sum of both halves."""
    value_dim: int = derived("--hidden-size", at_least=1)
    """Width of a table row. When it is not the hidden size, the output is projected."""
    gated: bool = False
    """Multiply the layer's output by a sigmoid of a projection of its input."""
    qk_norm: bool = False
    """RMSNorm of the memory's queries and keys, for large memories on small models."""
    num_random_values: int = option(0, at_least=0)
    """Random rows that each head reads in addition to its best ones while training."""
    softmax_sink: bool = False
    """An extra logit in each head's softmax, learned from zero, so that a head can read nothing."""
    query_dropout: float = option(0.0, at_least=0, below=1)
    """Dropout of the queries."""
    value_dropout: float = option(0.0, at_least=0, below=1)
    """Dropout of the weighted sum of values."""
    share_scope: Literal["model", "stage", "layer"] = "model"
    """One table for all memory layers of the model, one for those of each pipeline rank, or one
    for each layer."""
    share_groups: str | None = None
    """With --memory-share-scope stage: the layers that share a table, as "4,12;20". Without this
    flag they follow from the pipeline; a checkpoint remembers them, for other layouts."""
    replicate_pool: bool = False
    """Let a table that layers on several pipeline ranks read have a copy on each, and sum the
    copies' gradients in every step. --dry-run says what that costs."""
    value_lr: float = option(1e-3, at_least=0)
    """Peak learning rate of the values; it follows the schedule of --lr."""
    value_min_lr: float = derived("--memory-value-lr x --min-lr / --lr", at_least=0)
    """Lowest learning rate of the values."""
    value_weight_decay: float = option(0.0, at_least=0)
    """Weight decay of the values."""
    value_clip_grad: float = option(1.0, at_least=0)
    """Largest norm of the values' gradient, apart from all other parameters'. 0: no clipping."""
    parallel_size: int = option(1, at_least=1)
    """Data-parallel neighbours over which the table's columns are split further: each looks up the
    tokens of all in its own columns. For tables that the tensor-parallel ranks cannot hold."""
    fp8_values: bool = False
    """Read the values in fp8 (e4m3, a scale a row), which halves the bytes read; the bf16 values
    stay what is trained and saved. Takes another byte a value. Needs --bf16."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """What computes the layers: Triton's kernels, or torch's operators. auto: Triton on GPUs of
    compute capability 8.0 and newer, else torch."""
    log_usage: bool = True
    """Log the share of rows read and how evenly, at every --log-interval."""

    @property
    def enabled(self) -> bool:
        """Whether the model has memory layers."""
        return self.layers is not None

    @property
    def num_values(self) -> int:
        """Rows of one table."""
        return self.num_half_keys**2
