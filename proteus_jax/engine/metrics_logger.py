"""The numbers of logged steps, from the device to metrics.jsonl and the terminal."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from proteus_jax.runtime.console import Console, duration
from proteus_jax.runtime.metric_writer import MetricsWriter, NoMetrics


class Written(NamedTuple):
    """A row that was written, and whether its step was evaluated."""

    step: int
    values: dict[str, float]
    evaluated: bool


class _Pending(NamedTuple):
    """A logged step whose numbers are still on the device."""

    step: int
    metrics: Mapping[str, jax.Array]
    measured: dict[str, float]
    evaluated: bool


class MetricsLogger:
    """One row waits: its numbers are fetched when the device is busy with the next logged step.

    `losses` are the names of those on the live line. `work` is in FLOPs an image, `peak` in FLOPs a
    second of all devices, None where it is unknown.
    """

    def __init__(
        self,
        writer: MetricsWriter | NoMetrics,
        console: Console,
        *,
        students: Sequence[str],
        losses: Sequence[str],
        total_steps: int,
        work: float,
        peak: float | None,
    ):
        self._writer, self._console = writer, console
        self._students, self._losses, self._total_steps = students, losses, total_steps
        self._work, self._peak = work, peak
        self._pending: _Pending | None = None
        self.sync, self.close = writer.sync, writer.close
        self.begin(0)

    def begin(self, step: int) -> None:
        """From here on the pace is counted."""
        self._began, self._began_at = time.monotonic(), step

    def measure(self, step: int, measured: dict[str, float]) -> None:
        """A row of a step that nothing was computed in."""
        self._writer.write(step, self._renamed(measured))

    def hold(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        measured: dict[str, float],
        *,
        evaluated: bool,
    ) -> None:
        """A row to be written later. `measured` is what the host knows of the step already."""
        self._pending = _Pending(step, metrics, measured, evaluated)

    def rates(self, measured: dict[str, float]) -> dict[str, float]:
        """Adds the images a second of each device and, where the devices' peak is known, the share
        of it that the work needed.
        """
        rate = measured["images_per_second"]
        measured["images_per_second_per_device"] = rate / jax.device_count()
        if self._peak is not None:
            measured["mfu"] = rate * self._work / self._peak
        return measured

    def write(self) -> Written | None:
        """Fetches and writes the row that waits; what is not finite is left out of it."""
        if self._pending is None:
            return None
        step, metrics, measured, evaluated = self._pending
        self._pending = None
        fetched = {key: float(value) for key, value in jax.device_get(dict(metrics)).items()}
        values = self._renamed(fetched | measured)
        values = {key: value for key, value in values.items() if np.isfinite(value)}
        self._writer.write(step, values)
        self._show(step, values)
        return Written(step, values, evaluated)

    def _renamed(self, values: dict[str, float]) -> dict[str, float]:
        """Leaves the name of the student out of the keys where there is only one."""
        if len(self._students) > 1:
            return values
        return {key.rpartition("/")[2]: value for key, value in values.items()}

    def _show(self, step: int, values: dict[str, float]) -> None:
        """The live line."""
        total = self._total_steps
        used = f"MFU {values['mfu']:.0%}  " if "mfu" in values else ""
        pace = (time.monotonic() - self._began) / max(step - self._began_at, 1)
        first = self._students[0]
        own = {key.removeprefix(f"{first}/"): value for key, value in values.items()}
        losses = "  ".join(
            f"{key.removesuffix('_loss')} {own.get(key, float('nan')):.3f}" for key in self._losses
        )
        self._console.progress(
            f"step {step}/{total}  {losses}  "
            f"{values['images_per_second']:.1f} images/s  {used}"
            f"data wait {values['data_wait']:.0%}  "
            f"{duration(pace * (total - step))} left",
            last=step == total,
        )
