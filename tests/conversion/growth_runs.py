"""Small trained checkpoints to grow, and the tool's run on one."""

import contextlib
import io
from pathlib import Path
from typing import Any

from megatron_memory.config import Config, PrecisionConfig, load_config
from tests.training.tiny_runs import change, tiny_config
from tools.grow import main

STEPS = 2
"""Before the growth, and after it."""
OPTIONS = {"softmax_sink": True, "gated": True, "qk_norm": True}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"layers": None},
    "memory+": {"layers": "0,1", "beside_mlp": True} | OPTIONS,
    "pkm": {"layers": "1", "variant": "pkm"},
    "peer": {"layers": "1", "variant": "peer"},
    "bf16": {"layers": "1"},
}
SIZES = {"num_heads": 2, "top_k": 2, "num_half_keys": 8}


def first_config(dataset: str, name: str, save: Path) -> Config:
    """The training of a model by its name in `MODELS`.

    Adam's epsilon is far below gradients that are shared by four or sixteen copies, and nothing is
    clipped: both would make the copies' steps another one's.
    """
    return tiny_config(
        dataset,
        optimizer=dict(lr=1e-2, lr_decay_iters=20, adam_eps=1e-20, clip_grad=0.0),
        memory=SIZES | {"value_clip_grad": 0.0} | MODELS[name],
        training=dict(micro_batch_size=2, global_batch_size=8, train_iters=STEPS, eval_iters=0),
        checkpoint={"save": str(save)},
        precision=PrecisionConfig(bf16=name == "bf16"),
    )


def next_config(first: Config, load: Path, **parallel: Any) -> Config:
    """The training that goes on from a checkpoint, whose config.yaml says what model it is."""
    saved = load_config(load / "config.yaml")
    config = change(first, "memory", **vars(saved.memory))
    config = change(config, "training", train_iters=2 * STEPS)
    config = change(config, "parallel", **parallel)
    return change(config, "checkpoint", save=None, load=str(load))


def grow(*argv: str | Path | float) -> tuple[int, str]:
    """Run the tool in this process: its exit code, and all that it printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main([str(word) for word in argv])
    return code, text.getvalue()
