import json
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from proteus_jax.console import duration
from proteus_jax.metrics import MetricsWriter, read_metrics

messages: Any = event_pb2  # its classes are made at run time


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Every scalar of the event files, read record by record."""
    found = {}
    for path in sorted(folder.iterdir()):
        content, position = path.read_bytes(), 0
        while position < len(content):
            length = int.from_bytes(content[position : position + 8], "little")
            event = messages.Event.FromString(content[position + 12 : position + 12 + length])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            position += length + 16
    return found


def test_rows_and_events(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, None)
    for step in range(1, 4):
        writer.write(step, {"loss": 1 / step, "data_wait": 0.0})
    writer.close()
    assert list(read_metrics(tmp_path)) == [
        {"step": step, "loss": 1 / step, "data_wait": 0.0} for step in range(1, 4)
    ]
    assert scalars(tmp_path / "tensorboard")["loss", 3] == pytest.approx(1 / 3)


def test_a_resumed_run_goes_on_where_its_checkpoint_stood(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, None)
    for step in range(6):
        writer.write(step, {"loss": step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    writer = MetricsWriter(tmp_path, 3)
    writer.write(4, {"loss": 40.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        (0, 0), (1, 1), (2, 2), (3, 3), (4, 40),
    ]  # fmt: skip
    MetricsWriter(tmp_path, None).close()
    assert list(read_metrics(tmp_path)) == []


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write(1, {"loss": float("nan")})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    json.dumps(list(read_metrics(tmp_path)))


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.9, 61, 3723)] == [
        "0:00", "0:59", "1:01", "1:02:03",
    ]  # fmt: skip
