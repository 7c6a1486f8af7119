"""How many workers a machine has room for, and what becomes of one that is lost."""

import contextlib
import multiprocessing
import os
import signal
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from proteus_jax.data import workers
from proteus_jax.data.workers import WorkerLost, assembled, edges_of, in_parallel, worker_pool
from proteus_jax.runtime import cpu_quota
from proteus_jax.runtime.cpu_quota import cores

MANY = os.cpu_count() or 1


def free(monkeypatch: pytest.MonkeyPatch, megabytes: int) -> None:
    """Shared memory has so much room."""
    found = types.SimpleNamespace(f_bavail=megabytes, f_frsize=10**6)
    monkeypatch.setattr(workers.os, "statvfs", lambda _: found)


def test_what_fits_is_taken_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1000)
    assert worker_pool(6, 2, side=224) == (6, 2, "")
    assert worker_pool(0, 3, side=224) == (0, 3, "")


@pytest.mark.parametrize(
    ("megabytes", "left", "said"),
    # A worker holds four pieces of 64 images of 150,528 bytes.
    [
        (80, 2, "2 in place of 6 worker processes"),
        (30, 0, "threads in place of 6 worker processes"),
    ],
)
def test_shared_memory_limits_workers(
    megabytes: int, left: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, megabytes)
    found = worker_pool(6, 0, side=224)
    assert found.workers == left
    # None were asked for, as there were workers to be.
    assert found.threads == 2
    assert found.remark.startswith(f"{said} make images: {megabytes} MB are free in shared memory")
    assert "takes up to 38.5 MB; docker run --shm-size" in found.remark


def test_the_tighter_of_two_limits_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files for many workers, shared memory for two, and the other way round; both are said."""
    free(monkeypatch, 80)
    monkeypatch.setattr(workers, "_in_descriptors", lambda: (5, "files"))
    found = worker_pool(6, 0, side=224)
    assert found.workers == 2
    assert found.remark.endswith("; files")
    monkeypatch.setattr(workers, "_in_descriptors", lambda: (1, "files"))
    assert worker_pool(6, 0, side=224).workers == 1


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 160)
    assert worker_pool(6, 0, side=224).workers == 4
    monkeypatch.setattr(workers, "processes_here", lambda: 2)
    assert worker_pool(6, 0, side=224).workers == 2


def test_no_shared_memory_and_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path / "absent")
    monkeypatch.setattr(workers.resource, "getrlimit", lambda _: (150, 150))
    found = worker_pool(2, 4, side=28)
    assert found[:2] == (0, 4)
    assert "cannot be written" in found.remark
    assert "at most 150 files may be open (ulimit -n)" in found.remark


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/job/task", {"job/task/cpu.max": "max 100000", "job/cpu.max": "100000 100000"}, 1),
        # In a container the group's files lie at the root.
        ("0::/elsewhere", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, MANY),
        (
            "4:memory:/x\n1:cpu,cpuacct:/x",
            {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, MANY),
        ("", {}, MANY),
    ],
)
def test_a_containers_quota_counts(
    groups: str,
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(groups + "\n" if groups else "")
    monkeypatch.setattr(cpu_quota, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpu_quota, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(MANY)))
    assert cores() == min(expected, MANY)


class Piece(NamedTuple):
    values: np.ndarray


def make(position: int) -> Piece:
    return Piece(np.full(3, position))


def test_batches_are_put_together_from_pieces() -> None:
    edges = edges_of(150)
    assert edges == (0, 64, 128, 150)
    sizes = [64, 64, 22, 64, 64, 22]
    pieces = (Piece(np.full(size, number)) for number, size in enumerate(sizes))
    first, second = assembled(pieces, edges)
    np.testing.assert_array_equal(np.unique(first.values, return_counts=True)[1], [64, 64, 22])
    np.testing.assert_array_equal(np.unique(second.values), [3, 4, 5])


def test_a_killed_worker_is_named(alone: None) -> None:
    with contextlib.closing(in_parallel(make, 10_000, 1, 0)) as pieces:
        assert next(pieces).values[0] == 0
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="was killed, as the system does where memory runs"):
            for _ in pieces:
                pass
