"""Faults are tried one after the other or a few at a time, and counted."""

import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple


class Fault(NamedTuple):
    """Something that goes wrong, and a check that raises AssertionError where it did harm."""

    name: str
    try_it: Callable[[], None]


class Account:
    """How many were tried, survived and lost; what was lost is said at once."""

    def __init__(self) -> None:
        self.survived = 0
        self.lost: list[str] = []
        self._lock = threading.Lock()

    def tried(self, group: str, faults: Iterable[Fault], together: int = 1) -> None:
        """Tries a group of faults and prints what became of them."""
        start, before = time.monotonic(), (self.survived, len(self.lost))
        with ThreadPoolExecutor(together) as pool:
            list(pool.map(lambda fault: self._try(f"{group}: {fault.name}", fault.try_it), faults))
        survived, lost = self.survived - before[0], len(self.lost) - before[1]
        seconds = time.monotonic() - start
        print(f"{group:28}{survived + lost:5} faults{lost:5} lost{seconds:8.0f} s", flush=True)

    def _try(self, name: str, try_it: Callable[[], None]) -> None:
        try:
            try_it()
        except Exception:
            with self._lock:
                self.lost.append(name)
            print(f"LOST {name}\n{traceback.format_exc()}", flush=True)
        else:
            with self._lock:
                self.survived += 1

    def line(self) -> str:
        """The sum of it."""
        count = self.survived + len(self.lost)
        return f"{count} faults, {self.survived} survived, {len(self.lost)} lost"
