"""How a command ends: its last lines, and its exit code."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from proteus_jax.errors import (
    Diverged,
    InputError,
    Interrupted,
    exit_code,
    is_of_a_name,
    is_of_the_disk,
)
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.process import REQUESTS

# Seconds that a last line may take.
UNREAD = 2.0


def ending(run: Callable[[], int], console: Console) -> int:
    """Runs a command; returns its exit code, after words for what went wrong."""
    try:
        code = run()
        console.dismiss_watcher()
        return code
    except InputError as error:
        count = len(error.problems)
        console.error(f"{count} problem{'' if count == 1 else 's'} with the input:")
        for problem in [*error.problems, *_notes(error)]:
            console.error(f"  {problem}")
        return exit_code(error)
    except (Diverged, Interrupted) as error:
        console.error("\n".join([str(error), *_notes(error)]))
        return exit_code(error)
    except Exception as error:
        if is_of_the_disk(error):
            message = f"{error}; the same command goes on once there is room to write"
            console.error("\n".join([message, *_notes(error)]))
        elif isinstance(error, OSError) and is_of_a_name(error):
            console.log(traceback.format_exc())
            console.error(f"1 problem with the input:\n  {error.filename}: {error.strerror}")
        elif isinstance(error, ModuleNotFoundError) and not _is_ours(error.name or ""):
            console.error(
                f"{sys.executable} has no {error.name}: expected what requirements.txt names; "
                "`make .venv/run.stamp` installs it for .venv/bin/python"
            )
            return InputError.EXIT_CODE
        else:
            console.error(traceback.format_exc())
        return exit_code(error)


def _notes(error: Exception) -> list[str]:
    return getattr(error, "__notes__", [])


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("proteus_jax", "configs")


def end_at_a_signal(console: Console) -> None:
    """Makes a request to stop end this process at once: until it trains, which is when requests
    wait for the step, nothing is lost. An exception in place of that may end in some library's
    callback.

    A thread hears of them: the main one may be listing a store or compiling, in C++, where Python's
    handlers wait.
    """
    numbers = [number for number in REQUESTS if signal.getsignal(number) != signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while os.read(reader, 1)[0] not in numbers:
            pass
        # Where nobody reads what is said, it ends all the same.
        threading.Timer(UNREAD, os._exit, [Interrupted.EXIT_CODE]).start()
        try:
            console.error("interrupted; the same command goes on")
        finally:
            os._exit(Interrupted.EXIT_CODE)

    for number in numbers:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True, name="requests to end").start()


def end(code: int) -> None:
    """Ends this process; at once after a failure on one of several hosts."""
    if code and "jax" in sys.modules:
        from proteus_jax.runtime import distributed

        distributed.end_at_once_if_several(code)
    sys.exit(code)
