"""Disks that are full, have a limit, or take nothing any more."""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fault_suite.account import Fault
from fault_suite.bench import EVERY, STEPS, Bench, Limit, assert_same, rows, until
from proteus_jax.checkpoint.store import CheckpointStore, RetentionPolicy

SIZE = 40 * 2**20


def faults(bench: Bench, *, quick: bool) -> list[Fault]:
    """A full disk where one can be mounted; a limit on the size of files, and others, anywhere."""
    found = [
        Fault("a limit on files stops a run as configured", lambda: _limited_stops(bench)),
        Fault("a limit that lets nothing be written", lambda: _nothing_can_be_written(bench)),
        Fault("a file where checkpoints belong, for a while", lambda: _in_the_way(bench)),
        Fault("a report and pictures that cannot be written", lambda: _no_report(bench)),
        Fault("what is kept", lambda: _kept(bench)),
    ]
    if quick:
        return found
    found += [
        Fault("a limit on files lets a run go on as configured", lambda: _limited_goes_on(bench)),
        Fault("nobody reads the output", lambda: _closed_output(bench)),
    ]
    if _can_mount(bench):
        found.append(Fault("a full disk stops a run as configured", lambda: _full(bench, "stops")))
        found.append(Fault("a full disk and room again", lambda: _full(bench, "goes on")))
    else:
        print("no file system can be mounted here: the full disk is left out", flush=True)
    return found


def _limited(bench: Bench, command: list[str], bytes_a_file: int) -> subprocess.CompletedProcess:
    """With files of at most so many bytes: a write beyond fails, as on a full disk."""
    return bench.run_limited(command, Limit("RLIMIT_FSIZE", bytes_a_file))


def _limited_stops(bench: Bench) -> None:
    workdir = bench.root / "limit stops"
    command = bench.command(workdir, "--config.max_failed_saves=1")
    first = bench.run([*command, "--config.steps=4"])
    assert first.returncode == 0, first.stderr
    # As long as before, and begun anew from step 4 on.
    result = _limited(bench, command, 100_000)
    assert result.returncode == 75, result.stdout + result.stderr
    assert "the checkpoint of step 6 could not be saved: " in result.stdout
    assert "the newest is of step 4" in result.stdout
    assert "2 saves in a row failed (--config.max_failed_saves); the same command goes on from" in (
        result.stderr
    )
    assert "Traceback" not in result.stderr
    assert CheckpointStore(str(workdir / "checkpoints")).newest().step == 4
    assert not [path for path in (workdir / "checkpoints").iterdir() if "tmp" in path.name]
    after = bench.run(command)
    assert after.returncode == 0, after.stderr
    assert [row["step"] for row in rows(workdir)] == list(range(STEPS + 1))


def _limited_goes_on(bench: Bench) -> None:
    workdir = bench.root / "limit goes on"
    result = _limited(bench, bench.command(workdir, "--config.max_failed_saves=1000"), 100_000)
    assert result.returncode == 75, result.stdout + result.stderr
    assert f"the checkpoint of step {STEPS} could not be saved: " in result.stdout
    assert "Traceback" not in result.stderr
    # The student could not be written either; all the numbers could.
    assert rows(workdir) == rows(bench.undisturbed)
    bench.goes_on_and_is_the_same(workdir)


def _nothing_can_be_written(bench: Bench) -> None:
    result = _limited(bench, bench.command(bench.root / "nothing"), 0)
    assert result.returncode == 75, result.stdout + result.stderr
    assert "the same command goes on once there is room to write" in result.stderr
    assert "Traceback" not in result.stderr
    bench.goes_on_and_is_the_same(bench.root / "nothing")


def _in_the_way(bench: Bench) -> None:
    workdir = bench.root / "in the way"
    process = bench.start(bench.command(workdir, "--config.max_failed_saves=1000"))
    folder, aside = workdir / "checkpoints", workdir / "aside"
    until(lambda: process.poll() is not None or (folder / "2" / "seal.json").exists())
    folder.rename(aside)
    with contextlib.suppress(FileExistsError):
        folder.touch()
    until(lambda: process.poll() is not None or len(rows(workdir)) > 12)
    if folder.is_file():
        folder.unlink()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 75), printed
    assert "could not be saved: " in printed
    assert "Traceback" not in printed
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    bench.goes_on_and_is_the_same(workdir)


def _no_report(bench: Bench) -> None:
    workdir = bench.copy("no report")
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > STEPS // 2:
            shutil.rmtree(path)
    for name in ("report.html", "heartbeat.json"):
        (workdir / name).unlink()
        (workdir / name).mkdir()
    printed = bench.goes_on_and_is_the_same(workdir)
    assert "the report could not be written: " in printed


def _kept(bench: Bench) -> None:
    """The newest ones and every so many steps one; whatever is asked for, one is left."""
    for last in range(1, 5):
        for every in (None, 1, 3, 10):
            keep, steps = RetentionPolicy(last, every), [2, 3, 5, 6, 9, 10, 12]
            left = set(steps) - set(keep.steps_to_delete(steps))
            assert set(steps[-last:]) <= left
            assert left - set(steps[-last:]) == {
                step for step in steps[:-last] if every and step % every == 0
            }
    workdir = bench.root / "kept"
    more = ("--config.keep_checkpoints=1", "--config.keep_every=10")
    bench.goes_on_and_is_the_same(workdir, *more)
    names = {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()}
    assert names == {"10", "20", str(STEPS)}


def _closed_output(bench: Bench) -> None:
    workdir = bench.root / "unread"
    process = bench.start(bench.command(workdir))
    assert process.stdout is not None
    process.stdout.close()
    process.wait(timeout=120)
    assert_same(workdir, bench.undisturbed)


@contextlib.contextmanager
def _mounted(bench: Bench, name: str = "small") -> Iterator[Path]:
    folder = bench.root / f"{name} disk"
    folder.mkdir(exist_ok=True)
    options = ("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs")
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True)
    if done.returncode:
        raise OSError(done.stderr.decode())
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _can_mount(bench: Bench) -> bool:
    try:
        with _mounted(bench):
            return True
    except OSError:
        return False


def _full(bench: Bench, what: str) -> None:
    with _mounted(bench, what) as disk:
        workdir, ballast = disk / "run", disk / "ballast"
        first = bench.run(
            bench.command(workdir, "--config.steps=4", "--config.preemption_timeout_s=9")
        )
        assert first.returncode == 0, first.stderr
        _fill(ballast)
        limit = 1 if what == "stops" else 1000
        command = bench.command(workdir, f"--config.max_failed_saves={limit}")
        if what == "stops":
            result = bench.run(command)
            assert result.returncode == 75, result.stdout + result.stderr
            assert "Traceback" not in result.stderr
        else:
            process = bench.start(command)
            log = workdir / "heartbeat.json"
            until(lambda: process.poll() is not None or _is_training(log))
            ballast.unlink()
            printed, _ = process.communicate(timeout=120)
            assert process.returncode in (0, 75), printed
            assert "Traceback" not in printed
        ballast.unlink(missing_ok=True)
        newest = CheckpointStore(str(workdir / "checkpoints")).newest().step
        assert newest is not None
        assert newest >= 4
        after = bench.run(command)
        assert after.returncode == 0, after.stdout + after.stderr
        assert [row["step"] for row in rows(workdir)] == list(range(STEPS + 1))
        assert (workdir / "checkpoints" / str(STEPS - EVERY)).exists()


def _fill(path: Path) -> None:
    """The rest of the disk, to the last byte."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _is_training(path: Path) -> bool:
    return bool(re.search(r"resuming", path.parent.joinpath("log.txt").read_text())) or (
        path.exists() and '"training"' in path.read_text()
    )
