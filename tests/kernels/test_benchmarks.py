"""Every benchmark runs from end to end at tiny sizes, and says rightly what it measured."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.speed import report
from benchmarks.speed.draws import draw_indices
from benchmarks.speed.processes import SCRIPT
from benchmarks.speed.program import main
from benchmarks.speed.results import Goal, Row, summary
from benchmarks.speed.retrieval import naive_topk, torch_topk
from benchmarks.speed.roofline import Bag, Cost, Limits, floor_seconds, measure_limits
from benchmarks.speed.setting import Setting
from benchmarks.speed.timing import Stopwatch, compare
from benchmarks.speed.worker import GPU_IS_LOST, MODULES, measure
from tests.devices import TEST_DEVICE

DEVICE = torch.device(TEST_DEVICE)
LIMITS = Limits(bytes_a_second=1e9, flops_a_second=1e12)


def quick_rows(name: str, **options) -> list[Row]:
    setting = Setting(
        device=DEVICE, scale="quick", limits=LIMITS, case_seconds=0.0, **options
    )  # fmt: skip
    return list(measure(name, setting))


@pytest.mark.parametrize("name", MODULES)
def test_every_case_of_a_benchmark_runs(name: str):
    rows = quick_rows(name)
    assert rows and not [row.note for row in rows if row.failed]
    for row in rows:
        assert row.note if row.value is None else row.value > 0
        assert row.verdict == ("not run" if row.value is None else "")  # tiny sizes have no goals


def fake_reference(folder: Path, scale: float) -> Path:
    """A checkout whose backward is autograd's, with the table's gradient times `scale`."""
    path = folder / "lingua/product_key/xformer_embeddingbag.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch\n"
        "def embedding_bag_bw_rev_indices(indices, weight, per_sample_weights, gradient):\n"
        "    leaves = [t.detach().requires_grad_() for t in (weight, per_sample_weights)]\n"
        "    y = torch.nn.functional.embedding_bag(\n"
        "        indices, leaves[0], per_sample_weights=leaves[1], mode='sum')\n"
        "    y.backward(gradient)\n"
        f"    return leaves[0].grad * {scale}, leaves[1].grad\n"
    )
    return folder


def test_the_reference_is_run_from_its_checkout(tmp_path):
    rows = quick_rows("backward", reference=fake_reference(tmp_path, 1.0))
    against = [row for row in rows if row.against == "reverse_indices"]
    assert against and all(row.theirs for row in against)


def test_a_reference_that_computes_something_else_is_no_baseline(tmp_path):
    rows = quick_rows("backward", reference=fake_reference(tmp_path, 1.5))
    assert [row for row in rows if row.failed and "gradient of table differs" in row.note]
    assert not [row for row in rows if row.theirs]


def test_a_missing_file_of_the_reference_is_named(tmp_path):
    rows = quick_rows("backward", reference=tmp_path)
    assert any("xformer_embeddingbag.py is not in it" in row.note for row in rows if row.failed)


def test_retrieval_baselines_choose_the_same_slots():
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(7, 2, 8, generator=generator)
    keys = torch.randn(2, 2, 16, 4, generator=generator)
    slots, weights = naive_topk(query, keys, 5)
    ours, our_weights = torch_topk(query, keys, 5)
    assert torch.equal(slots, ours.long())
    torch.testing.assert_close(weights, our_weights)


def test_contenders_take_turns_on_the_same_fresh_inputs():
    seen: dict[str, list[int]] = {"slow": [], "fast": []}
    order = []
    draws = iter(range(1000))

    def contender(name: str, seconds: float):
        def run(watch: Stopwatch, inputs: int) -> None:
            seen[name].append(inputs)
            order.append(name)
            with watch:
                time.sleep(seconds)
            time.sleep(0.004)  # not under the watch

        return run

    samples = compare(
        {"slow": contender("slow", 0.02), "fast": contender("fast", 0.002)},
        lambda: next(draws),
        torch.device("cpu"),
        0.0,
    )
    assert seen["slow"] == seen["fast"] == list(range(7))
    assert order[4:8] == ["slow", "fast", "fast", "slow"]
    assert 0.002 <= samples["fast"].median < 0.02 <= samples["slow"].median
    assert samples["fast"].count == 5


def test_zipf_reads_popular_rows_in_proportion():
    torch.manual_seed(4)
    rows, reads = 1 << 12, 200_000
    counts = torch.bincount(
        draw_indices("zipf", reads // 100, 100, rows, torch.device("cpu")).flatten(), minlength=rows
    ).sort(descending=True)
    share = counts.values / reads
    normalizer = torch.log(torch.tensor(rows + 1.0))
    for rank in (1, 2, 8):
        wanted = torch.log(torch.tensor((rank + 1) / rank)) / normalizer
        assert abs(share[rank - 1] / wanted - 1) < 0.1  # 5 deviations of 3,000 reads at the least
    assert counts.indices[:8].diff().abs().min() > 1  # popular rows are no neighbours


def test_floors_are_those_of_the_design():
    """design.md's table at 4.3 TB/s, in milliseconds."""
    limits = Limits(bytes_a_second=4.3e12, flops_a_second=790e12)
    for columns, forward, backward in ((512, 0.51, 0.44), (1024, 1.0, 0.88), (4096, 4.0, 3.5)):
        bag = Bag(tokens=16384, bag=128, rows=1 << 20, columns=columns)
        assert 1e3 * floor_seconds([bag.forward()], limits) == pytest.approx(forward, rel=0.05)
        cost = bag.backward("rows", 2)
        assert 1e3 * floor_seconds([cost], limits) == pytest.approx(backward, rel=0.05)
    stages = [Cost(bytes=4.3e12), Cost(bytes=1.0, flops=2 * 790e12)]
    assert floor_seconds(stages, limits) == pytest.approx(3.0)


def test_limits_are_of_this_machine():
    limits = measure_limits(torch.device("cpu"), quick=True)
    assert 1e6 < limits.bytes_a_second < 1e15 and limits.flops_a_second > 0


@pytest.mark.parametrize(
    "row, verdict",
    [
        (Row(what="a", case="", ours=1.0, theirs=7.0, goal=Goal(least=6, aim=10)), "met"),
        (Row(what="a", case="", ours=1.0, theirs=10.0, goal=Goal(least=6, aim=10)), "aim"),
        (Row(what="a", case="", ours=1.0, theirs=5.9, goal=Goal(least=6, aim=10)), "MISSED"),
        (
            Row(what="a", case="", ours=3.0, theirs=2.0, measure="relative", goal=Goal(least=1.0)),
            "MISSED",
        ),
        (
            Row(what="a", case="", ours=1.0, theirs=4.0, measure="relative", goal=Goal(aim=0.25)),
            "aim",
        ),
        (
            Row(what="a", case="", ours=1.0, floor=0.8, measure="share", goal=Goal(least=0.85)),
            "MISSED",
        ),
        (Row(what="a", case="", ours=1.0, note="no", goal=Goal(least=6)), "not run"),
        (Row(what="a", case="", note="broke", failed=True), "FAILED"),
    ],
)
def test_verdicts(row: Row, verdict: str):
    assert row.verdict == verdict


def test_the_summary_counts_goals_and_names_misses():
    goal = Goal(least=6, aim=10)
    rows = [
        Row(what="good", case="x", ours=1.0, theirs=11.0, goal=goal),
        Row(what="bad", case="x", ours=1.0, theirs=3.0, goal=goal),
        Row(what="absent", case="x", ours=1.0, goal=goal, note="no reference"),
        Row(what="broken", case="x", failed=True, note="boom"),
    ]
    lines = summary(rows)
    assert lines[0].startswith("Summary: of 3 targets 1 met, 1 missed, 1 not measured; aims")
    assert lines[1:] == [
        "missed: bad, x: 3.00x, wanted >=6x",
        "FAILED: broken, x: boom",
        "not run: no reference (1 figures)",
    ]


def test_results_file_is_whole_and_names_no_path(tmp_path):
    facts = report.environment(None) | {"device": "NVIDIA H200", "date": "2026-11-21 03:00 UTC"}
    row = Row(what="bag", case="sizes", ours=1e-3, theirs=8e-3, goal=Goal(least=6))
    text = report.markdown([row], {"bag": str(LIMITS)}, facts, "python kernels/benchmarks/run.py")
    path = report.write_results(tmp_path / "results", facts, "", text)
    assert path.name == "2026-11-21-nvidia-h200.md"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    written = path.read_text()
    assert "| bag | sizes | 1.00 ms |  | 8.00 ms | 8.00x | >=6x |" in written
    assert "copy 1 GB/s" in written and torch.__version__ in written
    assert str(Path.home()) not in written and str(SCRIPT.parents[2]) not in written


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bag", "--device", "cpu", "--results", "here"], "only a GPU's run"),
        (["bag", "--rows", "1000"], "powers of two wanted"),
        (["bag", "--reference", "nowhere"], "no such folder"),
        (["rows"], "invalid choice"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        main("", arguments)
    assert message in capsys.readouterr().err


def test_the_program_gathers_its_processes(tmp_path):
    command = [sys.executable, str(SCRIPT), "retrieval", "--device", "cpu", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "retrieval forward + backward" in done.stdout and "Summary: of 0" in done.stdout
    assert done.stdout.endswith("the figures mean nothing\n")
    assert not list(tmp_path.iterdir())


def test_another_process_goes_on_after_one_that_died(monkeypatch, tmp_path, capsys):
    """0 and 4 are measured, 1 fails and the GPU with it, 2 ends its process, 3 hangs."""
    script = tmp_path / "worker.py"
    row = dict(what="a", case="x", ours=1.0, theirs=2.0, goal={})
    script.write_text(
        "import json, os, signal, sys\n"
        "path, first = (sys.argv[sys.argv.index(n) + 1] for n in ('--records', '--first-case'))\n"
        "def record(**fields):\n"
        "    with open(path, 'a') as records:\n"
        "        records.write(json.dumps(fields) + chr(10))\n"
        "record(limits='limits of ' + first)\n"
        "for number in range(int(first), 5):\n"
        "    record(number=number, what='case', case=str(number))\n"
        "    if number == 2: os._exit(7)\n"
        "    if number == 3: os.kill(os.getpid(), signal.SIGALRM)\n"
        f"    record(row={row!r} | dict(case=str(number), failed=number == 1, note='error'))\n"
        f"    if number == 1: os._exit({GPU_IS_LOST})\n"
    )
    monkeypatch.setattr("benchmarks.speed.processes.SCRIPT", script)
    assert main("", ["bag", "--device", "cpu", "--quick", "--time-limit", "9"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert failed == [
        "FAILED: a, 1: error",
        "FAILED: case, 2: its process ended with 7",
        "FAILED: case, 3: ended after 9 s; see --time-limit",
    ]


def test_a_process_that_never_begins_is_tried_once(monkeypatch, tmp_path, capsys):
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit(5)")
    monkeypatch.setattr("benchmarks.speed.processes.SCRIPT", script)
    assert main("", ["bag", "--device", "cpu", "--quick"]) == 1
    assert "FAILED: bag, all of it: its process ended with 5" in capsys.readouterr().out
