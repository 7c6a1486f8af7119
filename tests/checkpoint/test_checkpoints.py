"""Checkpoints that are sealed, damaged, half-written or gone."""

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from small import saved, state, training

from proteus_jax.checkpoint import checksums
from proteus_jax.checkpoint.checkpointer import Checkpoints
from proteus_jax.checkpoint.items import PARAMS
from proteus_jax.checkpoint.store import CheckpointStore, RetentionPolicy
from proteus_jax.errors import InputError, Interrupted
from proteus_jax.methods.feature_standardization import RunningMoments
from proteus_jax.training.train_state import Skipped, from_items, to_items


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


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
