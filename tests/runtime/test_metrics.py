import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import pytest
from conftest import Heard
from small import events, scalars

from proteus_jax.engine.metrics_logger import MetricsLogger
from proteus_jax.runtime.console import duration
from proteus_jax.runtime.metric_writer import MetricsWriter, NoMetrics, read_metrics

LOSSES = ("loss", "token_loss", "feature_loss", "patch_loss")


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


def test_what_tensorboard_hides_after_a_resume(tmp_path: Path) -> None:
    """From the step after the checkpoint's own on, which was logged before and stays."""
    MetricsWriter(tmp_path, 3).close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    starts = [event.step for event in events(path) if event.session_log.status]
    assert starts == [4]


class Written(NoMetrics):
    """Keeps what it is to write."""

    def __init__(self):
        self.rows: list[tuple[int, Mapping[str, float]]] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, values))


def test_rows_of_two_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not finite is left out; the live line shows the first student, and how long it is
    from here on; a device's share is that of all devices.
    """
    now = [50.0]
    monkeypatch.setattr("proteus_jax.engine.metrics_logger.time.monotonic", lambda: now[0])
    monkeypatch.setattr("proteus_jax.engine.metrics_logger.jax.device_count", lambda: 16)
    writer, console = Written(), Heard()
    rows = MetricsLogger(
        writer, console, students=("a", "b"), losses=LOSSES, total_steps=30, work=1e10, peak=4e12
    )
    rows.begin(10)
    now[0] += 20.0
    losses = {
        f"{name}/{key}": jnp.float32(value)
        for name, value in (("a", 1.5), ("b", 2.5))
        for key in ("loss", "token_loss", "feature_loss", "patch_loss")
    }
    measured = rows.rates({"images_per_second": 80.0, "data_wait": 0.25})
    spoilt = {"x": jnp.float32(jnp.nan), "y": jnp.float32(-jnp.inf)}
    rows.hold(20, losses | spoilt, measured, evaluated=True)
    assert writer.rows == []
    found = rows.write()
    assert found is not None
    assert (found.step, found.evaluated) == (20, True)
    assert rows.write() is None
    ((step, values),) = writer.rows
    assert step == 20
    assert "x" not in values
    assert "y" not in values
    assert (values["a/loss"], values["b/loss"]) == (1.5, 2.5)
    assert values["images_per_second_per_device"] == 5.0
    assert values["mfu"] == pytest.approx(80 * 1e10 / 4e12)
    (line,) = console.live
    # Ten steps took twenty seconds, and ten are left.
    assert line.startswith("step 20/30  loss 1.500  token 1.500  feature 1.500  patch 1.500")
    assert line.endswith("MFU 20%  data wait 25%  0:20 left")


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
