"""Metrics on disk: metrics.jsonl and TensorBoard events, one row a logged step."""

import contextlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clu import parameter_overview

from proteus_jax.runtime.filesystem import write_atomically


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """A module that is not loaded yet cannot be imported in the block."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


# It would import torch where there is one: a second at every start, and nothing here needs it.
with _without("torch"):
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.record_writer import masked_crc32c

FILE, EVENTS = "metrics.jsonl", "tensorboard"
# Their classes are made at run time.
_events: Any = event_pb2
_summaries: Any = summary_pb2


class MetricsWriter:
    """Appends rows to metrics.jsonl and to tensorboard/; a resumed run continues where its
    checkpoint stood.

    A row that cannot be written, as where the disk is full, is kept and tried again with the next;
    `sync` says why it could not.
    """

    def __init__(self, workdir: Path, resumed_step: int | None):
        # A killed run may have logged more than it saved: those steps will be made, and logged,
        # again.
        last = -1 if resumed_step is None else resumed_step
        kept = [json.dumps(row) for row in read_metrics(workdir) if row["step"] <= last]
        write_atomically(workdir / FILE, "".join(line + "\n" for line in kept))
        self._rows = _Appended(workdir / FILE)
        (workdir / EVENTS).mkdir(exist_ok=True)
        # TensorBoard takes a file of this name for events.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._events = _Appended(workdir / EVENTS / name)
        # It hides what an earlier start logged from the next step on.
        start = _events.SessionLog(status=_events.SessionLog.START)
        self._add_event(file_version="brain.Event:2")
        self._add_event(step=last + 1, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row; values are finite numbers."""
        row = {"step": step} | {key: float(value) for key, value in values.items()}
        self._rows.add(json.dumps(row, allow_nan=False).encode() + b"\n")
        scalars = [
            _summaries.Summary.Value(tag=key, simple_value=float(value))
            for key, value in values.items()
        ]
        self._add_event(step=step, summary=_summaries.Summary(value=scalars))

    def _add_event(self, **fields: Any) -> None:
        """A record of TFRecord's form: its length and itself, each with a checksum."""
        data = _events.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._events.add(length + checks[0] + data + checks[1])

    def sync(self) -> None:
        """Everything written so far is on the disk when this returns; OSError where it cannot
        be.
        """
        self._rows.sync()
        self._events.sync()

    def close(self) -> None:
        """Writes what is left, where it can."""
        self._rows.close()
        self._events.close()


class _Appended:
    """A file that grows by whole records, never by a part of one."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (until close)
        self._good = self._file.seek(0, os.SEEK_END)
        self._waiting = b""

    def add(self, record: bytes) -> None:
        """Writes it, after those that wait; where that fails it waits too."""
        self._waiting += record
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        try:
            position = 0
            while position < len(self._waiting):
                position += self._file.write(self._waiting[position:])
        except OSError:
            self._file.truncate(self._good)
            raise
        self._good += len(self._waiting)
        self._waiting = b""

    def sync(self) -> None:
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sync()
        self._file.close()


class NoMetrics:
    """Stands where the first of several hosts has its MetricsWriter."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(workdir: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run, in order; a line that a kill cut short, or that is damaged, is left
    out.
    """
    path = workdir / FILE
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def parameter_table(params: Any) -> str:
    """Every parameter with its shape, size, mean, deviation and sharding, as text for the log; all
    hosts must take part.
    """
    return parameter_overview.get_parameter_overview(params, include_stats="global")
