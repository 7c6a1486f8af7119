"""Parts of what keeps a long run alive; tests/faults.py tries all of it on whole runs."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warm
from conftest import ROOT, Heard
from etils import epath
from test_metrics import scalars
from test_plain import training

from proteus_jax.checkpoint import checksums
from proteus_jax.checkpoint.checkpointer import Checkpoints
from proteus_jax.checkpoint.items import FORMAT, PARAMS, VERSION
from proteus_jax.checkpoint.store import CheckpointStore, RetentionPolicy
from proteus_jax.data.loader import Batch
from proteus_jax.engine.checkpointing import CheckpointManager
from proteus_jax.engine.monitors import NonFiniteMonitor, StepTimer
from proteus_jax.errors import Diverged, InputError, Interrupted, about, exit_code, fitting
from proteus_jax.methods.feature_standardization import RunningMoments
from proteus_jax.runtime import collectives, compilation_cache, heartbeat
from proteus_jax.runtime.heartbeat import Heartbeat
from proteus_jax.runtime.metric_writer import MetricsWriter, read_metrics
from proteus_jax.runtime.preemption import PreemptionHandler
from proteus_jax.runtime.process import REQUESTS
from proteus_jax.runtime.workdir import Workdir
from proteus_jax.training.resume import compare_facts, find_resume_point
from proteus_jax.training.train_state import Skipped, TrainState, from_items, to_items


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def state(value: float) -> TrainState:
    params = {"a": {"weights": jnp.full((300,), value)}}
    nothing = jnp.zeros((), jnp.int32)
    skipped = Skipped(nothing, nothing + 0)
    return TrainState(nothing + int(value), params, {"a": {"mean": params["a"]}}, None, {}, skipped)


def saved(folder: Path, *steps: int, **more: Any) -> list[int]:
    told: list[int] = []
    checkpoints = Checkpoints(str(folder), saved=lambda step, _: told.append(step), **more)
    with contextlib.closing(checkpoints):
        for step in steps:
            checkpoints.save(step, to_items(state(step)), {"seed": 1})
    return told


def test_a_checkpoint_is_told_of_when_it_is_sealed(folder: Path) -> None:
    def look(step: int, _: float) -> None:
        assert (folder / str(step) / "seal.json").is_file()
        assert json.loads((folder.parent / "checkpoints.json").read_text()) == {"step": step}
        told.append(step)

    told: list[int] = []
    with contextlib.closing(
        Checkpoints(str(folder), keep=RetentionPolicy(2, every=3), saved=look)
    ) as each:
        for step in (1, 2, 3, 4, 5):
            each.save(step, to_items(state(step)), {"seed": 1})
        each.wait()
        assert sorted(each.store.steps()) == [3, 4, 5]
        shapes = to_items(jax.eval_shape(lambda: state(0)))
        restored = from_items(each.restore(4, shapes))
    assert told == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(restored.params["a"]["weights"], np.full(300, 4.0))


def test_a_checkpoint_brings_back_all_of_a_state(folder: Path) -> None:
    """Averages, moments of two teachers, counters, the optimizer's own: what comes next is the same
    to the last bit. Parts of it can be had alone.
    """
    _, teachers, step, begun = training()
    rng = np.random.default_rng(3)
    batches = rng.integers(0, 256, (3, 6, 12, 12, 3), dtype=np.uint8)
    state = begun
    for images in batches[:2]:
        state, _ = step(state, teachers, images)
    counted = Skipped(jnp.int32(5), jnp.int32(2))
    state = state._replace(step=state.step + 5, skipped=counted)
    state.statistics["another"] = RunningMoments(*(jnp.arange(3.0) + at for at in range(4)))
    with contextlib.closing(Checkpoints(str(folder))) as checkpoints:
        checkpoints.save(7, to_items(state), {"seed": 1, "names": ["ä"]})
        checkpoints.wait()
        places = jax.tree.map(lambda array: array.sharding, state)
        shapes = to_items(jax.eval_shape(lambda: state))
        restored = from_items(checkpoints.restore(7, shapes, to_items(places)))
        alone = checkpoints.restore(7, {PARAMS: shapes[PARAMS]})[PARAMS]
        assert checkpoints.facts(7) == {"seed": 1, "names": ["ä"]}
    for found, expected in (
        (restored, state),
        (alone, state.params),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    del state.statistics["another"], restored.statistics["another"]
    for one, other in zip(
        *(step(each, teachers, batches[2]) for each in (state, restored)), strict=True
    ):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_save_that_fails_in_the_background_is_no_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(folder, 1)
    told: list[str] = []
    checkpoints = Checkpoints(
        str(folder),
        keep=RetentionPolicy(1),
        saved=lambda *_: told.append("saved"),
        failed=lambda *_: told.append("failed"),
    )
    with contextlib.closing(checkpoints):
        with monkeypatch.context() as patch:

            def full(step: int) -> None:
                assert threading.current_thread() is not threading.main_thread()
                raise OSError(errno.ENOSPC, "full")

            patch.setattr(checkpoints.store, "complete", full)
            checkpoints.save(2, to_items(state(2)), {})
            checkpoints.wait()
        assert told == ["failed"]
        assert checkpoints.failed_in_a_row == 1
        assert (folder / "1" / "seal.json").is_file()
        assert json.loads((folder.parent / "checkpoints.json").read_text()) == {"step": 1}


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


def test_a_note_that_cannot_be_read_is_still_one(folder: Path) -> None:
    saved(folder, 1)
    shutil.rmtree(folder)
    (folder.parent / "checkpoints.json").write_text("{")
    with pytest.raises(InputError, match=r"saved here at step 0, and no checkpoint"):
        CheckpointStore(str(folder)).newest()


def test_a_kill_before_the_first_seal_is_a_beginning(folder: Path) -> None:
    """One that orbax had finished, no note of it: what it was is put aside."""
    saved(folder, 1)
    (folder / "1" / "seal.json").unlink()
    (folder.parent / "checkpoints.json").unlink()
    shelf = CheckpointStore(str(folder))
    found = shelf.newest()
    assert found.step is None
    shelf.quarantine_and_clean(found)
    assert (folder / "damaged" / "1").is_dir()


def test_a_saved_checkpoint_that_lost_its_seal_is_put_aside(folder: Path) -> None:
    saved(folder, 1, 2)
    (folder / "2" / "seal.json").unlink()
    shelf = CheckpointStore(str(folder))
    found = shelf.newest()
    assert found.step == 1
    shelf.quarantine_and_clean(found)
    assert shelf.steps() == [1]
    assert (folder / "damaged" / "2" / "params").is_dir()


def test_a_seal_is_of_every_byte_and_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the first piece of a file too, and of orbax's own."""
    monkeypatch.setattr(checksums, "_PIECE", 8)
    for name, place in (("array", 19), ("_METADATA", 3)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "array").write_bytes(bytes(20))
        (folder / "_METADATA").write_bytes(bytes(20))
        checksums.write_checksums(folder, "it")
        assert checksums.verify_checksums(folder, "it") is None
        content = bytearray(20)
        content[place] = 1
        (folder / name).write_bytes(content)
        assert (checksums.verify_checksums(folder, "it") or "").startswith(
            f"{name}: expected sha256"
        )


def test_a_newer_checkpoint_that_is_gone_is_told_of(folder: Path) -> None:
    saved(folder, 1, 2, 3)
    shutil.rmtree(folder / "3")
    assert CheckpointStore(str(folder)).newest() == (2, {3: "it is gone"}, [])


def test_an_older_step_under_a_newer_name_is_not_believed(folder: Path) -> None:
    saved(folder, 1, 2)
    shutil.copytree(folder / "1", folder / "7")
    found = CheckpointStore(str(folder)).newest()
    assert found.step == 2
    assert found.faults == {7: "seal.json is that of step 1"}


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


def test_which_checkpoints_stay() -> None:
    """The newest ones, those of every so many steps, and always the very newest."""
    steps = [100, 20, 30, 40, 60, 90]
    assert RetentionPolicy(2).steps_to_delete(steps) == [20, 30, 40, 60]
    assert RetentionPolicy(1, every=30).steps_to_delete(steps) == [20, 40]
    assert RetentionPolicy(9, every=30).steps_to_delete(steps) == []
    assert RetentionPolicy(1).steps_to_delete([5]) == []


def test_what_is_damaged_is_named_put_aside_and_never_loaded(folder: Path) -> None:
    saved(folder, 1, 2, 3)
    (file,) = (folder / "3" / "params" / "d").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    (folder / "9").mkdir()
    shelf = CheckpointStore(str(folder))
    found = shelf.newest()
    assert found.step == 2
    assert "expected sha256" in found.faults[3]
    assert found.faults[9] == "no seal.json: a save that was not finished"
    shelf.quarantine_and_clean(found)
    assert sorted(shelf.steps()) == [1, 2]
    assert (folder / "damaged" / "3" / "seal.json").exists()
    for step in ("1", "2"):
        (folder / step / "seal.json").write_text("")
    with pytest.raises(InputError, match=r"saved here at step 3.*step 2: seal.json is damaged"):
        shelf.newest()
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"saved here at step 3, and .*\(there is none\)"):
        shelf.newest()
    shelf.forget()
    assert shelf.newest() == (None, {}, [])


def test_a_directory_without_a_finished_save_is_no_run(folder: Path) -> None:
    (folder / "2").mkdir(parents=True)
    (folder / "4.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    shelf = CheckpointStore(str(folder))
    found = shelf.newest()
    assert found.step is None
    assert found.unfinished == ["4.orbax-checkpoint-tmp"]
    shelf.quarantine_and_clean(found)
    assert list(folder.iterdir()) == []
    assert CheckpointStore(str(folder / "absent")).newest() == (None, {}, [])


def test_a_save_that_fails_is_told_of_and_leaves_the_others(folder: Path) -> None:
    saved(folder, 1)
    told: list[tuple[int, str]] = []
    checkpoints = Checkpoints(str(folder), failed=lambda *failure: told.append(failure))
    with contextlib.closing(checkpoints):
        (folder / "2").mkdir()
        (folder / "2" / "seal.json").touch()
        # What has a seal is nobody's to replace.
        checkpoints.save(2, to_items(state(2)), {})
        checkpoints.wait()
        assert checkpoints.failed_in_a_row == 1
        assert told[0][0] == 2
        assert "already exists" in told[0][1]
        assert (folder / "2" / "seal.json").exists()
        checkpoints.save(3, to_items(state(3)), {})
        checkpoints.wait()
        assert checkpoints.failed_in_a_row == 0
        assert checkpoints.store.newest().step == 3


def test_what_could_not_be_removed_goes_later_and_what_is_no_checkpoint_stays(
    folder: Path,
) -> None:
    keep = RetentionPolicy(1)
    with contextlib.closing(Checkpoints(str(folder), keep=keep)) as checkpoints:
        checkpoints.save(5, to_items(state(5)), {})
        checkpoints.wait()
        # As a removal that was cut short leaves it; and what somebody else put there.
        shutil.copytree(folder / "5", folder / "2")
        (folder / "2" / "seal.json").unlink()
        (folder / "3").mkdir()
        (folder / "3" / "notes.txt").write_text("mine")
        checkpoints.save(6, to_items(state(6)), {})
        checkpoints.wait()
        assert sorted(checkpoints.store.steps()) == [3, 6]
        checkpoints.store.quarantine_and_clean(checkpoints.store.newest())
        assert checkpoints.store.steps() == [6]
    assert (folder / "damaged" / "3" / "notes.txt").read_text() == "mine"


def test_a_file_system_that_is_away_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is put aside, and no run begins anew; a bad place of the disk is damage."""
    saved(folder, 1, 2)
    stat = os.stat

    def away(path: Any, *args: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(str(folder / "2")):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return stat(path, *args, **more)

    shelf = CheckpointStore(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", away)
        with pytest.raises(Interrupted, match=r"seal.json cannot be looked at: Stale file"):
            shelf.newest()
    assert shelf.newest() == (2, {}, [])

    def broken(path: epath.Path, **_: Any) -> dict[str, Any]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checksums, "_digest", broken)
    with pytest.raises(InputError, match=r"step 2: it cannot be read: .*Input/output"):
        shelf.newest()


def test_nothing_is_left_of_a_save_whose_threads_outlive_it(folder: Path) -> None:
    unfinished = folder / "2.orbax-checkpoint-tmp" / "params"

    def write_on() -> None:
        for number in range(8):
            # What it has just made may be gone already.
            with contextlib.suppress(FileNotFoundError):
                unfinished.mkdir(parents=True, exist_ok=True)
                (unfinished / str(number)).touch()
            time.sleep(0.05)

    writer = threading.Thread(target=write_on)
    with contextlib.closing(Checkpoints(str(folder))) as checkpoints:
        writer.start()
        checkpoints.fail(2, OSError(errno.ENOSPC, "no space"))
    writer.join()
    assert list(folder.iterdir()) == []


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


def batch(numbers: list[int]) -> Batch:
    return Batch(np.zeros((2, 4, 4, 3), np.uint8), np.full(2, -1), np.asarray(numbers))


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


def test_what_nohup_ignores_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PreemptionHandler(600, print) as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert not stop.made
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
        while not stop.made and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop.made
    assert [signal.getsignal(number) for number in REQUESTS] == before
    assert signal.set_wakeup_fd(-1) == -1


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
