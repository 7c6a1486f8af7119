"""Commands of this package as processes of their own, forked from one that has imported it already.

An import of JAX and all that comes with it takes longer than most of what tests ask of a command.
What is forked is as a fresh process in everything else: its own arguments, environment, folder and
output; its own devices, which the process that it comes from never starts; and an interpreter that
ends as usual.
"""

import atexit
import contextlib
import ctypes
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent
# Read when JAX is imported: a command that changes one of them needs a fresh process.
AT_IMPORT = ("JAX_", "PYTHON", "TF_", "OMP_", "OPENBLAS_")
# Of Python, which a fork has as they were.
FLAGS = ("-u", "-m")
# Of a message: arguments and an environment.
LARGEST = 2**18
# Whose children become those of a process above it that asks for them (see prctl(2)).
SUBREAPER = 36


class Parent(NamedTuple):
    """The process that has imported all: where it is asked, and in which environment it began."""

    asked: socket.socket
    environment: dict[str, str]


_parent: Parent | None = None
_asking = threading.Lock()


class Forked(subprocess.Popen):
    """A process as subprocess.Popen has it, but forked from the one that has imported all."""

    def _execute_child(self, *given: Any) -> None:
        execute = super()._execute_child  # pyright: ignore[reportAttributeAccessIssue]
        asked = inspect.signature(execute).bind(*given).arguments
        streams = [asked["c2pwrite"], asked["errwrite"]]
        out, err = (number if stream == -1 else stream for number, stream in enumerate(streams, 1))
        folder = str(asked["cwd"] or Path.cwd())
        what = [asked["args"], folder, asked["env"], asked["start_new_session"]]
        self.pid = _fork(what, (out, err))
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        close = self._close_pipe_fds  # pyright: ignore[reportAttributeAccessIssue]
        close(*(asked[end] for end in ends))


def start(
    arguments: Sequence[str], *, env: Mapping[str, str], **more: Any
) -> subprocess.Popen[str]:
    """Starts [python, script or "-c", ...] as subprocess.Popen does, its output as text."""
    command = [str(part) for part in arguments]
    forks = sys.platform.startswith("linux") and command[0] == sys.executable
    if not forks or command[1] in FLAGS or _differs(env):
        return subprocess.Popen(command, env=env, text=True, **more)
    return Forked(command, env=dict(env), text=True, **more)


def run(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], **more: Any
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run of [python, script, ...], with its output captured as text."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(arguments, cwd=folder, env=environment, **streams) as process:
        try:
            said = process.communicate(**more)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, *said)


def _differs(environment: Mapping[str, str]) -> bool:
    imported = dict(os.environ) if _parent is None else _parent.environment
    names = {*environment, *imported}
    return any(
        environment.get(name) != imported.get(name) for name in names if name.startswith(AT_IMPORT)
    )


def _fork(asked: list[Any], streams: tuple[int, int]) -> int:
    """The process that does what is asked: a child of this one."""
    global _parent
    # Several threads may ask: until its child is theirs, nobody else may change who gets it.
    with _asking, _subreaper():
        if _parent is None:
            _parent = _started()
        socket.send_fds(_parent.asked, [json.dumps(asked).encode()], streams)
        return int(_parent.asked.recv(LARGEST))


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Only meanwhile: what other tests leave to themselves is not to become a child of this one."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(SUBREAPER, 1) == 0
    yield
    prctl(SUBREAPER, 0)


def _started() -> Parent:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, __file__, str(theirs.fileno())]
    server = subprocess.Popen(words, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(_end, server, ours)
    return Parent(ours, dict(os.environ))


def _end(server: subprocess.Popen, asked: socket.socket) -> None:
    asked.close()
    server.kill()
    server.communicate()


def _serve(asked_by: socket.socket) -> None:
    """Forks one command after the other, until nobody asks any more."""
    sys.path[0] = str(ROOT)
    import main  # noqa: F401
    from proteus_jax.evaluation import runner as evaluation  # noqa: F401
    from proteus_jax.training.planning import plan  # noqa: F401

    while True:
        message, streams, _, _ = socket.recv_fds(asked_by, LARGEST, 2)
        if not message:
            return
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child == 0:
                for unused in (reader, writer, asked_by.detach()):
                    os.close(unused)
                _become(streams, *json.loads(message))
            os.write(writer, str(child).encode())
            # Its child goes to who asked for it.
            os._exit(0)
        os.waitpid(between, 0)
        asked_by.send(os.read(reader, 64))
        for used in (reader, writer, *streams):
            os.close(used)


def _become(
    streams: list[int],
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    own_session: bool,
) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if own_session:
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, opened in enumerate((nothing, *streams)):
        os.dup2(opened, number)
        os.close(opened)
    # What they write to now may be of another kind: a terminal, a pipe, a file.
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    sys.modules.pop("main")
    # As Python itself begins.
    if arguments[1] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[3:]], ""
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(arguments[2], vars(sys.modules["__main__"]))
    else:
        sys.argv, sys.path[0] = arguments[1:], str(Path(arguments[1]).parent)
        runpy.run_path(arguments[1], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
