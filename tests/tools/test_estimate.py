"""`tools/estimate.py`, and docs/scaling.md, whose tables are its figures."""

import json
import re
from pathlib import Path

import pytest

from megatron_memory.planning.flops import flops_per_token
from megatron_memory.planning.hardware import GPUS
from tools import estimate, scaling_tables

REPOSITORY = Path(__file__).parents[2]
MODEL = str(REPOSITORY / "examples" / "models" / "134m.yaml")
SCALING = (REPOSITORY / "docs" / "scaling.md").read_text("utf-8")


def _run(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert estimate.main(["--config", MODEL, "--num-gpus", "8", *arguments]) == 0
    return capsys.readouterr().out


def test_text_names_every_part(capsys: pytest.CaptureFixture):
    text = _run(capsys, "--tensor-model-parallel-size", "2", "--sequence-parallel")
    for expected in (
        "8 x h100 in nodes of 8: 80 GB",
        "nothing was measured on GPUs",
        "Parameters: 9",
        "optimizer states:",
        "memory: slots and weights: all-gather over 2 tensor ranks",
        "values' gradients: reduce-scatter over 4 copies ranks",
        "MFU",
        "Largest memory that fits in this layout: --memory-num-half-keys",
        "The fastest layouts that fit:",
        "--memory-parallel-size",
    ):
        assert expected in text, expected


def test_json_is_for_programs(capsys: pytest.CaptureFixture):
    found = json.loads(_run(capsys, "--json", "--no-search", "--gpu", "h200"))
    assert found["gpu"]["memory"] == 141e9 and found["fits"] and found["problem"] is None
    assert found["parameters"]["values"] == 1024**2 * 768
    config = estimate.parse_arguments(["--config", MODEL, "--dry-run"])
    assert found["flops_per_token"] == flops_per_token(config, 32000)
    (rank,) = found["memory"]
    assert rank["total"] > rank["values"]["weights"] == 2 * 1024**2 * 768
    assert found["time"]["with_overlap"] <= found["time"]["without_overlap"]
    assert {each["purpose"] for each in found["exchanges"]["0"]} == {
        "gradients",
        "weights",
        "values' gradients",
        "values' weights",
    }


def test_a_gpu_is_corrected(capsys: pytest.CaptureFixture):
    found = json.loads(
        _run(capsys, "--json", "--no-search", "--gpu-memory", "20", "--gpu-tflops", "100")
    )
    assert found["gpu"]["memory"] == 20e9 and found["gpu"]["bf16_flops"] == 100e12
    assert not found["fits"]


def test_what_cannot_run_is_planned_anew(capsys: pytest.CaptureFixture):
    text = _run(capsys, "--memory-parallel-size", "3")
    assert "As given it cannot run" in text and "The fastest layouts that fit:" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu", "x100"], "--gpu x100 is not known: choose one of a100, h100"),
        (["--memory-parallel-size", "3", "--no-search"], "not a multiple of"),
        (["--unknown-flag", "3"], "--unknown-flag"),
        *(
            ([f"--gpu-{name}", value], f"--gpu-{name} {float(value)}: give a number above 0")
            for name in ("memory", "network")
            for value in ("0", "-1", "nan", "inf")
        ),
        (["--link-efficiency", "nan"], "--link-efficiency nan: give a part"),
        (["--matrix-efficiency", "1.1"], "--matrix-efficiency 1.1: give a part"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    assert estimate.main(["--config", MODEL, "--num-gpus", "8", *arguments]) == 2
    assert message in capsys.readouterr().err


def _tables() -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", SCALING, re.MULTILINE)


def test_scaling_document_has_the_gpus_that_the_tool_knows():
    rows = [line.strip("| ").split(" | ")[:6] for line in _tables()[0].splitlines()[2:]]
    assert [row[0] for row in rows] == list(GPUS)
    for name, *shown in rows:
        gpu = GPUS[name]
        figures = (gpu.memory / 1e9, gpu.bandwidth / 1e12, gpu.bf16_flops / 1e12)
        figures += (gpu.nvlink / 1e9, gpu.network / 1e9)
        assert [float(each) for each in shown] == pytest.approx(figures, rel=1e-3)


def _table(number: int) -> list[str]:
    header, rule, *rows = _tables()[1 + number].splitlines()
    assert (header, rule) == (scaling_tables.HEADER, scaling_tables.RULE)
    return rows


def test_help_of_the_tables_computes_none(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.argv", ["scaling_tables.py", "--help"])
    monkeypatch.setattr(scaling_tables, "row", lambda *_: pytest.fail("a row was computed"))
    with pytest.raises(SystemExit) as ended:
        scaling_tables.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "docs/scaling.md" in said and "| model |" not in said


def test_scaling_document_has_every_row():
    for number, rows in enumerate((scaling_tables.papers_rows(), scaling_tables.trillion_rows())):
        expected = list(rows)
        assert len(_table(number)) == len(expected)
        for line, (model, *_, gpu, num_gpus) in zip(_table(number), expected, strict=True):
            assert line.startswith(f"| {model} |") and f"| {num_gpus} {gpu} |" in line


@pytest.mark.parametrize("number, index", [(0, 0), (0, 62), (1, 2)])
def test_scaling_document_says_what_the_tool_finds(number: int, index: int):
    """Some rows; all of them take minutes."""
    rows = (scaling_tables.papers_rows, scaling_tables.trillion_rows)[number]
    assert _table(number)[index] == scaling_tables.row(*list(rows())[index])
