"""`--dry-run`: its lines, for any number of ranks, without making the model."""

from pathlib import Path

import pytest

from megatron_memory.exceptions import ConfigurationError
from megatron_memory.train import main

MODELS = Path(__file__).parents[2] / "examples" / "models"
PAPER = [
    *("--num-layers", "24", "--hidden-size", "2048", "--num-attention-heads", "16"),
    *("--ffn-hidden-size", "5632", "--swiglu", "--disable-bias-linear"),
    *("--normalization", "RMSNorm", "--untie-embeddings-and-output-weights"),
    *("--position-embedding-type", "rope", "--seq-length", "2048"),
    *("--micro-batch-size", "4", "--global-batch-size", "512", "--train-iters", "1000"),
    *("--lr", "1e-4", "--vocab-size", "32000", "--bf16", "--device", "cuda", "--dry-run"),
]


def _lines(arguments: list[str], capsys: pytest.CaptureFixture) -> list[str]:
    assert main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_papers_1_3b_model_with_a_million_values(capsys: pytest.CaptureFixture):
    """The paper reports 3.377b for Memory+ 1M; not all of its shapes are known."""
    lines = _lines([*PAPER, "--memory-layers", "centered:3:8"], capsys)
    total = next(line for line in lines if line.startswith("Parameters"))
    number = int(total.split()[1].rstrip(";").replace(",", ""))
    assert number == pytest.approx(3.377e9, rel=0.03)
    assert "  memory values: 2,147,483,648; on each rank 2,147,483,648" in lines
    assert (
        "  memory layers 4, 12, 20 (counted from 0), one table for all: 1,048,576 rows of 2048"
        in lines
    )
    assert any(line.startswith("Tokens: 1,048,576 a step (512 sequences of 2048") for line in lines)


PAPERS_PARAMETERS = {"134m": 937e6, "1.3b": 3.377e9, "8b": 64e9 + 8e9}
"""With memory, as far as the paper reports them; 8b: memory and base."""


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.yaml")), ids=lambda file: file.stem)
def test_example_models(file: Path, capsys: pytest.CaptureFixture):
    lines = _lines(["--config", str(file), "--dry-run"], capsys)
    whole = next(line for line in lines if line.startswith("Parameters"))
    number = int(whole.split()[1].rstrip(";").replace(",", ""))
    if file.stem in PAPERS_PARAMETERS:
        # The 8b base's memory is 4096 x 4096 values of 4096, which the paper rounds to 64b.
        assert number == pytest.approx(PAPERS_PARAMETERS[file.stem], rel=0.07)


def test_values_add_no_flops_but_the_rows_read(capsys: pytest.CaptureFixture):
    def flops(half_keys: str) -> dict[str, int]:
        memory = ["--memory-layers", "4,12,20", "--memory-num-half-keys", half_keys]
        lines = _lines([*PAPER, *memory], capsys)
        return {
            line.split(":")[0].strip(): int(line.split(":")[1].split("(")[0].replace(",", ""))
            for line in lines
            if line.startswith("  ") and line.endswith("%)")
        }

    small, large = flops("1024"), flops("8192")
    assert small["weighted sum of values"] == large["weighted sum of values"]
    differing = [name for name in small if small[name] != large[name]]
    assert differing == ["memory key scores"]


def test_more_ranks_than_can_be_listed(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", str(10**18))
    many = ["--memory-layers", "4,12,20", "--global-batch-size", str(4 * 10**18)]
    lines = _lines([*PAPER, *many], capsys)
    assert "  ranks 0, 1, 2, ...: columns 0 to 2047 of the tables held there" in lines


def test_any_number_of_ranks(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "32")
    parallel = ["--tensor-model-parallel-size", "8", "--use-distributed-optimizer"]
    lines = _lines([*PAPER, "--memory-layers", "4,12,20", *parallel], capsys)
    assert any("32 ranks = 8 tensor-parallel x 4 data-parallel" in line for line in lines)
    assert "  ranks 7, 15, 23, ...: columns 1792 to 2047 of the tables held there" in lines
    assert "  memory values: 2,147,483,648; on each rank 268,435,456" in lines
    values = next(line for line in lines if line.startswith("  values:"))
    # 2^28 values: 2 bytes each, 4 of gradient, and 4 + 8 bytes over 4 data-parallel ranks.
    assert values == (
        "  values: weights (bf16) 512.00 MiB, gradients (fp32) 1.00 GiB, "
        "main weights (fp32) 256.00 MiB, optimizer states (fp32) 512.00 MiB"
    )


def test_columns_over_data_parallel_neighbours(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    parallel = ["--tensor-model-parallel-size", "2", "--use-distributed-optimizer"]
    flags = [*PAPER, "--memory-layers", "4,12,20", *parallel, "--memory-parallel-size", "4"]
    assert any("8 ranks = 2 tensor-parallel x 4 data" in line for line in _lines(flags, capsys))
    monkeypatch.setenv("WORLD_SIZE", "16")
    lines = _lines(flags, capsys)
    assert (
        "  groups of 8 ranks share a table's columns: 2 tensor-parallel x 4 data-parallel "
        "neighbours"
    ) in lines
    # Rank 2 is the first tensor-parallel rank's second data-parallel neighbour.
    assert "  ranks 2, 10: columns 256 to 511 of the tables held there" in lines
    assert "  ranks 1, 9: columns 1024 to 1279 of the tables held there" in lines
    assert "  memory values: 2,147,483,648; on each rank 268,435,456" in lines
    values = next(line for line in lines if line.startswith("  values:"))
    # As at TP 8, but the states have two ranks to share them, and everything else has eight.
    assert "gradients (fp32) 1.00 GiB, main weights (fp32) 512.00 MiB" in values


def test_layers_and_tables_on_pipeline_ranks(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Interleaved stages of two layers bring layers eight apart to one rank, and their table."""
    monkeypatch.setenv("WORLD_SIZE", "16")
    pipeline = ["--pipeline-model-parallel-size", "4", "--tensor-model-parallel-size", "2"]
    pipeline += ["--num-layers-per-virtual-pipeline-stage", "2"]
    lines = _lines([*PAPER, "--memory-layers", "4,12,20", *pipeline], capsys)
    assert "Placement: 16 ranks = 2 tensor-parallel x 2 data-parallel x 4 pipeline" in lines
    assert (
        "  pipeline rank 2 (ranks 8 to 11): layers 4 to 5 | 12 to 13 | 20 to 21; memory layers "
        "4, 12, 20, table shared" in lines
    )
    assert (
        "  pipeline rank 0 (ranks 0 to 3): layers embedding + 0 to 1 | 8 to 9 | 16 to 17" in lines
    )
    assert "  ranks 9, 11: columns 1024 to 2047 of the tables held there" in lines
    assert any("of pipeline rank 2, the fullest" in line for line in lines)
    assert any(line.startswith("  between stages (pipeline, 4 ranks): send") for line in lines)


def test_values_in_fp8_are_counted(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def total(lines: list[str]) -> float:
        line = next(line for line in lines if line.startswith("Memory on each rank"))
        return float(line.split()[4].replace(",", ""))

    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = [*PAPER, "--memory-layers", "4,12,20", "--tensor-model-parallel-size", "8"]
    plain = _lines(flags, capsys)
    fp8 = _lines([*flags, "--memory-fp8-values", "--memory-kernels", "triton"], capsys)
    # 2^20 rows of 256 bytes and a scale of four.
    assert "  values in fp8, with a scale a row: 260.00 MiB" in fp8
    assert total(fp8) - total(plain) == pytest.approx(260 / 1024, abs=0.011)
    assert "  kernels: Triton; values are read in fp8" in fp8
    auto = "  kernels: Triton on GPUs that run it, else torch; values are read as they are stored"
    assert auto in plain


def test_what_was_not_checked_is_said(capsys: pytest.CaptureFixture):
    on_cpu = [flag if flag != "cuda" else "cpu" for flag in PAPER]
    assert not any(line.startswith("Not checked") for line in _lines(on_cpu, capsys))
    grouped = [*PAPER, "--num-query-groups", "2", "--tensor-model-parallel-size", "4"]
    assert [line for line in _lines(grouped, capsys) if line.startswith("Not checked")] == [
        "Not checked: activations of GPUs' layers are from reading the code, not measured",
        "Not checked: the gathering of --num-query-groups 2 over --tensor-model-parallel-size 4 is "
        "not counted",
    ]


def test_memory_beside_the_mlp_keeps_its_parameters_and_flops(capsys: pytest.CaptureFixture):
    memory = ["--memory-layers", "4,12,20"]
    beside, without = (
        _lines([*PAPER, *memory, *more], capsys) for more in (["--memory-beside-mlp"], [])
    )
    assert any("20 (counted from 0), beside their MLPs, one table" in line for line in beside)
    three_mlps = 3 * 3 * 2048 * 5632
    assert _number(beside, "Parameters: ") - _number(without, "Parameters: ") == three_mlps
    # Forward and backward are six operations a weight.
    flops = [_number(lines, "FLOPs of a training token: ") for lines in (beside, without)]
    assert flops[0] - flops[1] == 6 * three_mlps


def _number(lines: list[str], prefix: str) -> int:
    line = next(line for line in lines if line.startswith(prefix))
    return int(line.removeprefix(prefix).split()[0].rstrip(";,").replace(",", ""))


def test_model_without_memory(capsys: pytest.CaptureFixture):
    lines = _lines(PAPER, capsys)
    assert not any("values:" in line or "memory layers" in line for line in lines)


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert main([*PAPER, "--tensor-model-parallel-size", "4"]) == 2
    assert ConfigurationError.__name__ in capsys.readouterr().err
