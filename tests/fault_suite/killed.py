"""Runs that end when they should not: SIGKILL at any moment, signals, one host of two."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import compiler
from commands import free_port

from fault_suite.account import Fault
from fault_suite.bench import RICH, STEPS, Bench, rows, until
from proteus_jax.runtime.process import REQUESTS


def kills(bench: Bench, count: int, seed: int) -> list[Fault]:
    """So many runs, each killed once or twice, at moments of three kinds: anywhere from its start,
    after some step was logged, while a save is being written. Every third one has all that a state
    can hold, and a worker process.
    """
    # Made before they are tried a few at a time.
    undisturbed = [bench.rich, bench.undisturbed, bench.undisturbed]
    return [
        Fault(
            f"run {number}",
            lambda number=number: _killed(bench, number, seed, undisturbed[number % 3]),
        )
        for number in range(count)
    ]


def _killed(bench: Bench, number: int, seed: int, expected: Path) -> None:
    rng = random.Random(seed * 1000 + number)
    workdir, more = bench.root / f"killed {number}", RICH if expected == bench.rich else ()
    kills = rng.choice((1, 1, 2))
    while kills:
        process = bench.start(bench.command(workdir, *more))
        _wait_for_a_moment(rng, workdir, process)
        if process.poll() is None:
            kills -= 1
        else:
            # It came to its end first, which tries nothing: another one.
            shutil.rmtree(workdir)
        # Workers of a process that is gone may live on in its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    bench.goes_on_and_is_the_same(workdir, *more, expected=expected)
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
        Fault("a worker process", lambda: _worker(bench)),
        Fault("SIGTERM to each of a group and again", lambda: _repeated(bench)),
        Fault("a deadline", lambda: _deadline(bench)),
    ]
    if quick:
        # The test suite has one of each.
        return found
    return [
        *found,
        Fault("SIGTERM", lambda: _signalled(bench, signal.SIGTERM)),
        Fault("SIGINT", lambda: _signalled(bench, signal.SIGINT)),
        Fault("SIGUSR1", lambda: _signalled(bench, signal.SIGUSR1)),
        Fault("a second one while it saves", lambda: _second(bench)),
    ]


def early_signals(bench: Bench, count: int, seed: int) -> list[Fault]:
    """Requests to stop before the first step, at random moments: heard, and obeyed at once."""
    return [Fault(f"early {n}", lambda n=n: _early(bench, n, seed)) for n in range(count)]


def _early(bench: Bench, number: int, seed: int) -> None:
    rng = random.Random(seed * 1000 + 700 + number)
    workdir = bench.root / f"early {number}"
    process = bench.start(bench.command(workdir, "--config.steps=5000"))
    time.sleep(rng.uniform(0.3, 4.0))
    process.send_signal(rng.choice(REQUESTS))
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 75, printed
    assert "interrupted" in printed
    assert "Traceback" not in printed


def _signalled(bench: Bench, number: signal.Signals) -> None:
    workdir = bench.root / f"signalled {number}"
    process = bench.start(bench.command(workdir))
    until(lambda: process.poll() is not None or len(rows(workdir)) > 5)
    os.kill(process.pid, number)
    _stopped(bench, process, workdir)


def _repeated(bench: Bench) -> None:
    """As launch/node.sh does with a signal to the group: one request, and it saves."""
    workdir = bench.root / "signalled and again"
    process = bench.start(bench.command(workdir, "--config.data.workers=1"))
    until(lambda: process.poll() is not None or len(rows(workdir)) > 5)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.01)
    _stopped(bench, process, workdir)


def _stopped(bench: Bench, process: subprocess.Popen, workdir: Path) -> None:
    start = time.monotonic()
    printed, _ = process.communicate(timeout=60)
    assert time.monotonic() - start < 30
    assert process.returncode == 75, printed
    assert re.search(r"interrupted at step \d+ of 24; the same command goes on from here", printed)
    bench.goes_on_and_is_the_same(workdir)


def _worker(bench: Bench) -> None:
    """As the system does to what takes most memory: the step is saved, and the run goes on."""
    workdir = bench.root / "worker killed"
    process = bench.start(bench.command(workdir, "--config.data.workers=2"))
    until(lambda: process.poll() is not None or len(rows(workdir)) > 5)
    workers = subprocess.run(
        ["pgrep", "-f", "--parent", str(process.pid), "spawn_main"], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "a worker process was killed, as the system does where memory runs out" in printed
    assert "Traceback" not in printed
    # Saved at whatever step that was.
    newest = rows(workdir)[-1]["step"]
    assert f"the same command goes on from step {newest}\n" in printed
    bench.goes_on_and_is_the_same(workdir)


def _second(bench: Bench) -> None:
    """A save that waits for ever: where it tries to write stands a pipe that nobody reads."""
    workdir = bench.root / "signalled twice"
    command = bench.command(workdir)
    process = bench.start([*command, "--config.steps=5000"])
    trial = workdir / "checkpoints" / "trial.orbax-checkpoint-tmp"

    def stands_still() -> bool:
        # Saves that are quicker take the pipe away with them.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            trial.mkdir(exist_ok=True)
            os.mkfifo(trial / "file")
        before = len(rows(workdir))
        time.sleep(0.5)
        # The first row comes before it compiles.
        return before > 1 and len(rows(workdir)) == before

    until(lambda: process.poll() is not None or stands_still())
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    start = time.monotonic()
    # One that is heard within half a second of the first counts for none.
    while process.poll() is None and time.monotonic() - start < 10:
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(1.0)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "a second request to stop; the same command goes on" in printed
    newest = len(rows(workdir)) + 1
    result = bench.run([*command, f"--config.steps={newest}"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert [row["step"] for row in rows(workdir)] == list(range(newest + 1))


def _deadline(bench: Bench) -> None:
    """A save that would take longer than a scheduler waits: the checkpoint before it is good."""
    workdir = bench.root / "deadline"
    command = bench.command(workdir, "--config.preemption_timeout_s=1e-6")
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
            XLA_FLAGS=f"{compiler.FLAGS} --xla_force_host_platform_device_count=1",
        )
        for host in range(2)
    ]
