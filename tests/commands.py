"""Commands as a person starts them, and what several tests ask of them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import compiler
import warm
from conftest import ROOT

from proteus_jax.runtime.metric_writer import read_metrics

STEPS, STUDENT = 12, "vit_tiny_2blocks"
UNMEASURED = ("--config.data.held_out.share=0",)


def environment(tmp_path: Path) -> dict[str, str]:
    """One device, an empty home, no cache, and no network to speak of."""
    return os.environ | {
        "XLA_FLAGS": compiler.FLAGS,
        "HOME": str(tmp_path),
        "PROTEUS_JAX_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
    }


def command(workdir: Path, photographs: Path, teacher: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "main.py"),
        f"--config={ROOT / 'configs' / 'quickstart_paper.py'}",
        f"--workdir={workdir}",
        f"--config.data.root={photographs}",
        f"--config.teacher={teacher}",
        # What a run is does not depend on its depth, what it takes does.
        f"--config.student={STUDENT}",
        f"--config.steps={STEPS}",
        "--config.optimizer.warmup_steps=2",
        "--config.batch=4",
        "--config.data.crop=28",
        "--config.checkpoint_every=2",
        "--config.eval_every=6",
        *more,
    ]


def finish(arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess:
    return warm.run(arguments, tmp_path, environment(tmp_path))


def losses(workdir: Path) -> list[dict]:
    """The rows without what depends on the clock."""
    clock = ("images_per_second", "images_per_second_per_device", "data_wait")
    return [
        {key: value for key, value in row.items() if key not in clock}
        for row in read_metrics(workdir)
    ]


def assert_same_run(workdir: Path, expected: Path) -> None:
    assert losses(workdir) == losses(expected)
    weights = "student/model.safetensors"
    assert (workdir / weights).read_bytes() == (expected / weights).read_bytes()


def until(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def evaluate(protocol: str, model: object, root: object, workdir: Path, *more: str) -> list[str]:
    import sys

    return [
        sys.executable,
        str(ROOT / "main.py"),
        f"--config={ROOT / 'configs' / 'eval' / f'{protocol}.py'}",
        f"--config.model={model}",
        f"--config.data.root={root}",
        f"--workdir={workdir}",
        "--config.data.resize=32",
        "--config.data.crop=28",
        "--config.batch=16",
        *more,
    ]


def free_port() -> int:
    """A port whose neighbor is free as well."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
