"""The benchmarks run, at tiny sizes; what they measure is of no interest here."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import compiler
import pytest
from commands import until
from conftest import ROOT


def loaded(name: str) -> Any:
    """A file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


accelerator, hlo_floor = loaded("accelerator"), loaded("hlo_floor")

COMMON = {"image": 28, "rounds": 1, "precision": "float32", "blocks": 1}


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", compiler.FLAGS)
    return accelerator.Runner(COMMON, 5, tmp_path / "results.jsonl")


def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Every job is this program from now on."""
    script = tmp_path / "job.py"
    script.write_text(code)
    monkeypatch.setattr(accelerator, "JOB", script)


@pytest.mark.slow
def test_accelerator(runner: Any) -> None:
    """Each kind of job; what a CPU lacks is told, and nothing else is lost by it."""
    sizes = {"pair": "T", "batch": 4}
    (machine,) = runner.run("machine")
    assert machine["device"] == "cpu"
    found = runner.run("attention", **sizes) + runner.run("parts", **sizes)
    failed = [one for one in found if "error" in one]
    assert {one["attention"] for one in failed} == {"cudnn", "pallas"}
    assert all("expected auto or xla on a cpu" in one["error"] for one in failed)
    assert len(found) == 6 + 7
    assert all(one["seconds"] > 0 for one in found if one not in failed)
    (step,) = runner.run("step", **sizes, attention="xla", remat="blocks")
    assert step["images_per_second"] == 4 / step["seconds"]
    lines = runner.output.read_text().splitlines()
    assert [json.loads(line) for line in lines] == runner.results
    table = list(accelerator.table(runner.results))
    assert sum(line.startswith("| whole step, T, attention xla") for line in table) == 1


@pytest.mark.slow
def test_accelerator_with_torch(runner: Any) -> None:
    pytest.importorskip("torch", reason="needs requirements-parity.txt")
    (found,) = runner.run("pytorch", pair="T", batch=2, compiled=False)
    assert found["images_per_second"] > 0


def test_a_benchmark_that_hangs(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended with all that it started, and what it had found stays."""
    job(
        monkeypatch,
        tmp_path,
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print('{\"pid\": %d}' % child.pid, flush=True)\n"
        "time.sleep(600)\n",
    )
    start = time.monotonic()
    with runner.section(2):
        first, last = runner.run("step", batch=1)
        (late,) = runner.run("step", batch=2)
    assert time.monotonic() - start < 60
    assert "stopped after 2 seconds" in last["error"]
    assert late["error"] == "no time was left for it"
    state = Path(f"/proc/{first['pid']}/stat")
    # A signal takes a moment.
    until(lambda: not state.exists() or state.read_text().split()[2] == "Z")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise SystemExit('out of memory')", "exit code 1: out of memory"),
        ("import os; print('{half', flush=True); os.kill(os.getpid(), 9)", "exit code -9"),
        ("", "it ended without a word"),
    ],
)
def test_a_benchmark_that_fails(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: str
) -> None:
    job(monkeypatch, tmp_path, code)
    (found,) = runner.run("step", batch=1)
    assert told in found["error"]
    assert found["kind"] == "step"


def test_the_best_step_goes_on(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later batches and the trace use the fastest of those that ran."""
    asked: list[dict[str, Any]] = []

    def run(kind: str, **options: Any) -> list[dict[str, Any]]:
        asked.append({"kind": kind, **options})
        speed = {"cudnn": 100.0, "xla": 90.0}.get(options.get("attention", ""))
        if kind != "step" or speed is None:
            return [{"kind": kind, **options, "error": "not here"}]
        return [{"kind": kind, **options, "images_per_second": speed + len(options["remat"])}]

    monkeypatch.setattr(runner, "run", run)
    accelerator.measure(runner, "B", "L", 128, Path("profile"))
    steps = [one for one in asked if one["kind"] == "step"]
    later = [(one["pair"], one["batch"], one["attention"], one["remat"]) for one in steps[4:]]
    best = ("cudnn", "blocks")
    assert later == [(*one, *best) for one in (("B", 64), ("B", 256), ("L", 64), ("L", 128))]
    assert asked[-1]["kind"] == "trace"
    assert (asked[-1]["attention"], asked[-1]["remat"]) == best


@pytest.mark.slow
def test_step() -> None:
    pytest.importorskip("torch", reason="needs requirements-parity.txt")
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks/step.py", "--image=28", "--batch=2", "--rounds=1"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiler.FLAGS},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.splitlines()[-1].removeprefix("ratio: ")) > 0


# A loop of five rounds, each of which takes a slice of a stack and multiplies; what lies in fast
# memory moves nothing, and 100,012 rows are padded to 100,016.
PROGRAM = (ROOT / "tests" / "program.hlo").read_text()


def test_a_program_is_counted() -> None:
    rows = {row.operation.name: row for row in hlo_floor.Program(PROGRAM).rows()}
    padded, number = 100_016 * 1280 * 4, 4
    assert rows["%taken"].times == 5
    assert rows["%taken"].bytes == 5 * (2 * padded + number)
    assert rows["%taken"].cycles == 5 * 7
    assert rows["%made"].bytes == 5 * padded
    assert rows["%made"].flops == 5 * 2 * 100_012 * 1280 * 1280
    assert rows["%kernel"].flops == 4 * 2 * 257**2 * 192
    assert rows["%kernel"].bytes == 0
    found = hlo_floor.count(PROGRAM, hlo_floor.Chip(bandwidth=1.0, peak=1.0, clock=1.0))
    assert found.bytes == 5 * ((2 + 1 + 1) * padded + number)
    flops = rows["%made"].flops + rows["%kernel"].flops
    assert found.floor == 5 * ((2 + 1) * padded + number) + flops


def test_counts_agree_with_another_counter() -> None:
    other = ROOT.parent / "shared" / "tools" / "tpu_floor.py"
    if not other.is_file():
        pytest.skip("the other counter is not here")
    told = [
        subprocess.run(
            [sys.executable, program, ROOT / "tests" / "program.hlo", "v5e"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-3:]
        for program in (other, ROOT / "benchmarks" / "hlo_floor.py")
    ]
    assert told[0] == told[1]
