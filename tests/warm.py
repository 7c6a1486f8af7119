"""Commands of this package as processes of their own, forked from one that has imported it already.

An import of JAX and all that comes with it takes longer than most of what tests ask of a command.
What is forked is as a fresh process in everything else: its own arguments, environment, folder and
output; its own devices, which the parent never starts; and an interpreter that ends as usual.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
# Read when JAX is imported: a command that changes one of them needs a fresh process.
AT_IMPORT = ("JAX_", "PYTHON", "TF_", "OMP_", "OPENBLAS_")
_server: subprocess.Popen | None = None


def run(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess:
    """As subprocess.run of [python, script, ...], with its output captured as text."""
    if _differs(environment):
        return subprocess.run(
            arguments, cwd=folder, env=environment, capture_output=True, text=True
        )
    server = _started()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        streams = [str(Path(place) / name) for name in ("out", "err")]
        asked = [list(arguments), str(folder), dict(environment), streams]
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        said = [Path(stream).read_text() for stream in streams]
    return subprocess.CompletedProcess(arguments, code, *said)


def _differs(environment: Mapping[str, str]) -> bool:
    names = {*environment, *os.environ}
    return any(
        environment.get(name) != os.environ.get(name)
        for name in names
        if name.startswith(AT_IMPORT)
    )


def _started() -> subprocess.Popen:
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(_end, _server)
    return _server


def _end(server: subprocess.Popen) -> None:
    server.kill()
    server.communicate()


def _serve() -> None:
    """One command after the other, until nobody asks any more."""
    sys.path[0] = str(ROOT)
    import main  # noqa: F401
    from proteus_jax import checkup, cluster, collectives, dump, experiment, plan, train  # noqa: F401
    from proteus_jax.evaluation import run as evaluation  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(*asked)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(
    arguments: list[str], folder: str, environment: dict[str, Any], streams: list[str]
) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDONLY)
    files = [os.open(stream, os.O_WRONLY | os.O_CREAT) for stream in streams]
    for number, opened in enumerate((nothing, *files)):
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = arguments[1:]
    # As Python itself begins a script.
    sys.path[0] = str(Path(arguments[1]).parent)
    sys.modules.pop("main")
    runpy.run_path(arguments[1], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    _serve()
