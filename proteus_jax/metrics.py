"""What a run writes down: metrics.jsonl and TensorBoard events, one row a logged step."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorboardX
from clu import parameter_overview

from proteus_jax.storage import write_atomically

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to metrics.jsonl and to tensorboard/; a resumed run continues where its
    checkpoint stood.
    """

    def __init__(self, workdir: Path, resumed_step: int | None):
        self._path = workdir / FILE
        if resumed_step is None:
            kept: list[str] = []
        else:
            # A killed run may have logged more than it saved: those steps will be made, and logged,
            # again.
            kept = [json.dumps(row) for row in read_metrics(workdir) if row["step"] <= resumed_step]
        write_atomically(self._path, "".join(line + "\n" for line in kept))
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115  (until close)
        purge = None if resumed_step is None else resumed_step + 1
        self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row; values are finite numbers."""
        row = {"step": step} | {key: float(value) for key, value in values.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        for key, value in values.items():
            self._events.add_scalar(key, float(value), step)

    def sync(self) -> None:
        """Everything written so far is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        """Writes what is left."""
        self.sync()
        self._file.close()
        self._events.close()


class NoMetrics:
    """Stands where the first of several hosts has its MetricsWriter."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(workdir: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run, in order; a last line that a kill cut short is left out."""
    path = workdir / FILE
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def parameter_table(params: Any) -> str:
    """Every parameter with its shape, size, mean and deviation, as text for the log."""
    return parameter_overview.get_parameter_overview(params)
