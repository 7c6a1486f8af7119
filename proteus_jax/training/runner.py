"""A run, from its inputs to its student: built, introduced, watched over, trained."""

import contextlib
import json

import jax

from proteus_jax.checkpoint.store import RetentionPolicy
from proteus_jax.data.datasets.labeled import images_on_both_sides
from proteus_jax.data.workers import WorkerPool, worker_pool
from proteus_jax.engine.checkpointing import CheckpointManager
from proteus_jax.engine.loop import StopSignal
from proteus_jax.errors import Interrupted
from proteus_jax.evaluation.per_class import uneven
from proteus_jax.runtime import collectives
from proteus_jax.runtime.cluster_env import unseen_gpus
from proteus_jax.runtime.compilation_cache import FOLDER as COMPILED
from proteus_jax.runtime.compilation_cache import keep_compiled_programs
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.filesystem import write_atomically
from proteus_jax.runtime.heartbeat import Heartbeat
from proteus_jax.runtime.metric_writer import (
    read_metrics,
)
from proteus_jax.runtime.preemption import PreemptionHandler
from proteus_jax.runtime.rendezvous import ProcessGroup
from proteus_jax.runtime.workdir import Workdir
from proteus_jax.training.config import TrainConfig
from proteus_jax.training.inputs import Inputs
from proteus_jax.training.online_evaluation import split_of
from proteus_jax.training.resume import find_resume_point
from proteus_jax.training.setup import Experiment, build_experiment
from proteus_jax.training.summary import print_header
from proteus_jax.training.trainer import DONE, Trainer


def run(
    config: TrainConfig,
    inputs: Inputs,
    place: Workdir,
    console: Console,
    group: ProcessGroup | None = None,
    *,
    profile: bool = False,
) -> int:
    """Trains, or goes on training, to the end; returns the exit code. `group` are the other
    hosts, `profile` writes a trace of a few steps.

    InputError, before anything is changed, where another run is using the workdir, or it holds one
    of other images, seed, batch or models, or one that has lost its checkpoints.
    """
    place.compare(jax.process_index(), collectives.gather_from_all_hosts)
    keep_compiled_programs(place.address_of(place.local / COMPILED))
    # The hosts of a run share a workdir: the first one holds it.
    with (
        contextlib.nullcontext() if jax.process_index() else place.locked(console.line),
        contextlib.ExitStack() as stack,
    ):
        experiment = build_experiment(config, inputs)
        place.local.mkdir(parents=True, exist_ok=True)
        console.quiet = jax.process_index() > 0
        keep = RetentionPolicy(config.keep_checkpoints, config.keep_every)
        manager = CheckpointManager(place.checkpoints, console, keep, config.max_failed_saves)
        stack.callback(manager.close)
        pool = worker_pool(config.data.workers, config.data.threads, config.data.crop)
        resumed = _print_beginning(experiment, place, console, manager, pool)
        handler = PreemptionHandler(
            config.preemption_timeout_s, console.error, lambda: heartbeat.close("stopped")
        )
        stack.enter_context(handler)
        stop = StopSignal(lambda: handler.requested)
        heartbeat = _heartbeat(experiment, place, console, group, stop)
        manager.heartbeat = heartbeat
        if resumed is not None:
            heartbeat.resumed(resumed)
        state = "failed"
        try:
            trainer = Trainer(experiment, place, console, manager, pool, heartbeat, handler, stop)
            code = trainer.run(resumed, profile=profile and not jax.process_index())
            state = "done" if code == DONE else "stopped"
            return code
        except Interrupted:
            state = "stopped"
            raise
        finally:
            heartbeat.close(state)


def _print_beginning(
    experiment: Experiment,
    place: Workdir,
    console: Console,
    manager: CheckpointManager,
    pool: WorkerPool,
) -> int | None:
    """Finds the step to go on from, and says what there is to know of the run; from here on the
    workdir is this run's.
    """
    workdir, host = place.local, jax.process_index()
    resumed, remarks = find_resume_point(manager, experiment.facts, workdir)
    remarks += filter(None, [unseen_gpus(jax.default_backend()), pool.remark, *experiment.remarks])
    pair = split_of(experiment.evaluations)
    if pair is not None:
        remarks += filter(None, [uneven(pair.test.labels), images_on_both_sides(pair)])
    logged = [row["step"] for row in read_metrics(workdir)]
    if resumed is None and any(logged):
        remarks.append("nothing was saved here before: the run begins anew")
    if resumed and host == 0 and not logged:
        remarks.append(f"metrics.jsonl has lost its rows of the steps until {resumed}")
    console.keep_log(workdir / (f"log.{host}.txt" if host else "log.txt"))
    if host == 0:
        text = json.dumps(experiment.config.as_json, indent=2) + "\n"
        write_atomically(workdir / "config.json", text)
    print_header(experiment, place.named(workdir), resumed, remarks, console)
    return resumed


def _heartbeat(
    experiment: Experiment,
    place: Workdir,
    console: Console,
    group: ProcessGroup | None,
    stop: StopSignal,
) -> Heartbeat:
    return Heartbeat(
        place.local,
        experiment.total_steps,
        host=jax.process_index(),
        say=console.line,
        log=console.log,
        stopping=lambda: stop.requested,
        publish=place.publish if place.remote else None,
        **({} if group is None else {"steps": group.steps}),
    )
