"""A trace of a few steps for TensorBoard and Perfetto."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """A trace of a few steps, once those that compile and fill the queues are past."""

    FIRST, LAST = 5, 10

    def __init__(self, directory: Path, *, on: bool):
        self._directory, self._on, self._running = directory, on, False
        self.missed = on

    def after(self, count: int, values: Any) -> None:
        """Looks at the number of steps so far, the last one's results still on the device."""
        if self._on and count == self.FIRST:
            jax.block_until_ready(values)
            jax.profiler.start_trace(self._directory)
            self._running, self.missed = True, False
        elif self._running and count == self.LAST:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Writes the trace where one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
