"""Runs on an address: what is staged, uploaded and continued; a file system of memory or of files
stands for a bucket.
"""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiler
import fsspec
import numpy as np
import pytest
import warm
from commands import assert_same_run, command
from conftest import ROOT

import proteus_jax
from proteus_jax.config import Override, load
from proteus_jax.errors import InputError, Interrupted
from proteus_jax.runtime import heartbeat, workdir
from proteus_jax.runtime.filesystem import atomic_directory
from proteus_jax.runtime.heartbeat import Heartbeat
from proteus_jax.runtime.workdir import Workdir, opened_workdir
from proteus_jax.runtime.workdir_checks import why_no_workdir
from proteus_jax.training import inputs
from proteus_jax.training.inputs import open_inputs
from proteus_jax.training.schema import schema_of

# main.py with a bucket that is a folder: orbax has its own way to the real ones.
STAND_IN = """
import sys
sys.path.insert(0, {root!r})
from proteus_jax.runtime import workdir
workdir.SCHEMES = ("file",)
workdir.Workdir.checkpoints = property(
    lambda self: (self.remote.removeprefix("file://") or str(self.local)) + "/checkpoints"
)
import main
sys.exit(main.main())
"""


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setattr(workdir, "SCHEMES", ("memory",))
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/bucket", recursive=True)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    with opened_workdir(str(tmp_path / "run")) as place:
        assert place == Workdir(tmp_path / "run")
        assert place.checkpoints == str(tmp_path / "run" / "checkpoints")
        assert place.named(tmp_path / "run" / "student") == str(tmp_path / "run" / "student")
        place.upload()
    assert not (tmp_path / "run").exists()


def test_an_address_has_what_was_written_and_is_continued(
    memory: fsspec.AbstractFileSystem,
) -> None:
    with opened_workdir("memory://bucket/my run/") as place:
        assert place.checkpoints == "memory://bucket/my run/checkpoints"
        (place.local / "metrics.jsonl").write_text("1\n")
        (place.local / ".half").write_text("unfinished")
        (place.local / "student").mkdir()
        (place.local / "student" / "config.json").write_text("{}")
        assert place.named(place.local / "student") == "memory://bucket/my run/student"
        place.upload()
        assert memory.cat("/bucket/my run/metrics.jsonl") == b"1\n"
        assert memory.cat("/bucket/my run/student/config.json") == b"{}"
        assert not memory.exists("/bucket/my run/.half")
        # Only what has changed goes up again.
        memory.pipe("/bucket/my run/student/config.json", b"theirs")
        (place.local / "metrics.jsonl").write_text("1\n2\n")
    assert memory.cat("/bucket/my run/metrics.jsonl") == b"1\n2\n"
    assert memory.cat("/bucket/my run/student/config.json") == b"theirs"
    with opened_workdir("memory://bucket/my run") as place:
        assert (place.local / "metrics.jsonl").read_text() == "1\n2\n"


def test_a_run_that_fails_leaves_its_log(memory: fsspec.AbstractFileSystem) -> None:
    def fail() -> None:
        with opened_workdir("memory://bucket/my run") as place:
            (place.local / "log.txt").write_text("why")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert memory.cat("/bucket/my run/log.txt") == b"why"


def test_an_address_that_is_away_for_a_while_loses_nothing(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workdir, "PAUSES", (0.0, 0.0))
    away, put = 0, memory.put_file

    def unsteady(source: str, target: str) -> None:
        nonlocal away
        away -= 1
        if away >= 0:
            raise OSError("no route")
        put(source, target)

    monkeypatch.setattr(memory, "put_file", unsteady)
    with opened_workdir("memory://bucket/run") as place:
        (place.local / "log.1.txt").write_text("one")
        away = 2
        assert place.upload() is None
        (place.local / "log.1.txt").write_text("two, two")
        away = 3
        assert place.upload() == "OSError: no route"
    assert memory.cat("/bucket/run/log.1.txt") == b"two, two"
    folder = Path()

    def end(error: Exception | None) -> None:
        nonlocal away, folder
        away = 0
        with opened_workdir("memory://bucket/run") as place:
            folder = place.local
            assert (place.local / "log.1.txt").read_text() == "two, two"
            (place.local / "log.1.txt").write_text("three")
            away = 100
            if error is not None:
                raise error

    with pytest.raises(Interrupted, match=r"stay in .*: OSError: no route"):
        end(None)
    assert (folder / "log.1.txt").read_text() == "three"
    with pytest.raises(InputError) as failed:
        end(InputError("what was wrong"))
    assert "stay in" in failed.value.__notes__[0]

    def unreachable(*_: str) -> None:
        raise OSError("no route")

    monkeypatch.setattr(memory, "get_file", unreachable)
    with pytest.raises(Interrupted, match="cannot be fetched: OSError: no route"):
        end(None)
    assert memory.cat("/bucket/run/log.1.txt") == b"two, two"


def test_an_address_is_somebodys_as_long_as_a_heartbeat_comes(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "DEAD_AFTER", 1.5)
    monkeypatch.setattr(heartbeat, "PUBLISHED_EVERY", 0.0)
    monkeypatch.setattr(heartbeat, "EVERY", 0.05)
    said: list[str] = []
    with opened_workdir("memory://bucket/run") as first, opened_workdir(first.remote) as second:
        beat = Heartbeat(first.local, 4, say=said.append, log=said.append, publish=first.publish)
        while not memory.exists("/bucket/run/heartbeat.json"):
            time.sleep(0.01)
        lasting = memory.cat("/bucket/run/heartbeat.json")
        message = rf"memory://bucket/run is in use by another run \(process {os.getpid()} on"
        with pytest.raises(InputError, match=message), second.locked(said.append):
            pass
        assert "may still be running there: waiting" in said[-1]
        said.clear()
        beat.close("done")
        first.publish(first.local / "heartbeat.json")
        with second.locked(said.append):
            assert said == []
        # Killed, it leaves one that says that it lives.
        memory.pipe("/bucket/run/heartbeat.json", lasting)
        with second.locked(said.append):
            assert "may still be running" in said[-1]


def test_what_a_killed_run_was_writing_goes(tmp_path: Path) -> None:
    """A process that is killed leaves what it had not given its name yet."""
    code = (
        "import os, sys; from pathlib import Path; from proteus_jax.runtime.filesystem import *\n"
    )
    code += (
        "with atomic_directory(Path(sys.argv[1])) as folder: (folder / 'a').touch(); os._exit(9)"
    )
    for name in ("student", "student/small"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT)
    assert len(list(tmp_path.rglob("a"))) == 2
    kept = (".notes", ".git-annex_1", "student/.hidden")
    for name in kept:
        (tmp_path / name).write_text("mine")
    with Workdir(tmp_path).locked(print):
        names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".*")}
    assert names == {*kept, ".lock"}
    assert not list(tmp_path.rglob("a"))


def test_a_run_that_is_stopping_is_waited_for(tmp_path: Path) -> None:
    """A lock of another process, which says that it has been asked to stop."""
    holder = (
        "import sys; from proteus_jax.runtime.workdir import Workdir; from pathlib import Path\n"
    )
    holder += "with Workdir(Path(sys.argv[1])).locked(print): print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        said: list[str] = []
        beat = {"state": "training", "process": process.pid, "host": "here"}
        (tmp_path / "heartbeat.json").write_text(json.dumps(beat))
        message = rf"in use by another run \(process {process.pid} on"
        with pytest.raises(InputError, match=message), Workdir(tmp_path).locked(said.append):
            pass
        (tmp_path / "heartbeat.json").write_text(json.dumps(beat | {"state": "stopping"}))
        threading.Timer(0.2, process.stdin.close).start()
        with Workdir(tmp_path).locked(said.append):
            assert said[0].startswith(f"waiting for process {process.pid} on ")


def test_where_there_are_no_locks_a_heartbeat_stands_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(heartbeat, "DEAD_AFTER", 1.5)
    monkeypatch.setattr(heartbeat, "EVERY", 0.05)
    with Workdir(tmp_path).locked(print):
        beat = Heartbeat(tmp_path, 4, say=print, log=print)
        with pytest.raises(InputError, match="in use by"), Workdir(tmp_path).locked(print):
            pass
        beat.close("stopped")
    with Workdir(tmp_path).locked(print):
        pass


@pytest.mark.parametrize("text", ["s3://bucket/run", "http://host/run", "hdfs://x"])
def test_other_addresses_are_refused_in_words(text: str) -> None:
    assert why_no_workdir(text) == f"expected a folder or an address on gs://, found {text}"
    if text.startswith("s3://"):
        return
    with pytest.raises(InputError, match="expected an address on gs:// or s3://"):
        proteus_jax.load(text)


def test_what_gs_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    reason = why_no_workdir("gs://bucket/run")
    assert reason is not None
    assert "gs://bucket/run needs more packages: pip install '.[gcs]'" in reason


def test_a_run_on_an_address_resumes_and_equals_one_in_a_folder(
    tmp_path: Path, photographs: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, folder = tmp_path / "bucket" / "run", tmp_path / "folder"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiler.FLAGS,
        "PROTEUS_JAX_CACHE": str(photographs.parent / "cache"),
    }

    def run(place: str, *more: str) -> str:
        arguments = command(Path("unused"), photographs, tiny_teacher, *more)[2:]
        arguments = [text for text in arguments if not text.startswith("--workdir")]
        code = STAND_IN.format(root=str(ROOT))
        started = [sys.executable, "-c", code, f"--workdir={place}", *arguments]
        result = warm.run(started, tmp_path, environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run(f"file://{bucket}", "--config.steps=4")
    assert json.loads((bucket / "config.json").read_text())["steps"] == 4
    printed = run(f"file://{bucket}", "--config.steps=4")
    assert "resuming at step 4" in printed
    assert f'proteus_jax.load("file://{bucket}/student")' in printed
    run(str(folder), "--config.steps=4")
    assert_same_run(bucket, folder)
    monkeypatch.setattr(workdir, "SCHEMES", ("file",))
    images = np.zeros((1, 28, 28, 3), np.uint8)
    there, here = (proteus_jax.load(str(at)) for at in (f"file://{bucket}/student", folder))
    np.testing.assert_array_equal(there(images).cls, here(images).cls)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", '{"precious": 1}', "holds config.json, and is no run's"),
        ("config.json", "[]", "holds config.json, and is no run's"),
        ("student", None, "holds student, and is no run's"),
        ("metrics.jsonl", "mine", "holds metrics.jsonl, and is no run's"),
        ("model.safetensors", "", "holds a model or an evaluation (model.safetensors)"),
        ("results.json", "{}", "holds a model or an evaluation (results.json)"),
    ],
)
def test_a_folder_that_is_no_runs_is_left_alone(
    name: str,
    content: str | None,
    words: str,
    tmp_path: Path,
    photographs: Path,
    tiny_teacher: Path,
) -> None:
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content)
    assert words in " ".join(refused(tmp_path, photographs, tiny_teacher))


def test_a_workdir_among_the_images_is_refused(photographs: Path, tiny_teacher: Path) -> None:
    for place in (photographs, photographs / "runs" / "one"):
        (problem,) = refused(place, photographs, tiny_teacher)
        assert problem.startswith(f"--workdir: {place} lies in {photographs}, ")


def test_a_link_to_a_workdir_among_the_images_is_one(
    photographs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(photographs)
    (problem,) = refused(tmp_path / "link" / "runs", photographs, tiny_teacher)
    assert problem.startswith(f"--workdir: {tmp_path / 'link' / 'runs'} lies in {photographs}, ")


def test_nothing_is_fetched_before_a_misspelt_path_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teachers are gigabytes."""
    monkeypatch.setenv("PROTEUS_JAX_CACHE", str(tmp_path / "cache"))
    asked: list[str] = []
    monkeypatch.setattr(inputs, "obtain_model", asked.append)
    problems = refused(tmp_path / "run", tmp_path / "misspelt", Path("dinov2_vitb14"))
    assert len(problems) == 1
    assert "misspelt: no such folder" in problems[0]
    assert asked == []


def refused(workdir: Path, photographs: Path, teacher: Path) -> list[str]:
    overrides = [Override("data.root", str(photographs)), Override("teacher", str(teacher))]
    file = str(ROOT / "configs" / "quickstart_paper.py")
    configuration, problems = load(file, overrides, schema_of)
    with pytest.raises(InputError) as error:
        open_inputs(configuration, str(workdir), problems)
    return error.value.problems


def test_what_somebody_put_into_a_student_stays(tmp_path: Path) -> None:
    student = tmp_path / "student"
    for text in ("old", "new"):
        with atomic_directory(student, replace=True) as folder:
            (folder / "config.json").write_text(text)
        (student / "notes").mkdir(exist_ok=True)
        (student / "notes" / f"{text}.txt").write_text("mine")
    assert (student / "config.json").read_text() == "new"
    assert sorted(path.name for path in (student / "notes").iterdir()) == ["new.txt", "old.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
