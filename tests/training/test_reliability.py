"""Parts of what keeps a long run alive; tests/faults.py tries all of it on whole runs."""

import contextlib
import errno
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Heard
from small import state

from proteus_jax.checkpoint.items import FORMAT, VERSION
from proteus_jax.checkpoint.store import RetentionPolicy
from proteus_jax.data.loader import HostBatch
from proteus_jax.engine.checkpointing import CheckpointManager
from proteus_jax.engine.monitors import NonFiniteMonitor, StepTimer
from proteus_jax.errors import Diverged, InputError, about, exit_code, fitting
from proteus_jax.runtime import collectives, heartbeat
from proteus_jax.runtime.heartbeat import Heartbeat
from proteus_jax.runtime.workdir import Workdir
from proteus_jax.training.resume import compare_facts, find_resume_point
from proteus_jax.training.train_state import to_items


def test_how_many_failed_saves_stop_a_run(tmp_path: Path) -> None:
    """More in a row than are allowed; none may be. What stays is as configured."""
    for limit, failed, stops in ((0, 0, False), (0, 1, True), (2, 2, False), (2, 3, True)):
        keep = RetentionPolicy(2, every=30)
        saving = CheckpointManager(
            Workdir(tmp_path).checkpoints, Heard(), keep, max_failed_saves=limit
        )
        with contextlib.closing(saving):
            assert saving._checkpoints._keep == keep
            saving._checkpoints.failed_in_a_row = failed
            reason = saving.reason_to_stop()
            assert (reason is not None) == stops


def test_where_the_rows_could_not_be_written_nothing_is_saved(tmp_path: Path) -> None:
    """Nor where a host that is not this one cannot: all of them leave it."""
    saving = CheckpointManager(
        Workdir(tmp_path).checkpoints, Heard(), RetentionPolicy(2, None), max_failed_saves=2
    )
    with contextlib.closing(saving):
        full = OSError(errno.ENOSPC, "full")
        saving.save(1, to_items(state(1)), {}, lambda: full)
        saving._checkpoints.wait()
        assert saving._checkpoints.failed_in_a_row == 1
        assert saving._checkpoints.store.steps() == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "broadcast_from_rank0", lambda _: 0)
            saving.save(1, to_items(state(1)), {}, lambda: None)
        assert saving._checkpoints.failed_in_a_row == 2
        assert saving._checkpoints.store.steps() == []


def test_a_student_without_checkpoints_is_of_another_run(tmp_path: Path) -> None:
    """It is not begun anew over it."""
    for name in ("student", "student_ema"):
        (tmp_path / name).mkdir()
        manager = CheckpointManager(Workdir(tmp_path).checkpoints, Heard(), RetentionPolicy(2), 0)
        with (
            contextlib.closing(manager),
            pytest.raises(InputError, match=f"has {name}/, but no checkpoint: of another run"),
        ):
            find_resume_point(manager, {}, tmp_path)
        (tmp_path / name).rmdir()


def facts(**more: Any) -> dict[str, Any]:
    own = {"seed": 0, "log_every": 1, "steps": 4, "learning_rate": None, "data": {"root": ["a"]}}
    own |= more
    return {
        FORMAT: VERSION,
        "seed": own["seed"],
        "teachers": {"teacher": {"weights": "abc"}},
        "card": {"licence": more.get("seed")},
        "configuration": own,
    }


def test_what_differs_is_said_and_only_some_is_refused() -> None:
    assert compare_facts(facts(), facts()) == ([], [])
    found = compare_facts(
        facts(), facts(log_every=2, steps=9, learning_rate=0.1, data={"root": ["b"]})
    )
    without = "from here on, which changes no number of the training"
    assert found.refused == []
    assert found.allowed == [
        f"--config.log_every: 1 until now, 2 {without}",
        "--config.steps: 4 until now, 9 from here on; the learning rate follows the new length",
        "--config.learning_rate: null until now, 0.1 from here on",
        f'--config.data.root: ["a"] until now, ["b"] {without}',
    ]
    found = compare_facts(facts(), facts(epochs=9.0))
    assert found.allowed == [
        "--config.epochs: null until now, 9.0 from here on, which counts for nothing beside "
        "--config.steps"
    ]
    # A group has the fields below it, not those whose names begin like it.
    found = compare_facts(facts(teacher_precision="a"), facts(teacher_precision="b"))
    assert found.allowed == ['--config.teacher_precision: "a" until now, "b" from here on']
    # What one of them has not is different too.
    for one, other in ((facts() | {"more": 1}, facts()), (facts(), facts() | {"more": 1})):
        (refusal,) = compare_facts(one, other).refused
        assert refusal.startswith("more: the checkpoint has ")
    found = compare_facts(facts(), facts(seed=1, log_every=2))
    assert found.refused == ["seed: the checkpoint has 0, this run has 1"]
    assert found.allowed == [f"--config.log_every: 1 until now, 2 {without}"]
    (refusal,) = compare_facts({"seed": 0}, facts()).refused
    assert refusal.startswith("format: the checkpoint has 1, this version of proteus_jax reads 2;")
    found = compare_facts(facts() | {"data": "0" * 64}, facts() | {"data": "f" * 64})
    assert found.refused[0].startswith("data: other images (added, ")
    assert found.refused[0].endswith("sha256 000000000000... there, ffffffffffff... here")


def batch(numbers: list[int]) -> HostBatch:
    return HostBatch(np.zeros((2, 4, 4, 3), np.uint8), np.full(2, -1), np.asarray(numbers))


def test_the_step_that_stops_a_run_is_kept() -> None:
    said: list[str] = []
    skipped = NonFiniteMonitor(lambda index: f"{index}.jpg", limit=2, say=said.append)
    counts = [0, 1, 0, 1, 2, 3, 4, 5, 6]

    def go_on() -> None:
        for step, count in enumerate(counts, 1):
            skipped.note(step, {"skipped_in_a_row": jnp.int32(count)}, batch([step, 7]))

    with pytest.raises(Diverged, match="at step 9 "):
        go_on()
    assert skipped.last is not None
    assert (skipped.last.step, skipped.last.batch.numbers.tolist()) == (9, [9, 7])
    assert said[0].endswith("(1 in a row). Its images here: 2.jpg, 7.jpg")


def test_a_run_diverges_at_its_limit_before_a_checkpoint() -> None:
    """Looked at, as before a save, with as many in a row as are not allowed, and one less."""
    for limit, stops in ((2, True), (3, False)):
        skipped = NonFiniteMonitor(str, limit=limit, say=lambda _: None)
        for step, count in enumerate((1, 2), 1):
            skipped.note(step, {"skipped_in_a_row": jnp.int32(count)}, batch([0, 1]))
        with pytest.raises(Diverged) if stops else contextlib.nullcontext():
            skipped.flush()


def test_what_is_no_step_does_not_slow_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds of which six were an evaluation, and one of the rest a wait for images."""
    now = [100.0]
    monkeypatch.setattr("proteus_jax.engine.monitors.time.monotonic", lambda: now[0])
    clock = StepTimer()
    assert clock.lap(3, 8)["images_per_second"] > 0
    now[0] += 3
    with clock.paused():
        now[0] += 6
    with clock.waiting():
        now[0] += 1
    assert clock.lap(8, 8) == {"images_per_second": 5 * 8 / 4, "data_wait": 0.25}
    now[0] += 2
    assert clock.lap(9, 8) == {"images_per_second": 4.0, "data_wait": 0.0}
    # After an evaluation the device is idle: the next step is only handed to it when its row is
    # due, which took no step's time.
    with clock.paused():
        now[0] += 60
    now[0] += 0.01
    assert clock.lap(10, 8) == {"images_per_second": 4.0, "data_wait": 0.0}
    now[0] += 1
    assert clock.lap(11, 8)["images_per_second"] == 8.0


def test_a_late_step_is_told_of_once_with_the_hosts_that_are_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "PATIENCE", 0.4)
    monkeypatch.setattr(heartbeat, "EVERY", 0.02)
    said: list[str] = []
    log: list[str] = []
    behind = {"host 0 (a)": 8, "host 1 (b)": 5}
    beat = Heartbeat(tmp_path, 20, say=said.append, log=log.append, steps=lambda step: behind)
    # faulthandler writes to a descriptor of its own.
    with open(tmp_path / "stacks", "w") as stacks:
        monkeypatch.setattr("sys.stderr", stacks)
        for step in range(1, 9):
            beat.step(step)
            time.sleep(0.002)
        with beat.paused():
            time.sleep(0.6)
        assert said == []
        left = time.monotonic()
        while not said and time.monotonic() < left + 10:
            time.sleep(0.01)
        # However quick the others were.
        assert time.monotonic() - left > 0.35
        time.sleep(0.1)
    with open(tmp_path / "stacks", "a") as stacks:
        monkeypatch.setattr("sys.stderr", stacks)
        # What is no step has no median: it is long after STILL.
        monkeypatch.setattr(heartbeat, "STILL", 0.1)
        with beat.paused():
            deadline = time.monotonic() + 10
            while len(said) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
    beat.saved(7)
    beat.close("done")
    assert re.match(r"measuring, at step 8, takes \d s so far; the stacks of all", said.pop())
    (line,) = said
    assert re.match(r"step 9 takes \d s so far, others ", line)
    assert line.endswith("host 1 (b) has come to step 5, others to step 8")
    assert "test_a_late_step" in (tmp_path / "stacks").read_text()
    found = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (found["step"], found["total"], found["saved"], found["state"]) == (8, 20, 7, "done")
    assert found["process"] == os.getpid()
    assert found["memory_bytes"] > 2**20
    assert found["descriptors"] > 2
    assert any("MB resident" in text for text in log)


def test_what_does_not_fit_is_the_inputs_mistake() -> None:
    said = r"this host has not enough memory \(Unable .*\): smaller"
    with pytest.raises(InputError, match=said), fitting("smaller"):
        np.empty(2**62, np.uint8)
    # Not of a device: a store that has no quota left.
    with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"), fitting("smaller"):
        raise ValueError("RESOURCE_EXHAUSTED: quota")


def test_a_device_without_memory_is_the_inputs_mistake() -> None:
    said = "a device has not enough memory .Out of memory allocating 9 bytes.: smaller"
    with pytest.raises(InputError, match=said), fitting("smaller"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError), fitting("smaller"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_disk_is_nobodys_mistake() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        assert exit_code(OSError(number, "full")) == 75
        # Nor one in a field of which something was to be read.
        with pytest.raises(OSError, match="full"), about("--config.data.root"):
            raise OSError(number, "full")
    assert exit_code(OSError(errno.ENOENT, "absent")) == 1
