"""Runs that end when they should not: SIGKILL at any moment, signals, one host of two."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from test_hosts import free_port

from fault_suite.account import Fault
from fault_suite.bench import FLAGS, STEPS, Bench, rows, until


def kills(bench: Bench, count: int, seed: int) -> list[Fault]:
    """So many runs, each killed once or twice, at moments of three kinds: anywhere from its start,
    after some step was logged, while a save is being written.
    """
    return [
        Fault(f"run {number}", lambda number=number: _killed(bench, number, seed))
        for number in range(count)
    ]


def _killed(bench: Bench, number: int, seed: int) -> None:
    rng = random.Random(seed * 1000 + number)
    workdir = bench.root / f"killed {number}"
    for _ in range(rng.choice((1, 1, 2))):
        process = bench.start(bench.command(workdir))
        _wait_for_a_moment(rng, workdir, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    bench.goes_on_and_is_the_same(workdir)
    assert [row["step"] for row in rows(workdir)] == list(range(STEPS + 1))
    shutil.rmtree(workdir)


def _wait_for_a_moment(rng: random.Random, workdir: Path, process: subprocess.Popen) -> None:
    kind, checkpoints = rng.choice(("anywhere", "step", "save", "save")), workdir / "checkpoints"
    if kind == "anywhere":
        time.sleep(rng.uniform(0.0, 8.0))
        return
    begun = [row["step"] for row in rows(workdir)] or [-1]
    wanted = rng.randint(min(begun[-1] + 1, STEPS), STEPS)

    def come() -> bool:
        if process.poll() is not None:
            return True
        if kind == "step":
            return any(row["step"] >= wanted for row in rows(workdir))
        # Of saves that are finished and of those that are not; other names have no number.
        paths = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
        numbers = [path.name.partition(".")[0] for path in paths]
        return any(number.isdecimal() and int(number) >= wanted for number in numbers)

    until(come)
    time.sleep(rng.uniform(0.0, 0.1))


def signals(bench: Bench, *, quick: bool) -> list[Fault]:
    """Requests to stop: exit code 75, saved, and the same run after it."""
    found = [
        Fault("twice", lambda: _signalled(bench, "twice", [signal.SIGTERM, signal.SIGTERM])),
        Fault("a deadline", lambda: _deadline(bench)),
    ]
    if quick:
        # The test suite has one of each.
        return found
    return [
        *found,
        Fault("SIGTERM", lambda: _signalled(bench, "term", [signal.SIGTERM])),
        Fault("SIGINT", lambda: _signalled(bench, "int", [signal.SIGINT])),
    ]


def _signalled(bench: Bench, name: str, numbers: list[signal.Signals]) -> None:
    workdir = bench.root / f"signalled {name}"
    process = bench.start(bench.command(workdir))
    until(lambda: process.poll() is not None or len(rows(workdir)) > 5)
    start = time.monotonic()
    for number in numbers:
        os.kill(process.pid, number)
        time.sleep(0.002)
    printed, _ = process.communicate(timeout=60)
    assert time.monotonic() - start < 30
    if len(numbers) == 1:
        assert process.returncode == 75, printed
        assert re.search(
            r"interrupted at step \d+ of 24; the same command goes on from here", printed
        )
    else:
        # Before the first was heard, between both, or after the end: never a traceback.
        assert process.returncode in (75, -signal.SIGTERM), printed
        assert "Traceback" not in printed
    bench.goes_on_and_is_the_same(workdir)


def _deadline(bench: Bench) -> None:
    """A save that would take longer than a scheduler waits: the checkpoint before it is good."""
    workdir = bench.root / "deadline"
    command = bench.command(workdir, "--config.stop_within=1e-6")
    process = bench.start(command)
    until(lambda: process.poll() is not None or len(rows(workdir)) > 5)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "Traceback" not in printed
    bench.goes_on_and_is_the_same(workdir)


def hosts(bench: Bench, count: int, seed: int) -> list[Fault]:
    """One process of two is killed: the other says so and ends, and both go on later. Saves that
    fail on the first host: both go on.
    """
    found = [
        Fault(f"pair {number}", lambda number=number: _host(bench, number, seed))
        for number in range(count)
    ]
    return [Fault("saves that fail on one host", lambda: _unsaved(bench)), *found]


def _unsaved(bench: Bench) -> None:
    """Files where the directories of some saves belong."""
    workdir = bench.root / "hosts unsaved"
    pair, folder = _pair(bench, workdir), workdir / "checkpoints"
    until(lambda: any(p.poll() is not None for p in pair) or (folder / "2" / "seal.json").exists())
    for step in (10, 12, 14):
        (folder / f"{step}").touch()
    said = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert "the checkpoint of step 12 could not be saved: " in said[0]
    assert "the newest is of step 8" in said[0]
    assert rows(workdir) == rows(_undisturbed_pair(bench))


def _host(bench: Bench, number: int, seed: int) -> None:
    rng = random.Random(seed * 1000 + 500 + number)
    workdir, lost = bench.root / f"hosts {number}", number % 2
    pair = _pair(bench, workdir)
    wanted = rng.randint(1, STEPS - 4)
    until(lambda: any(p.poll() is not None for p in pair) or len(rows(workdir)) > wanted)
    pair[lost].kill()
    start = time.monotonic()
    said, _ = pair[1 - lost].communicate(timeout=120)
    pair[lost].communicate()
    assert time.monotonic() - start < 90
    assert pair[1 - lost].returncode == 75, said
    assert f"host {lost} (" in said
    assert "this run ends" in said
    for process in _pair(bench, workdir):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    expected = _undisturbed_pair(bench)
    assert rows(workdir) == rows(expected)
    weights = Path("student", "model.safetensors")
    assert (workdir / weights).read_bytes() == (expected / weights).read_bytes()


def _undisturbed_pair(bench: Bench) -> Path:
    expected = bench.root / "hosts undisturbed"
    if not expected.exists():
        for process in _pair(bench, expected):
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
    return expected


def _pair(bench: Bench, workdir: Path) -> list[subprocess.Popen]:
    port = free_port()
    return [
        bench.start(
            [
                *bench.command(workdir),
                "--hosts=2",
                f"--host={host}",
                f"--coordinator=127.0.0.1:{port}",
            ],
            XLA_FLAGS=f"{FLAGS} --xla_force_host_platform_device_count=1",
        )
        for host in range(2)
    ]
