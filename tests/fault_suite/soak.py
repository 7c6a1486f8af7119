"""Twenty thousand steps: what the process holds, and how long a step takes, stays as it is."""

import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from fault_suite.account import Fault
from fault_suite.bench import Bench
from proteus_jax.runtime.metric_writer import read_metrics

STEPS = 20_000
# The last quarter against the second one.
MEMORY, TIME, DESCRIPTORS = 1.05, 1.5, 0


class _Sample(NamedTuple):
    step: int
    memory: int
    descriptors: int
    threads: int


def faults(bench: Bench) -> list[Fault]:
    """One long run, with checkpoints, workers, and a report now and then."""
    return [Fault(f"{STEPS} steps", lambda: _soak(bench))]


def _soak(bench: Bench) -> None:
    workdir = bench.root / "soak"
    command = bench.command(
        workdir,
        f"--config.steps={STEPS}",
        "--config.log_every=50",
        "--config.checkpoint_every=500",
        "--config.eval_every=2500",
        "--config.data.held_out.share=0.2",
        "--config.data.held_out.minimum=4",
        "--config.data.held_out.views=8",
    )
    process = bench.start(command)
    samples: list[_Sample] = []
    while process.poll() is None:
        time.sleep(2)
        sample = _sample(workdir / "heartbeat.json")
        if sample is not None and (not samples or sample.step > samples[-1].step):
            samples.append(sample)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    early = [s for s in samples if STEPS / 4 < s.step <= STEPS / 2]
    late = [s for s in samples if s.step > STEPS * 3 / 4]
    rows = [row for row in read_metrics(workdir) if row.get("images_per_second")]
    pace = [
        statistics.median(4000 / r["images_per_second"] for r in rows if low < r["step"] <= high)
        for low, high in ((STEPS / 4, STEPS / 2), (STEPS * 3 / 4, STEPS))
    ]
    memory = [statistics.median(s.memory for s in part) for part in (early, late)]
    descriptors = [max(s.descriptors for s in part) for part in (early, late)]
    threads = [max(s.threads for s in part) for part in (early, late)]
    print(
        f"soak: from the second quarter to the last one memory {memory[0] / 2**20:.0f} to "
        f"{memory[1] / 2**20:.0f} MB, descriptors {descriptors[0]} to {descriptors[1]}, threads "
        f"{threads[0]} to {threads[1]}, a step {pace[0]:.1f} to {pace[1]:.1f} ms",
        flush=True,
    )
    assert memory[1] <= MEMORY * memory[0]
    assert descriptors[1] <= descriptors[0] + DESCRIPTORS
    assert threads[1] <= threads[0]
    assert pace[1] <= TIME * pace[0]


def _sample(path: Path) -> _Sample | None:
    try:
        beat = json.loads(path.read_text())
        found = beat["step"], beat["memory_bytes"], beat["descriptors"], beat["threads"]
    except (OSError, ValueError):
        return None
    return _Sample(*found) if beat["state"] == "training" else None
