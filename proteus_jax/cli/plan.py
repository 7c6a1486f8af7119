"""Says what a run needs and costs: parameters, FLOPs, memory a device, time.

    proteus plan --config=vitb14 [--topology=v5e:4x4] [--price=1.2] [--mfu=0.4] [--hlo=step.hlo] \
        [--config.FIELD=VALUE ...]

Nothing is run, and no data, weights or workdir are needed. --topology names machines that are not
here (TPUs v4, v5e, v5p, v6e; GPUs a100, h100, h200, l4, as h100:8 or 4x8 for 4 hosts), --mfu the
share of their peak that is assumed in place of what the package knows of such a step, --price that
of a device-hour. With jax[tpu] installed the step is compiled for TPUs, and --hlo keeps the
program.

Exit codes: 0 done; 2 the input was wrong.
"""

import math
from pathlib import Path

from proteus_jax.cli.arguments import Arguments
from proteus_jax.errors import InputError
from proteus_jax.runtime.console import Console
from proteus_jax.training.config import TrainConfig
from proteus_jax.training.planning import plan


def run(configuration: TrainConfig, read: Arguments, problems: list[str], console: Console) -> int:
    """Prints the plan, line by line as it is made; returns the exit code."""
    settings = _settings(read.planning, problems)
    if problems:
        raise InputError(problems)
    for line in plan.plan(configuration, settings):
        console.line(line)
    return 0


def _settings(given: dict[str, str], problems: list[str]) -> plan.Settings:
    """Reads the settings; what is wrong is added to `problems`."""
    numbers: dict[str, float] = {}
    for name, expected in (("--mfu", "above 0 and at most 1"), ("--price", "0 or more")):
        if name not in given:
            continue
        try:
            numbers[name] = float(given[name])
            fits = 0 < numbers[name] <= 1 if name == "--mfu" else 0 <= numbers[name] < math.inf
        except ValueError:
            fits = False
        if not fits:
            problems.append(f"{name}: expected a number {expected}, found {given[name]!r}")
    hlo = given.get("--hlo")
    if hlo is not None and (not hlo or Path(hlo).expanduser().is_dir()):
        problems.append(f"--hlo: expected a file to write, found {hlo!r}")
    return plan.Settings(
        given.get("--topology", ""),
        numbers.get("--mfu"),
        numbers.get("--price"),
        None if hlo is None else Path(hlo).expanduser(),
    )
