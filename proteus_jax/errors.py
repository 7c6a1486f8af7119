"""Faults that a user can cause: reported in words, never as a traceback."""

import contextlib
import errno
import re
from collections.abc import Iterator, Sequence

DEFECT = 1


def _readable(text: str) -> str:
    """A text without addresses of objects, and without codes that a terminal would obey: names of
    files and texts of libraries may hold either.
    """
    text = re.sub(r" at 0x[0-9a-fA-F]{4,}", "", text)
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class InputError(Exception):
    """Something the user gave is wrong; `problems` lists all of it, each naming what was expected
    and found.
    """

    EXIT_CODE = 2

    def __init__(self, problems: str | Sequence[str]):
        given = [problems] if isinstance(problems, str) else problems
        self.problems = [_readable(problem) for problem in given]
        super().__init__("\n".join(self.problems))


class Unreachable(InputError):
    """A source that cannot be fetched from; another one may have the same."""


class Unreadable(Exception):
    """A file that should be an image and is none."""

    def __init__(self, reason: str):
        super().__init__(_readable(reason))


@contextlib.contextmanager
def about(field: str) -> Iterator[None]:
    """Puts a field before the problems that the block raises, and before what the system says of a
    name, as that it is too long.
    """
    try:
        yield
    except InputError as error:
        raise InputError([f"{field}: {problem}" for problem in error.problems]) from None
    except OSError as error:
        if is_of_the_disk(error):
            raise
        name = str(error.filename or "")
        raise InputError(f"{field}: {error.strerror or error}: {name[:200]}") from None
    except RuntimeError as error:
        # What pathlib says of ~somebody.
        if "home directory" not in str(error):
            raise
        raise InputError(f"{field}: ~ is followed by no user of this machine") from None


@contextlib.contextmanager
def collecting(problems: list[str], field: str = "") -> Iterator[None]:
    """Collects the problems that the block raises in a list, under the field they are about where
    they do not name it themselves.
    """
    try:
        with about(field) if field else contextlib.nullcontext():
            yield
    except InputError as error:
        problems += error.problems


class Diverged(Exception):
    """Training left the finite numbers."""

    EXIT_CODE = 3


class Interrupted(Exception):
    """The run cannot go on now, through no fault of its input; the same command goes on later."""

    EXIT_CODE = 75


# The disk is full, has a limit, is read-only or broken.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def is_of_the_disk(error: BaseException) -> bool:
    """True where the disk takes no more: nobody's mistake here, and nothing to show a traceback
    for.
    """
    return isinstance(error, OSError) and error.errno in _OF_THE_DISK


# Something else is in the way of a name, or it is somebody else's.
_OF_A_NAME = (
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.ENAMETOOLONG),
)


def is_of_a_name(error: BaseException) -> bool:
    """True where the system refuses a name that this process was given, or made of one."""
    return isinstance(error, OSError) and error.errno in _OF_A_NAME and bool(error.filename)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with an error; 1 for a defect."""
    if isinstance(error, KeyboardInterrupt) or is_of_the_disk(error):
        return Interrupted.EXIT_CODE
    if is_of_a_name(error):
        return InputError.EXIT_CODE
    return error.EXIT_CODE if isinstance(error, InputError | Diverged | Interrupted) else DEFECT


@contextlib.contextmanager
def fitting(advice: str) -> Iterator[None]:
    """A host or device that runs out of memory becomes an InputError with what to do about it: the
    same command would come to the same end.
    """
    try:
        yield
    except Exception as error:
        # JAX has one class for all that XLA says; it is not imported for its name.
        of_jax = type(error).__name__ == "JaxRuntimeError"
        of_a_device = of_jax and "RESOURCE_EXHAUSTED" in str(error)
        if not of_a_device and not isinstance(error, MemoryError):
            raise
        where = "a device" if of_a_device else "this host"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].removeprefix("RESOURCE_EXHAUSTED: ")[:300].rstrip(".")
        raise InputError(f"{where} has not enough memory ({reason}): {advice}") from None


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever reading something from outside provokes becomes an InputError about it: parsers
    raise all there is on broken bytes. InputErrors pass as they are.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0][:300] if lines else type(error).__name__
        raise InputError(f"{what} ({type(error).__name__}: {reason})") from None
