"""Machines whose memory does not suffice."""

from pathlib import Path

from conftest import ROOT

from fault_suite.account import Fault
from fault_suite.bench import Bench, Limit, rows

# Enough for a process that has begun, and less than what is asked for here.
ADDRESSES = Limit("RLIMIT_AS", 16 * 2**30)


def faults(bench: Bench) -> list[Fault]:
    """Steps and features that are too large."""
    return [
        Fault("a step that does not fit", lambda: _step(bench)),
        Fault("features that do not fit", lambda: _features(bench)),
    ]


def _step(bench: Bench) -> None:
    workdir = bench.root / "large step"
    words = ("--config.student=vit_tiny", "--config.batch=24", "--config.data.crop=1960")
    said = _refused(bench, bench.command(workdir, *words))
    assert "--config.grad_accum_steps=2" in said
    assert '"failed"' in (workdir / "heartbeat.json").read_text()
    # The same workdir takes a smaller run.
    after = bench.run(bench.command(workdir, "--config.steps=2"))
    assert after.returncode == 0, after.stdout + after.stderr
    assert [row["step"] for row in rows(workdir)] == [0, 1, 2]


def _features(bench: Bench) -> None:
    workdir = bench.root / "large features"
    said = _refused(bench, _evaluation(bench, workdir, side=2800))
    assert "a smaller --config.batch" in said
    assert not (workdir / "results.json").exists()
    after = bench.run(_evaluation(bench, workdir, side=28))
    assert after.returncode == 0, after.stdout + after.stderr
    assert (workdir / "results.json").exists()


def _evaluation(bench: Bench, workdir: Path, side: int) -> list[str]:
    """Of the teacher with itself, which needs no classes."""
    return [
        *bench.command(workdir)[:2],
        f"--config={ROOT / 'configs' / 'eval' / 'analysis.py'}",
        f"--workdir={workdir}",
        *(f"--config.model={bench.teacher}", f"--config.analysis.teacher={bench.teacher}"),
        *(f"--config.data.root={bench.images}", "--config.data.workers=0", "--config.batch=24"),
        *(f"--config.data.resize={side}", f"--config.data.crop={side}"),
    ]


def _refused(bench: Bench, command: list[str]) -> str:
    result = bench.run_limited(command, ADDRESSES)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "has not enough memory (" in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr
