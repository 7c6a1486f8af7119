"""Distills a teacher into a student, or resumes a run.

    proteus train --config=quickstart --workdir=runs/quickstart [--config.FIELD=VALUE ...]
    proteus train --config=vitb14 --prepare [--config.FIELD=VALUE ...]
    proteus train --replay=WORKDIR/dump/step_N

--config is a file, or the name of one of this package's configurations; with --help it shows that
file's values. --workdir is the folder of the run: metrics, checkpoints, the student; the same
command resumes what lies there. --prepare fetches and converts the teacher and lists the images,
and needs no accelerator: run it once before starting the hosts. --replay makes the step again at
which training diverged, and reports which values are not finite. --profile writes a trace of a few
steps to WORKDIR/profile, for TensorBoard or Perfetto. --offline fetches nothing, neither teachers
nor pictures, and says what is missing.

On several hosts the same command runs on each. Under SLURM and on TPU pods they find each other;
elsewhere --hosts=N --host=I --coordinator=ADDRESS:PORT say how (ADDRESS is host 0's, which also
listens on PORT + 1). --wait=SECONDS is how long they wait for each other (600).

Exit codes: 0 done; 2 the input was wrong, and nothing was written, or the run does not fit in
memory; 3 training diverged; 75 interrupted: run the same command to resume.
"""

import json

from proteus_jax.cli.arguments import Arguments
from proteus_jax.cli.hosts import all_hosts
from proteus_jax.errors import fitting
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.workdir import opened_workdir
from proteus_jax.training import runner
from proteus_jax.training.config import TrainConfig
from proteus_jax.training.inputs import open_inputs, prepare

LESS = (
    "--plan says what a device needs; less takes --config.grad_accum_steps=2 or more (the same "
    "batch in parts), --config.remat=blocks, --config.fsdp over several devices, or a smaller "
    "--config.batch"
)


def run(configuration: TrainConfig, read: Arguments, problems: list[str], console: Console) -> int:
    """Trains, or prepares for it; returns the exit code."""
    if "--prepare" in read.flags:
        prepare(configuration, problems)
        console.line("ready: images and models are here")
        return 0
    workdir = read.paths.get("--workdir") or "."
    common = {"configuration": json.dumps(configuration.as_json)}
    with all_hosts(read, problems, console, common) as group:
        inputs = open_inputs(configuration, workdir, problems)
        profile = "--profile" in read.flags
        with opened_workdir(workdir) as folder, fitting(LESS):
            return runner.run(configuration, inputs, folder, console, group, profile=profile)
