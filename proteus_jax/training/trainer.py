"""The loop: build, restore, iterate, evaluate, save, log.

The order inside an iteration is a contract: a step, its row of metrics, then what is due of
evaluation and checkpoint. A checkpoint of step k holds all that came of the first k steps, and its
rows are on the disk before it is.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import jax

from proteus_jax.checkpoint.checkpointer import Checkpoints
from proteus_jax.checkpoint.store import RetentionPolicy
from proteus_jax.data.datasets.labeled import images_on_both_sides
from proteus_jax.data.loader import Batch, training_batches
from proteus_jax.data.workers import Makers, WorkerLost, makers
from proteus_jax.engine.checkpointing import CheckpointManager
from proteus_jax.engine.metrics_logger import MetricsLogger
from proteus_jax.engine.monitors import (
    CorruptImageMonitor,
    InputBoundWarning,
    NonFiniteMonitor,
    StepTimer,
)
from proteus_jax.errors import Diverged, InputError, Interrupted
from proteus_jax.evaluation.per_class import uneven
from proteus_jax.runtime import collectives, sharding
from proteus_jax.runtime.cluster_env import unseen_gpus
from proteus_jax.runtime.compilation_cache import FOLDER as COMPILED
from proteus_jax.runtime.compilation_cache import keep_compiled_programs
from proteus_jax.runtime.console import Console, waiting
from proteus_jax.runtime.filesystem import write_atomically
from proteus_jax.runtime.heartbeat import Heartbeat
from proteus_jax.runtime.metric_writer import (
    MetricsWriter,
    NoMetrics,
    parameter_table,
    read_metrics,
)
from proteus_jax.runtime.preemption import PreemptionHandler
from proteus_jax.runtime.profiler import Profiler
from proteus_jax.runtime.rendezvous import ProcessGroup
from proteus_jax.runtime.workdir import STUDENTS, Workdir
from proteus_jax.training import nan_replay
from proteus_jax.training.config import TrainConfig
from proteus_jax.training.evaluator import Evaluator
from proteus_jax.training.export import export_students
from proteus_jax.training.inputs import Inputs
from proteus_jax.training.resume import compare_facts
from proteus_jax.training.setup import Experiment, build
from proteus_jax.training.summary import print_header, print_summary
from proteus_jax.training.train_state import TrainState, from_items, to_items

DONE = 0


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
    with contextlib.nullcontext() if jax.process_index() else place.locked(console.line):
        return _run_alone(config, inputs, place, console, group, profile)


def _run_alone(
    config: TrainConfig,
    inputs: Inputs,
    place: Workdir,
    console: Console,
    group: ProcessGroup | None,
    profile: bool,
) -> int:
    experiment, workdir = build(config, inputs), place.local
    workdir.mkdir(parents=True, exist_ok=True)
    host = jax.process_index()
    console.quiet = host > 0
    with contextlib.ExitStack() as stack:
        run = _Run(experiment, place, console)
        stack.callback(run.saving.checkpoints.close)
        resumed, remarks = _resumed(run.saving.checkpoints, experiment, workdir)
        unseen = unseen_gpus(jax.default_backend())
        remarks += filter(None, [unseen, run.makers.remark, *experiment.remarks])
        if experiment.labelled is not None:
            pair = experiment.labelled
            remarks += filter(None, [uneven(pair.test.labels), images_on_both_sides(pair)])
        logged = [row["step"] for row in read_metrics(workdir)]
        if resumed is None and any(logged):
            remarks.append("nothing was saved here before: the run begins anew")
        if resumed and host == 0 and not logged:
            remarks.append(f"metrics.jsonl has lost its rows of the steps until {resumed}")
        console.keep_log(workdir / (f"log.{host}.txt" if host else "log.txt"))
        if host == 0:
            text = json.dumps(config.as_json, indent=2) + "\n"
            write_atomically(workdir / "config.json", text)
        print_header(experiment, place.named(workdir), resumed, remarks, console)
        stop = PreemptionHandler(
            config.preemption_timeout_s, console.error, lambda: run.heartbeat.close("stopped")
        )
        run.stop = stack.enter_context(stop)
        run.profiling = Profiler(workdir / "profile", on=profile and host == 0)
        with run.watched(group):
            run.code = run.to_the_end(resumed)
        return run.code


def _resumed(
    checkpoints: Checkpoints, experiment: Experiment, workdir: Path
) -> tuple[int | None, list[str]]:
    """The step to go on from, and what there is to say of it: checkpoints that are damaged, and
    what differs from the run until now. InputError where that must not differ.
    """
    remarks = []
    if jax.process_index() == 0:
        try:
            newest = checkpoints.shelf.newest()
            left = [name for name in STUDENTS if (workdir / name).exists()]
            if newest.step is None and left:
                raise InputError(f"{workdir} has {left[0]}/, but no checkpoint: of another run")
        except InputError as error:
            raise InputError(
                f"{error}. Restore its checkpoints/ from a copy, give another workdir, or remove "
                "this one to begin anew"
            ) from None
        step = -1 if newest.step is None else newest.step
        instead = "there is none before it" if newest.step is None else f"step {step} is whole"
        remarks += [
            f"the checkpoint of step {number} is not whole: {reason}; {instead}"
            for number, reason in newest.faults.items()
        ]
        remarks += [
            f"{name}, which a save left unfinished, is removed" for name in newest.unfinished
        ]
    else:
        newest, step = None, -1
    step = collectives.broadcast_from_rank0(step)
    if step >= 0:
        different = compare_facts(checkpoints.facts(step), experiment.facts)
        if different.refused:
            where = f"--workdir holds another run, at step {step}"
            error = InputError([f"{where}: {line} (refused)" for line in different.refused])
            for line in different.allowed:
                error.add_note(f"{line} (this may differ)")
            raise error
        remarks += different.allowed
    if newest is not None:
        checkpoints.shelf.quarantine_and_clean(newest)
    return (None if step < 0 else step), remarks


class _Run:
    """One run of the loop and its accounts."""

    stop: PreemptionHandler
    profiling: Profiler
    heartbeat: Heartbeat
    rows: MetricsLogger

    def __init__(self, experiment: Experiment, place: Workdir, console: Console):
        self.experiment, self.config = experiment, experiment.config
        self.place, self.workdir, self.console = place, place.local, console
        self.leads = jax.process_index() == 0
        self.failure: InputError | Interrupted | None = None
        # With which the process is to end.
        self.code = DONE
        config, data = self.config, self.config.data
        keep = RetentionPolicy(config.keep_checkpoints, config.keep_every)
        self.saving = CheckpointManager(place, console, keep, config.max_failed_saves)
        name = experiment.split.training.name
        self.unreadable = CorruptImageMonitor(
            name, limit=data.max_corrupt_fraction, repeats=data.repeated_aug, say=console.line
        )
        self.skipped = NonFiniteMonitor(name, limit=config.max_skipped, say=console.line)
        self.makers = makers(data.workers, data.threads, data.crop)
        self.examination = Evaluator(experiment, self.workdir, console)

    @contextlib.contextmanager
    def watched(self, group: ProcessGroup | None) -> Iterator[None]:
        """A heartbeat as long as the block lasts."""
        known = {} if group is None else {"steps": group.steps}
        self.heartbeat = Heartbeat(
            self.workdir,
            self.experiment.total_steps,
            host=jax.process_index(),
            say=self.console.line,
            log=self.console.log,
            stopping=lambda: self.stop.made,
            publish=self.place.publish if self.place.remote else None,
            **known,
        )
        self.saving.heartbeat = self.heartbeat
        state = "failed"
        try:
            yield
            state = "done" if self.code == DONE else "stopped"
        except Interrupted:
            state = "stopped"
            raise
        finally:
            self.heartbeat.close(state)

    def to_the_end(self, resumed: int | None) -> int:
        """Restores or begins, trains, exports, and says what was learnt."""
        experiment, total = self.experiment, self.experiment.total_steps
        self.refuse_hosts_that_differ(resumed)
        if resumed is None:
            state, step = experiment.init(), 0
            self.console.log(parameter_table(state.params))
        else:
            self.saving.resumed(resumed)
            shapes, places = experiment.state_shapes, experiment.state_shardings
            state = from_items(
                self.saving.checkpoints.restore(resumed, to_items(shapes), to_items(places))
            )
            step = resumed
        trains = step < total
        writer = MetricsWriter(self.workdir, resumed) if self.leads else NoMetrics()
        self.rows = MetricsLogger(
            writer,
            self.console,
            students=tuple(experiment.students),
            total_steps=total,
            work=experiment.work,
            peak=experiment.peak,
        )
        with contextlib.closing(self.rows):
            if resumed is None:
                self.rows.measure(step, self.examination.measure(step, state))
                self.examination.report()
            if trains:
                state, step = self.train(state, step)
        with self.heartbeat.paused():
            return self.end(state, step, trains)

    def end(self, state: TrainState, step: int, trained: bool) -> int:
        """Waits for the last checkpoint; exports where the run is at its end."""
        experiment, total = self.experiment, self.experiment.total_steps
        self.saving.checkpoints.wait()
        saved, goes_on = self.saving.newest, self.saving.resume_point()
        if isinstance(self.failure, Interrupted) and not (step == total == saved):
            raise Interrupted(f"{self.failure}; the same command goes on from {goes_on}")
        if isinstance(self.failure, InputError):
            raise self.failure
        if step < total:
            self.console.line(
                f"interrupted at step {step} of {total}; the same command goes on from "
                + ("here" if saved == step else goes_on)
            )
            return Interrupted.EXIT_CODE
        if self.unreadable.met:
            self.console.line(
                f"{len(self.unreadable.met)} images could not be read; others took their place"
            )
        if saved != step and self.leads:
            # Nor is a student written: where one lies there is a checkpoint that it is of.
            raise Interrupted(
                "the run is at its end, but not its checkpoint: the same command goes on from "
                f"{goes_on}"
            )
        directories = export_students(experiment, state, self.workdir)
        self.examination.draw(state, again=trained)
        if self.leads:
            names = [self.place.named(directory) for directory in directories]
            print_summary(experiment, self.workdir, names, self.console)
        return DONE

    def refuse_hosts_that_differ(self, resumed: int | None) -> None:
        """InputError on all hosts where one sees other images, another teacher or another workdir:
        they would wait for each other for ever, or train on something else.
        """
        views = b"" if self.examination.views is None else self.examination.views.tobytes()
        seen = {
            "images or teacher": json.dumps([self.experiment.facts, self.experiment.total_steps]),
            "checkpoint in the workdir": str(
                resumed is None or resumed in self.saving.checkpoints.shelf.steps()
            ),
            "held-out images that can be read": hashlib.sha256(views).hexdigest(),
        }
        different = [what for what, text in seen.items() if not collectives.same_on_all_hosts(text)]
        if different:
            raise InputError([f"the hosts do not see the same {what}" for what in different])

    def train(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Steps until the end or a request to stop; the last one is saved."""
        experiment, config, total = self.experiment, self.config, self.experiment.total_steps
        self.console.progress(f"step {step}/{total}: compiling")
        self.rows.begin(step)
        began_at, clock = step, StepTimer()
        first = step + 2 * max(config.log_every, 5)
        self.notice = InputBoundWarning(str(self.makers), first, self.console.line)
        stopping, agreement = False, collectives.AnyProcess(experiment.mesh)
        with (
            contextlib.closing(self.profiling),
            contextlib.closing(self.batches(step)) as batches,
            jax.transfer_guard("disallow"),
            self.dumping(lambda: state),
        ):
            while step < total and not stopping:
                with clock.waiting():
                    batch = next(batches)
                try:
                    self.unreadable.note(batch.unreadable)
                except InputError as error:
                    # As a request to stop: all hosts save the same step, then this one says why.
                    self.failure = error
                images = sharding.place_batch(batch.images, experiment.mesh)
                first_one = step == began_at
                with (
                    waiting(f"step {step}/{total}: compiling", self.console.progress)
                    if first_one
                    else contextlib.nullcontext()
                ):
                    state, values = experiment.train_step(state, experiment.teacher_params, images)
                step += 1
                self.stop.waits = True
                self.heartbeat.step(step)
                self.skipped.note(step, values, batch)
                with self.heartbeat.paused():
                    self.profiling.after(step - began_at, values)
                self.failure = self.failure or self.saving.reason_to_stop()
                if self.failure is not None:
                    self.stop.made = True
                stopping = agreement.any(self.stop.made)
                evaluating = step % config.eval_every == 0 or step == total
                if evaluating or step % config.log_every == 0:
                    # First the row before this one: its numbers are ready, and the device is
                    # already busy with this step.
                    self.write_row()
                    measured = self.rows.rates(clock.lap(step, config.batch))
                    if evaluating:
                        with (
                            clock.paused(),
                            self.heartbeat.paused(),
                            jax.transfer_guard("allow"),
                        ):
                            measured |= self.examination.measure(step, state)
                    self.rows.hold(step, values, measured, evaluated=evaluating)
                if stopping or step == total or step % config.checkpoint_every == 0:
                    self.save(step, state)
        if self.profiling.missed:
            self.console.line(
                f"--profile: no trace, as the run ended before step {Profiler.FIRST + 1} from here"
            )
        return state, step

    def save(self, step: int, state: TrainState) -> None:
        """A checkpoint, with all that is due before it."""
        self.write_row()
        self.skipped.flush()
        with self.heartbeat.paused(), jax.transfer_guard("allow"):
            self.saving.save(step, to_items(state), self.experiment.facts, self.rows_written)

    def rows_written(self) -> OSError | None:
        """Why the rows until now are not where a resumed run would look for them; on host 0."""
        try:
            self.rows.sync()
        except OSError as error:
            return error
        reason = self.place.upload()
        return None if reason is None else OSError(f"not uploaded: {reason}")

    @contextlib.contextmanager
    def dumping(self, state: Callable[[], TrainState]) -> Iterator[None]:
        """A step of which training diverged in the block is kept, to be made again."""
        try:
            yield
        except Diverged as error:
            last = self.skipped.last
            if last is None:
                raise
            moment = nan_replay.StepSnapshot(
                last.step,
                last.batch.images,
                last.batch.numbers,
                {key: float(value) for key, value in jax.device_get(dict(last.metrics)).items()},
            )
            folder = self.workdir / nan_replay.FOLDER / f"step_{last.step}"
            self.saving.checkpoints.wait()
            try:
                with jax.transfer_guard("allow"), self.heartbeat.paused():
                    nan_replay.write_dump(
                        self.experiment, moment, state(), folder, self.place.address_of(folder)
                    )
            except Exception as failure:
                # Whatever a store may say: that the run diverged is what it ends with.
                error.add_note(f"its batch and state could not be kept: {failure}")
            else:
                error.add_note(
                    "its batch and the state before it are kept: python main.py --replay "
                    f"{self.place.named(folder)}"
                )
            raise

    def batches(self, step: int) -> Generator[Batch]:
        """This host's batches from a step on; to be closed, as they are made ahead.

        Where a worker process is lost threads make what it owed, and what is needed until all hosts
        have heard of it and saved the same step.
        """
        makers = self.makers
        while True:
            with contextlib.closing(self.batches_by(makers, step)) as made:
                try:
                    for batch in made:
                        step += 1
                        yield batch
                    return
                except WorkerLost as error:
                    self.failure = error
            makers = Makers(0, 2)

    def batches_by(self, makers: Makers, step: int) -> Generator[Batch]:
        """Batches as long as these workers live; WorkerLost where one does not."""
        config = self.config
        return training_batches(
            self.experiment.split.training,
            order=self.experiment.order,
            recipe=self.experiment.recipe,
            batch=config.batch,
            steps=range(step, self.experiment.total_steps),
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=makers.workers,
            threads=makers.threads,
        )

    def write_row(self) -> None:
        """The one that waits, and what is told with it."""
        row = self.rows.write()
        if row is None:
            return
        if row.evaluated:
            with self.heartbeat.paused():
                self.examination.report()
        self.notice.lap(row.step, row.values["data_wait"], row.values["images_per_second"])
