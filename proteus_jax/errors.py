"""Faults that a user can cause: reported in words, never as a traceback."""

from collections.abc import Sequence


class InputError(Exception):
    """Something the user gave is wrong; `problems` lists all of it, each naming what was expected
    and found.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Diverged(Exception):
    """Training left the finite numbers."""


class Interrupted(Exception):
    """The run cannot go on now, through no fault of its input; the same command goes on later."""

    EXIT_CODE = 75
