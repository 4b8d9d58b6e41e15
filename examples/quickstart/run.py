"""Train a small memory model on real text, stop it half-way, resume it, and ask it questions.

    make quickstart                      (or: python examples/quickstart/run.py)

Runs on the GPUs of this machine, or on its CPU with two processes. Everything goes to
runs/quickstart.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from ask import ask_model
from corpus import TOKENIZER, prepare_corpus
from curves import read_curves

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "train.yaml"


def main() -> None:
    """The quickstart, top to bottom."""
    args = _parse_arguments()
    started = time.monotonic()
    run = _new_folder(args.output)
    layout = _layout(args.device)
    print(f"Running on {layout['where']}; everything goes to {run.parent}\n")
    print("[1/4] Real text: WordNet 3.0 and facts from the ISO lists, tokenised for Megatron")
    prefixes = prepare_corpus(run.parent / "data")
    print(f"\n[2/4] Training, first half: {args.train_iters // 2} of {args.train_iters} iterations")
    training = _training_command(args, run, layout, prefixes)
    _run([*training, "--exit-interval", str(args.train_iters // 2)])
    print("\n[3/4] A new start from the checkpoint, second half")
    _run([*training, "--load", str(run / "checkpoints"), "--exit-on-missing-checkpoint"])
    print("\n[4/4] Questions to the trained model\n")
    answers = ask_model(run / "checkpoints", layout["device"], args.num_questions)
    _summary(run, training, answers, time.monotonic() - started)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--train-iters", type=int, default=480, help="iterations, an even number")
    parser.add_argument("--num-questions", type=int, default=60, help="facts to ask about")
    args = parser.parse_args()
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file: give a folder")
    if args.train_iters < 2 or args.train_iters % 2:
        parser.error(f"--train-iters {args.train_iters}: it stops half-way; give an even number")
    return args


def _new_folder(output: Path) -> Path:
    """A folder of this run's own: earlier runs stay as they are."""
    number = 1
    while (output / f"run-{number}").exists():
        number += 1
    run = output / f"run-{number}"
    run.mkdir(parents=True)
    return run


def _layout(device: str) -> dict:
    """Tensor parallel over two processes; more GPUs are data parallel, one GPU stands alone."""
    num_gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and num_gpus == 0:
        sys.exit("--device cuda: torch sees no GPU here; python tools/doctor.py says why")
    if num_gpus == 0:
        return dict(where="the CPU, 2 processes", device="cpu", tensor=2, data=1)
    if num_gpus == 1:
        return dict(where=torch.cuda.get_device_name(0), device="cuda", tensor=1, data=1)
    data = 1 << ((min(num_gpus, 16) // 2).bit_length() - 1)
    return dict(where=f"{2 * data} GPUs", device="cuda", tensor=2, data=data)


def _training_command(args, run: Path, layout: dict, prefixes: dict[str, Path]) -> list[str]:
    options = {
        "--config": CONFIG,
        "--device": layout["device"],
        "--tensor-model-parallel-size": layout["tensor"],
        "--micro-batch-size": 8 // layout["data"],
        "--train-iters": args.train_iters,
        "--eval-interval": args.train_iters // 2,
        "--tokenizer-model": TOKENIZER,
        "--data-cache-path": run.parent / "data" / "cache",
        "--save": run / "checkpoints",
        "--tensorboard-dir": run / "tensorboard",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={layout['tensor'] * layout['data']}"]
    command = [*torchrun, "-m", "megatron_memory.train"]
    command += [str(item) for pair in options.items() for item in pair]
    # Half of the text a batch sees are facts, so that each is seen some tens of times.
    command += ["--train-data-path", "0.5", str(prefixes["train"]), "0.5", str(prefixes["facts"])]
    command += ["--valid-data-path", str(prefixes["held_out"])]
    return command + (["--sequence-parallel"] if layout["tensor"] > 1 else [])


def _run(command: list[str]) -> None:
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    result = subprocess.run(command, env=environment)
    if result.returncode:
        sys.exit(f"The training failed with exit code {result.returncode}; its message is above.")


def _summary(run: Path, training: list[str], answers: str, seconds: float) -> None:
    curves = read_curves(run / "tensorboard")
    losses, speed = curves["loss/validation"], curves["speed/tokens_per_second"]
    checkpoints = run / "checkpoints"
    dense = " ".join(training).replace(str(run), f"{run}-dense")
    print(f"""
{answers}
Validation loss on held-out WordNet text: {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end
Speed: {median(speed):,.0f} tokens/s (median); all of it took {seconds / 60:.1f} minutes
Curves: {run / "tensorboard"}   Checkpoints: {checkpoints}

Try next:
  {sys.executable} -m megatron_memory.generate --load {checkpoints} --prompt "The currency code of"
  {sys.executable} -m tensorboard.main --logdir {run / "tensorboard"}
  {dense} --memory-layers none
(the last one trains the dense model of the same shape, to compare its curves)""")


if __name__ == "__main__":
    main()
