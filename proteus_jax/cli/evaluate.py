"""Measures a model, and writes WORKDIR/results.json (docs/evaluation.md).

    proteus evaluate --config=eval/knn --config.model=MODEL --config.data.root=DIR
        --workdir=runs/knn [--config.FIELD=VALUE ...]

--config is a file, or the name of one of this package's configurations. --prepare finds and fetches
what is needed, and measures nothing; --offline fetches nothing. On several hosts: as in training.

Exit codes: 0 done; 2 the input was wrong, and nothing was written; 75 interrupted.
"""

import json

from proteus_jax.cli.arguments import Arguments
from proteus_jax.cli.hosts import all_hosts
from proteus_jax.errors import InputError, fitting
from proteus_jax.evaluation import runner
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.workdir import opened_workdir

LESS = "less takes a smaller --config.batch or --config.data.crop"


def run(configuration: EvalConfig, read: Arguments, problems: list[str], console: Console) -> int:
    """Measures, or prepares for it; returns the exit code."""
    wrong = sorted(read.flags - {"--offline", "--prepare"})
    if wrong:
        raise InputError([*problems, f"{wrong[0]}: only for a run that trains"])
    if "--prepare" in read.flags:
        runner.prepare(configuration, problems)
        console.line("ready: images and models are here")
        return 0
    workdir = read.paths.get("--workdir") or "."
    common = {"configuration": json.dumps(configuration.as_json)}
    with all_hosts(read, problems, console, common):
        inputs = runner.open_inputs(configuration, workdir, problems)
        with opened_workdir(workdir) as folder, fitting(LESS):
            return runner.run(configuration, inputs, folder, console)
