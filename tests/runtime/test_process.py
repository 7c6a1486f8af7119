"""Signals, heartbeats, rows and compiled programs: what a process owes its machine."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import warm
from conftest import ROOT
from small import scalars

from proteus_jax.errors import exit_code
from proteus_jax.runtime import compilation_cache, heartbeat
from proteus_jax.runtime.heartbeat import Heartbeat
from proteus_jax.runtime.metric_writer import MetricsWriter, read_metrics
from proteus_jax.runtime.preemption import PreemptionHandler
from proteus_jax.runtime.process import REQUESTS


def test_a_users_own_cache_of_programs_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where there is none has this project its own."""
    updates: list[tuple[str, str]] = []
    monkeypatch.setattr(compilation_cache.jax, "local_device_count", lambda: 1)
    for own, expected in (("/my/cache", 0), (None, 1)):
        settings = SimpleNamespace(
            jax_compilation_cache_dir=own, update=lambda *each: updates.append(each)
        )
        monkeypatch.setattr(compilation_cache.jax, "config", settings)
        compilation_cache.keep_compiled_programs("shared")
        assert len(updates) == expected
    assert updates[0][0] == "jax_compilation_cache_dir"


def test_programs_of_devices_that_are_one_cpu_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read from disk they would wait for each other without end."""
    updates: list[tuple[str, Any]] = []
    settings = SimpleNamespace(update=lambda *each: updates.append(each))
    monkeypatch.setattr(compilation_cache.jax, "config", settings)
    compilation_cache.keep_compiled_programs("shared")
    assert updates == [("jax_enable_compilation_cache", False)]


def test_rows_wait_for_room(tmp_path: Path) -> None:
    """A limit on files, as a full disk: no row is lost, and none is there by half."""
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, limits[1]))
    try:
        for step in (2, 3):
            writer.write(step, {"loss": 1 / step})
        with pytest.raises(OSError) as error:
            writer.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit_code(error.value) == 75
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    writer.write(4, {"loss": 0.25})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert {step for _, step in scalars(tmp_path / "tensorboard")} == {1, 2, 3, 4}


def test_a_damaged_row_costs_no_other(tmp_path: Path) -> None:
    lines = ['{"step": 1}', '{"step": 2, "lo', "7", '{"step": 3, "\xff": 1}', '{"stop": 4}']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


def test_what_nohup_ignores_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PreemptionHandler(600, print) as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_requests_to_stop_are_those_of_terminals_and_schedulers() -> None:
    names = {number.name for number in REQUESTS}
    assert names == {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"}


def test_heartbeats_of_a_store_come_before_they_are_missed(tmp_path: Path) -> None:
    assert heartbeat.DEAD_AFTER >= 2 * heartbeat.PUBLISHED_EVERY
    beat = Heartbeat(tmp_path, 20, say=print, log=print, steps=lambda _: {})
    beat.resumed(7)
    beat.close("stopped")
    found = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (found["step"], found["saved"], found["state"]) == (7, 7, "stopped")


# A main thread that hears of no signal, as one that compiles: it waits for itself, in C.
STUCK = """
import ctypes, sys
from proteus_jax.runtime.preemption import PreemptionHandler
with PreemptionHandler(float(sys.argv[1]), lambda text: print(text, flush=True)) as stop:
    stop.waits = sys.argv[2] == "waits"
    print("stuck", flush=True)
    lock = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize(
    ("deadline", "waits", "requests", "said"),
    [
        (1.5, "waits", 1, "not saved within 1.5 s of the request to stop"),
        (600, "waits", 9, "a second request to stop; the same command"),
        # Before the first step there is nothing to wait for.
        (600, "compiles", 1, "interrupted before a step was made"),
    ],
)
def test_a_request_to_stop_does_not_wait_for_a_stuck_loop(
    deadline: float, waits: str, requests: int, said: str
) -> None:
    process = warm.start(
        [sys.executable, "-c", STUCK, str(deadline), waits],
        env=os.environ,
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    begun = time.monotonic()
    # SIGTERM first: SIGINT is ignored in what a shell starts in the background.
    # On a busy machine the second one may be heard so soon after the first that it counts for none.
    for number in range(requests):
        process.send_signal(REQUESTS[(number + 1) % len(REQUESTS)])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2 * PreemptionHandler.REPEATED)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said in printed
    if deadline < 60:
        # All of the time that was given for the save.
        assert time.monotonic() - begun >= deadline


def test_after_the_block_signals_are_as_before() -> None:
    before = [signal.getsignal(number) for number in REQUESTS]
    with PreemptionHandler(600, print) as stop:
        stop.waits = True
        signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop.requested
    assert [signal.getsignal(number) for number in REQUESTS] == before
    assert signal.set_wakeup_fd(-1) == -1
