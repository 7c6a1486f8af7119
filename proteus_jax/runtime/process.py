"""The settings of a process that a command makes before it begins."""

import contextlib
import os
import signal
import sys

from proteus_jax.errors import InputError

# By these a person or a scheduler asks a process to end: from the keyboard, by a scheduler, from a
# connection that is lost; SLURM's --signal and submitit send the last two before a job's machines
# are taken away.
_REQUESTS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
REQUESTS = tuple(getattr(signal, name) for name in _REQUESTS if hasattr(signal, name))
# What a person may have JAX refuse, or widen, in programs of their own; here all of it is meant.
_STRICT = ("JAX_NUMPY_RANK_PROMOTION", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_ENABLE_X64")


def begin() -> None:
    """Prepares the process; to be called first by a command. Paths and texts are UTF-8 whatever the
    locale says, as many files may be open as the system allows, and JAX computes as always,
    whatever the environment has it refuse or widen. Standard streams that are closed lead nowhere.

    On a system that lacks what a run is made of, as Windows, it ends the process in one line.
    """
    _open_standard_streams()
    _refuse_other_systems()
    _speak_utf8()
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # macOS has no limit here, and takes none.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for name in _STRICT:
        os.environ.pop(name, None)


def _open_standard_streams() -> None:
    """Opens standard streams that are closed, as by some daemons: they lead nowhere, and no file
    that is opened later gets their numbers, into which libraries write.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free: this one. Processes that are started have it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _refuse_other_systems() -> None:
    missing = [name for name in ("fcntl", "resource") if not _is_there(name)]
    missing += [name for name in ("SIGHUP", "SIGUSR1") if not hasattr(signal, name)]
    missing += [] if hasattr(os, "fork") else ["fork"]
    if missing:
        print(
            f"{sys.platform} has no {', '.join(missing)}: expected Linux or macOS; on Windows the "
            "Windows Subsystem for Linux (WSL 2) runs this",
            file=sys.stderr,
        )
        sys.exit(InputError.EXIT_CODE)


def _is_there(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def _speak_utf8() -> None:
    """Starts this Python again, in the same process, where it would read names and texts as ASCII
    or by an older code page: it cannot be told later.
    """
    if sys.getfilesystemencoding() == "utf-8" and (sys.flags.utf8_mode or _locale_is_utf8()):
        return
    # For the processes that it starts, too.
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _locale_is_utf8() -> bool:
    import locale

    return locale.getencoding().lower().replace("-", "") == "utf8"
