"""Distil a teacher into a student, or say what a model is worth.

    python main.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.FIELD=VALUE]
    python main.py --config=configs/quickstart.py --workdir=runs/mine --doctor [--config....]
    python main.py --config=configs/vitb14.py --plan [--topology=v5e:4x4] [--price=1.2] \
        [--mfu=0.4] [--hlo=step.hlo]

The second looks at all images, says what is wrong, and writes WORKDIR/doctor.json (or --output):
training can take that file in place of the folder.

The third says what a run will need and cost: parameters, FLOPs, memory a device, time. Nothing is
run, and no data, weights or workdir are needed. --topology names machines that are not here (TPUs
v4, v5e, v5p, v6e; GPUs a100, h100, h200, l4, as h100:8 or 4x8 for 4 hosts), --mfu the share of
their peak that is assumed in place of what the package knows of such a step, --price that of a
device-hour. With jax[tpu] installed the step is compiled for TPUs, and --hlo keeps the program.

    python main.py --config=configs/eval/knn.py --config.model=MODEL --config.data.root=DIR \
        --workdir=runs/knn

evaluates a model (docs/evaluation.md) and writes WORKDIR/results.json.

    python main.py --replay=WORKDIR/dump/step_N

makes a step again of which training diverged, and says what of it is not finite.

    python main.py --config=configs/vitb14.py --prepare [--config....]

fetches and converts the teacher and lists the images, and needs no accelerator: once, before the
hosts of a run begin.

    python main.py --devices [--hosts=2 --host=0 --coordinator=ADDRESS:PORT]

sums arrays over all devices of all hosts, and says how fast they hear each other.

--offline fetches nothing, neither teachers nor pictures, and says what is missing.

--profile writes a trace of a few steps to WORKDIR/profile, for TensorBoard or Perfetto.

On several hosts the same command runs on each. Under SLURM and on TPU pods they find each other;
elsewhere --hosts=N --host=I --coordinator=ADDRESS:PORT say how (ADDRESS is host 0's, which also
listens on PORT + 1). --wait=SECONDS is how long they wait for each other (600).

Exit codes: 0 done; 2 the input was wrong, and nothing was written, or memory does not suffice;
3 training diverged; 75 interrupted: the same command goes on.
"""

import json
import math
import os
import signal
import sys
import threading
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import proteus_jax
from proteus_jax.errors import (
    Diverged,
    InputError,
    Interrupted,
    exit_code,
    fitting,
    is_of_a_name,
    is_of_the_disk,
)
from proteus_jax.runtime import process
from proteus_jax.runtime.cluster_env import ALONE, ProcessInfo, detect_cluster_env
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.download import go_offline
from proteus_jax.runtime.process import REQUESTS

PATHS = ("--config", "--workdir", "--output", "--replay")
PLACE = ("--hosts", "--host", "--coordinator")
WAIT, WAIT_SECONDS, LONGEST_WAIT = "--wait", "600", 7 * 24 * 3600
# Seconds that a last line may take.
UNREAD = 2.0
FLAGS = ("--doctor", "--profile", "--plan", "--prepare", "--devices", "--offline")
PLAN = ("--topology", "--mfu", "--price", "--hlo")
LESS_IN_TRAINING = (
    "--plan says what a device needs; less takes --config.grad_accum_steps=2 or more (the same "
    "batch in parts), --config.remat=blocks, --config.fsdp over several devices, or a smaller "
    "--config.batch"
)
LESS_IN_REPLAY = "a step made again takes what it took in the run, over as many devices"
LESS_IN_EVALUATION = "less takes a smaller --config.batch or --config.data.crop"


class Arguments(NamedTuple):
    """The command line as read, and what of it was not understood."""

    paths: dict[str, str]
    place: dict[str, str]
    planning: dict[str, str]
    overrides: list[tuple[str, str | None]]
    flags: set[str]
    problems: list[str]


def parse(arguments: list[str]) -> Arguments:
    """--config, --workdir and the others, and --config.FIELD, each as `--name=value` or
    `--name value`; and flags.
    """
    read = Arguments({}, {}, {}, [], set(), [])
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name in FLAGS and not equals:
            read.flags.add(name)
            continue
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        if name.startswith("--config."):
            read.overrides.append((name.removeprefix("--config."), value if equals else None))
        elif name in PATHS:
            read.paths[name] = value
        elif name in PLAN:
            read.planning[name] = value
        elif name in PLACE or name == WAIT:
            read.place[name] = value
        else:
            read.problems.append(f"{name}: unknown argument")
    needed = {"--config", "--workdir"}
    if "--replay" in read.paths or "--devices" in read.flags:
        needed = set()
    elif "--doctor" in read.flags:
        # Its file lies in the workdir, where nothing else is said.
        needed = {"--config"} if read.paths.get("--output") else needed
    elif {"--plan", "--prepare"} & read.flags:
        needed = {"--config"}
    elif "--output" in read.paths:
        read.problems.append("--output: only --doctor writes there")
    if "--plan" not in read.flags:
        read.problems.extend(f"{name}: only --plan asks for it" for name in read.planning)
    # What a launch file prepares with is the run's own command line.
    beside = {"--offline", "--profile"} if "--prepare" in read.flags else {"--offline"}
    flags = [name for name in FLAGS if name in read.flags and name not in beside]
    if len(flags) > 1:
        names = " and ".join(flags)
        read.problems.append(f"{names}: expected one of them")
    read.problems.extend(
        f"{name}: expected a path"
        for name in PATHS
        if not read.paths.get(name) and name in needed | read.paths.keys()
    )
    return read


def distil(arguments: list[str], console: Console) -> int:
    """Checks everything, then trains, or with --doctor looks at the images; returns the exit
    code.
    """
    read = parse(arguments)
    if "--offline" in read.flags:
        # Before any library reads it.
        go_offline()
    if "--replay" in read.paths:
        return _replay(read, console)
    if "--devices" in read.flags:
        return _check_devices(read, console)
    if "--prepare" in read.flags:
        # A host of many has none of its devices to itself.
        os.environ["JAX_PLATFORMS"] = "cpu"
    if not read.paths.get("--config"):
        raise InputError(read.problems)
    from proteus_jax import config
    from proteus_jax.cli import doctor
    from proteus_jax.evaluation import runner as evaluation
    from proteus_jax.evaluation.config import EvalConfig
    from proteus_jax.runtime import distributed
    from proteus_jax.runtime.workdir import is_remote, opened_workdir
    from proteus_jax.training import trainer
    from proteus_jax.training.inputs import open_inputs, prepare
    from proteus_jax.training.schema import schema_of

    overrides = [config.Override(*override) for override in read.overrides]
    configuration, problems = config.load(read.paths["--config"], overrides, schema_of)
    workdir = read.paths.get("--workdir") or "."
    evaluates = isinstance(configuration, EvalConfig)
    if "--doctor" in read.flags and not evaluates:
        output = read.paths.get("--output") or f"{workdir}/{doctor.MANIFEST}"
        if is_remote(output):
            problems.append(f"--doctor writes to this machine: expected a path, found {output}")
        output = Path(output).expanduser()
        doctor.run_doctor(configuration, output, [*read.problems, *problems], console)
        return 0
    known = [*read.problems, *problems]
    wrong = sorted(read.flags - {"--offline", "--prepare"})
    if evaluates and wrong:
        raise InputError([*known, f"{wrong[0]}: only for a run that trains"])
    if "--plan" in read.flags:
        _plan(configuration, read.planning, known, console)
        return 0
    if "--prepare" in read.flags:
        if evaluates:
            evaluation.prepare(configuration, known)
        else:
            prepare(configuration, known)
        console.line("ready: images and models are here")
        return 0
    place, seconds = _process_info(read.place, known)
    about = _versions() | {"configuration": json.dumps(configuration.as_json)}
    with distributed.initialize_distributed(
        place, about, timeout=seconds, progress=console.progress, say=console.error
    ) as group:
        if isinstance(configuration, EvalConfig):
            evaluation_inputs = evaluation.open_inputs(configuration, workdir, known)
            with opened_workdir(workdir) as folder, fitting(LESS_IN_EVALUATION):
                return evaluation.run(configuration, evaluation_inputs, folder, console)
        inputs = open_inputs(configuration, workdir, known)
        profile = "--profile" in read.flags
        with opened_workdir(workdir) as folder, fitting(LESS_IN_TRAINING):
            return trainer.run(configuration, inputs, folder, console, group, profile=profile)


def _versions() -> dict[str, str]:
    """The versions that all hosts must have in common."""
    installed = {f"version of {name}": version(name) for name in ("jax", "jaxlib", "flax")}
    return {"version": proteus_jax.__version__} | installed


def _check_devices(read: Arguments, console: Console) -> int:
    """Has all hosts meet, and all devices hear each other."""
    from proteus_jax.runtime import device_check, distributed

    others = [*read.paths, *read.planning, *(read.flags - {"--devices", "--offline"})]
    others += [f"--config.{field}" for field, _ in read.overrides]
    known = [*read.problems, *(f"{name}: not with --devices" for name in others)]
    place, seconds = _process_info(read.place, known)
    if known:
        raise InputError(known)
    with distributed.initialize_distributed(
        place, _versions(), timeout=seconds, progress=console.progress, say=console.error
    ):
        console.quiet = place.host > 0
        device_check.check_devices(console.line, console.error)
    return 0


def _replay(read: Arguments, console: Console) -> int:
    """Makes a step again; nothing else is to be said with it. Diverged where it did."""
    from proteus_jax.training import nan_replay

    others = [*read.paths, *read.place, *read.planning, *read.flags]
    others += [f"--config.{field}" for field, _ in read.overrides]
    known = [f"{name}: not with --replay" for name in others if name != "--replay"]
    if read.problems or known:
        raise InputError([*read.problems, *known])
    with fitting(LESS_IN_REPLAY):
        nan_replay.replay(read.paths["--replay"], console)
    return 0


def _plan(configuration: Any, words: dict[str, str], known: list[str], console: Console) -> None:
    """Prints the plan, line by line as it is found."""
    from proteus_jax.training.planning import plan

    numbers: dict[str, float] = {}
    for name, expected in (("--mfu", "above 0 and at most 1"), ("--price", "0 or more")):
        if name in words:
            try:
                numbers[name] = float(words[name])
                fits = 0 < numbers[name] <= 1 if name == "--mfu" else 0 <= numbers[name] < math.inf
            except ValueError:
                fits = False
            if not fits:
                known.append(f"{name}: expected a number {expected}, found {words[name]!r}")
    hlo = words.get("--hlo")
    if hlo is not None and (not hlo or Path(hlo).expanduser().is_dir()):
        known.append(f"--hlo: expected a file to write, found {hlo!r}")
    if known:
        raise InputError(known)
    settings = plan.Settings(
        words.get("--topology", ""),
        numbers.get("--mfu"),
        numbers.get("--price"),
        None if hlo is None else Path(hlo).expanduser(),
    )
    for line in plan.plan(configuration, settings):
        console.line(line)


def _process_info(flags: dict[str, str], known: list[str]) -> tuple[ProcessInfo, float]:
    """This host's place and how long it waits for the others; what is wrong goes to `known`.

    InputError at once on one of several hosts, where something is wrong already: nobody waits.
    """
    place, seconds = ALONE, flags.pop(WAIT, WAIT_SECONDS)
    try:
        place = detect_cluster_env(flags)
    except InputError as error:
        known += error.problems
    if not seconds.isdecimal() or not 0 < int(seconds) <= LONGEST_WAIT:
        known.append(f"{WAIT}: expected seconds from 1 to {LONGEST_WAIT}, found {seconds!r}")
        seconds = WAIT_SECONDS
    if known and place.hosts > 1:
        raise InputError(known)
    return place, float(seconds)


def _notes(error: Exception) -> list[str]:
    return getattr(error, "__notes__", [])


def _end_at_a_signal(console: Console) -> None:
    """A request to stop ends this process at once: until it trains, which is when requests wait for
    the step, nothing is lost. An exception in place of that may end in some library's callback.

    A thread hears of them: the main one may be listing a store or compiling, in C++, where Python's
    handlers wait.
    """
    numbers = [number for number in REQUESTS if signal.getsignal(number) != signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while os.read(reader, 1)[0] not in numbers:
            pass
        # Where nobody reads what is said, it ends all the same.
        threading.Timer(UNREAD, os._exit, [Interrupted.EXIT_CODE]).start()
        try:
            console.error("interrupted; the same command goes on")
        finally:
            os._exit(Interrupted.EXIT_CODE)

    for number in numbers:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True, name="requests to end").start()


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("proteus_jax", "configs")


def main() -> int:
    """Runs the command line; returns the exit code."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    process.begin()
    console = Console(watched=True)
    _end_at_a_signal(console)
    try:
        code = distil(sys.argv[1:], console)
        console.dismiss_watcher()
        return code
    except InputError as error:
        count = len(error.problems)
        console.error(f"{count} problem{'' if count == 1 else 's'} with the input:")
        for problem in [*error.problems, *_notes(error)]:
            console.error(f"  {problem}")
        return exit_code(error)
    except (Diverged, Interrupted) as error:
        console.error("\n".join([str(error), *_notes(error)]))
        return exit_code(error)
    except Exception as error:
        if is_of_the_disk(error):
            message = f"{error}; the same command goes on once there is room to write"
            console.error("\n".join([message, *_notes(error)]))
        elif isinstance(error, OSError) and is_of_a_name(error):
            console.log(traceback.format_exc())
            console.error(f"1 problem with the input:\n  {error.filename}: {error.strerror}")
        elif isinstance(error, ModuleNotFoundError) and not _is_ours(error.name or ""):
            console.error(
                f"{sys.executable} has no {error.name}: expected what requirements.txt names; "
                "`make .venv/run.stamp` installs it for .venv/bin/python"
            )
            return InputError.EXIT_CODE
        else:
            console.error(traceback.format_exc())
        return exit_code(error)


def end(code: int) -> None:
    """Ends this process; at once after a failure on one of several hosts."""
    if code and "jax" in sys.modules:
        from proteus_jax.runtime import distributed

        distributed.end_at_once_if_several(code)
    sys.exit(code)


if __name__ == "__main__":
    end(main())
