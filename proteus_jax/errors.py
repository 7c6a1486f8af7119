"""Faults that a user can cause: reported in words, never as a traceback."""

from collections.abc import Sequence

DEFECT = 1


class InputError(Exception):
    """Something the user gave is wrong; `problems` lists all of it, each naming what was expected
    and found.
    """

    EXIT_CODE = 2

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Diverged(Exception):
    """Training left the finite numbers."""

    EXIT_CODE = 3


class Interrupted(Exception):
    """The run cannot go on now, through no fault of its input; the same command goes on later."""

    EXIT_CODE = 75


def exit_code(error: BaseException) -> int:
    """With which a process ends of an error; 1 where it is a defect."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.EXIT_CODE
    return error.EXIT_CODE if isinstance(error, InputError | Diverged | Interrupted) else DEFECT
