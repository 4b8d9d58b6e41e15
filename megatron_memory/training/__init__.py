"""The training program: set-up, step, loop, checkpoints and reports."""
