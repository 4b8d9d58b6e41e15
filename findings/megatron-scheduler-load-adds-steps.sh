#!/usr/bin/env bash
# Guess: OptimizerParamScheduler.load_state_dict puts the scheduler where the saved one was,
# whatever it did before; to load the same state twice is to load it once.
#
# Really: it adds the saved number of steps to those that the scheduler has taken. Loaded a second
# time, or into a scheduler that has been used (to go back to a checkpoint within a run, say), the
# learning rate is that of a later step. Nothing is said.
#
# Seen with megatron-core 0.16.1.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --no-compile megatron-core==0.16.1

CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" -I -W ignore - <<'PY'
import sys

import megatron.core
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

print("megatron-core", megatron.core.__version__)


class Optimizer:
    def __init__(self):
        self.param_groups = [{"lr": 0.0, "params": []}]


def new():
    """From 1 down to 0 in 100 steps."""
    return OptimizerParamScheduler(
        Optimizer(),
        init_lr=0.0,
        max_lr=1.0,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=100,
        lr_decay_style="linear",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=100,
        wd_incr_style="constant",
    )


def seen(what, scheduler):
    rate = round(scheduler.optimizer.param_groups[0]["lr"], 6)
    print(f"{what:34} step {scheduler.num_steps}, learning rate {rate}")
    return scheduler.num_steps, rate


saved = new()
saved.step(30)
state = saved.state_dict()
found = [seen("saved", saved)]
loaded = new()
loaded.load_state_dict(state)
found.append(seen("loaded by a new one", loaded))
loaded.load_state_dict(state)
found.append(seen("loaded once more", loaded))
used = new()
used.step(10)
used.load_state_dict(state)
found.append(seen("loaded by one that took 10 steps", used))
if found != [(30, 0.7), (30, 0.7), (60, 0.4), (40, 0.6)]:
    sys.exit("the behaviour changed")
PY
