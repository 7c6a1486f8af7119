"""Machines as containers, schedulers and daemons make them: little shared memory, few open files, a
home that is read-only, no terminal, another locale, flags for debugging.
"""

import subprocess
import sys

from fault_suite.account import Fault
from fault_suite.bench import Bench, assert_same

WORKERS = "--config.data.workers=2"
# What a file system for it is mounted with, and what is said of it.
SHARED_MEMORY = {
    "size=200k": "threads in place of 2 worker processes make images: 0.205 MB are free",
    "ro,size=64m": "threads in place of 2 worker processes make images: shared memory (/dev/shm) "
    "cannot be written",
    "size=1500k": "1 in place of 2 worker processes make images: 1.54 MB are free",
}
LOCALE = {"LC_ALL": "POSIX", "LANG": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
STRICT = {
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_ENABLE_X64": "1",
}


def faults(bench: Bench, *, quick: bool) -> list[Fault]:
    """Where no file system can be mounted those that need one are left out, which is said."""
    found = [
        Fault("few open files", lambda: _few_files(bench)),
        Fault("another locale", lambda: _variables(bench, "locale é ☕", LOCALE)),
        Fault("flags for debugging", lambda: _variables(bench, "strict", STRICT)),
        Fault("closed streams", lambda: _closed_streams(bench)),
        Fault("a back end that is not there", lambda: _no_back_end(bench)),
        Fault("a flag that XLA does not know", lambda: _no_flag(bench)),
        Fault("another system", lambda: _another_system(bench)),
    ]
    if not _can_mount():
        print("no file system can be mounted here: shared memory is left out", flush=True)
        return found
    found.append(Fault("a read-only home", lambda: _read_only_home(bench)))
    kinds = list(SHARED_MEMORY)[: 1 if quick else None]
    return found + [
        Fault(f"shared memory, {kind}", lambda kind=kind: _shared_memory(bench, kind))
        for kind in kinds
    ]


def _can_mount() -> bool:
    tried = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    try:
        return subprocess.run(tried, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _mounted(options: str, place: str, command: list[str]) -> list[str]:
    """A command that sees a fresh file system at a place."""
    script = 'mount -t tmpfs -o "$0" none "$1" && shift && exec "$@"'
    return ["unshare", "-m", "bash", "-c", script, options, place, *command]


def _shared_memory(bench: Bench, options: str) -> None:
    workdir = bench.root / f"shared memory {options}"
    command = bench.command(workdir, WORKERS)
    result = bench.run(_mounted(options, "/dev/shm", command))
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "in place of" in line]
    assert line.startswith(SHARED_MEMORY[options])
    assert "--shm-size" in line
    assert_same(workdir, bench.undisturbed)


def _read_only_home(bench: Bench) -> None:
    """What is fetched has no place; a run that fetches nothing needs none."""
    home, workdir = bench.root / "home", bench.root / "read-only home"
    home.mkdir()
    environment = {"HOME": str(home), "PROTEUS_JAX_CACHE": ""}
    command = bench.command(workdir)
    result = bench.run(_mounted("ro", str(home), command), **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same(workdir, bench.undisturbed)
    known = [*bench.command(bench.root / "read-only"), "--config.teacher=dinov2_vits14"]
    result = bench.run(_mounted("ro", str(home), known), **environment)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "PROTEUS_JAX_CACHE names another folder" in result.stderr


def _few_files(bench: Bench) -> None:
    workdir = bench.root / "few files"
    few = ["bash", "-c", 'ulimit "$0" 64; exec "$@"']
    result = bench.run([*few, "-n", *bench.command(workdir, WORKERS)])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "threads in place of 2 worker processes make images: at most 64 files may be open" in (
        result.stdout
    )
    assert_same(workdir, bench.undisturbed)
    # What the system allows but did not give at once is taken.
    workdir = bench.root / "few files at first"
    result = bench.run([*few, "-Sn", *bench.command(workdir, WORKERS)])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "in place of" not in result.stdout


def _variables(bench: Bench, name: str, variables: dict[str, str]) -> None:
    workdir = bench.root / name
    result = bench.run(bench.command(workdir), **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same(workdir, bench.undisturbed)


def _closed_streams(bench: Bench) -> None:
    workdir = bench.root / "closed streams"
    result = bench.run(["bash", "-c", 'exec "$@" <&- >&- 2>&-', "closed", *bench.command(workdir)])
    assert result.returncode == 0
    assert_same(workdir, bench.undisturbed)


def _no_back_end(bench: Bench) -> None:
    for platform in ("cuda", "tpu", "no_such_thing"):
        result = bench.run(bench.command(bench.root / "no back end"), JAX_PLATFORMS=platform)
        assert result.returncode == 2, result.stdout + result.stderr
        assert f"JAX_PLATFORMS={platform}: JAX cannot start it" in result.stderr
        assert "Traceback" not in result.stderr


def _no_flag(bench: Bench) -> None:
    command = bench.command(bench.root / "no flag")
    result = bench.run(command, XLA_FLAGS="--xla_no_such_flag=1")
    assert result.returncode != 0
    assert "xla_no_such_flag" in result.stderr


def _another_system(bench: Bench) -> None:
    """Python as Windows has it: without some modules and signals."""
    code = (
        "import signal, sys; del signal.SIGHUP; sys.modules['fcntl'] = None; "
        "sys.argv = sys.argv[1:]; sys.path[0] = sys.argv[0].rpartition('/')[0]; import runpy; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    _, script, *arguments = bench.command(bench.root / "another system")
    result = bench.run([sys.executable, "-c", code, script, *arguments])
    assert result.returncode == 2, result.stderr
    assert "has no fcntl, SIGHUP: expected Linux or macOS; on Windows" in result.stderr
    assert len(result.stderr.splitlines()) == 1
