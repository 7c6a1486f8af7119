"""The loop: build, restore, iterate, evaluate, save, log.

The order inside an iteration is a contract: a step, its row of metrics, then what is due of
evaluation and checkpoint. A checkpoint of step k holds all that came of the first k steps, and its
rows are on the disk before it is.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from proteus_jax import dump, sharding
from proteus_jax.changes import changes
from proteus_jax.checkpoint import Checkpoints, Keep
from proteus_jax.compiled import keep_compiled_programs
from proteus_jax.console import Console, duration
from proteus_jax.data.pipeline import training_batches, worker_count
from proteus_jax.errors import Diverged, InputError, Interrupted
from proteus_jax.examination import Examination
from proteus_jax.experiment import Experiment, Inputs, build
from proteus_jax.heartbeat import Heartbeat
from proteus_jax.messages import conclude, introduce
from proteus_jax.metrics import MetricsWriter, NoMetrics, parameter_table
from proteus_jax.outcome import export_students
from proteus_jax.rendezvous import Company
from proteus_jax.step import TrainState
from proteus_jax.storage import write_atomically
from proteus_jax.watch import (
    Clock,
    Profiling,
    SkippedUpdates,
    StopRequest,
    UnreadableImages,
    WaitNotice,
)
from proteus_jax.workdir import Workdir

DONE = 0


def run(
    config: Any,
    inputs: Inputs,
    place: Workdir,
    console: Console,
    company: Company | None = None,
    *,
    profile: bool = False,
) -> int:
    """Trains, or goes on training, to the end; returns the exit code. `company` are the other
    hosts, `profile` writes a trace of a few steps.

    InputError, before anything is changed, where another run is using the workdir, or it holds one
    of other images, seed, batch or models, or one that has lost its checkpoints.
    """
    keep_compiled_programs()
    # The hosts of a run share a workdir: the first one holds it.
    with contextlib.nullcontext() if jax.process_index() else place.locked():
        return _run_alone(config, inputs, place, console, company, profile)


def _run_alone(
    config: Any,
    inputs: Inputs,
    place: Workdir,
    console: Console,
    company: Company | None,
    profile: bool,
) -> int:
    experiment, workdir = build(config, inputs), place.local
    workdir.mkdir(parents=True, exist_ok=True)
    host = jax.process_index()
    console.quiet = host > 0
    with contextlib.ExitStack() as stack:
        run = _Run(experiment, place, console)
        stack.callback(run.checkpoints.close)
        resumed, remarks = _resumed(run.checkpoints, experiment)
        console.keep_log(workdir / (f"log.{host}.txt" if host else "log.txt"))
        if host == 0:
            text = json.dumps(json.loads(config.to_json()), indent=2) + "\n"
            write_atomically(workdir / "config.json", text)
        introduce(experiment, place.named(workdir), resumed, remarks, console)
        run.stop = stack.enter_context(StopRequest(config.stop_within, console.error))
        run.profiling = Profiling(workdir / "profile", on=profile and host == 0)
        with run.watched(company):
            run.code = run.to_the_end(resumed)
        return run.code


def _resumed(checkpoints: Checkpoints, experiment: Experiment) -> tuple[int | None, list[str]]:
    """The step to go on from, and what there is to say of it: checkpoints that are damaged, and
    what differs from the run until now. InputError where that must not differ.
    """
    remarks = []
    if jax.process_index() == 0:
        found = checkpoints.newest()
        step = -1 if found.step is None else found.step
        instead = "there is none before it" if found.step is None else f"step {step} is whole"
        remarks += [
            f"the checkpoint of step {number} is not whole: {reason}; {instead}"
            for number, reason in found.faults.items()
        ]
    else:
        found, step = None, -1
    step = sharding.from_first_host(step)
    if step >= 0:
        different = changes(checkpoints.facts(step), experiment.facts)
        if different.refused:
            where = f"--workdir holds another run, at step {step}"
            problems = [f"{where}: {line} (refused)" for line in different.refused]
            raise InputError(problems + [f"{line} (this may differ)" for line in different.allowed])
        remarks += different.allowed
    if found is not None:
        checkpoints.make_way(found)
    return (None if step < 0 else step), remarks


class _Pending(NamedTuple):
    """A logged step whose numbers are still on the device."""

    step: int
    metrics: dict[str, jax.Array]
    measured: dict[str, float]
    evaluated: bool


class _Run:
    """One run of the loop and its accounts."""

    stop: StopRequest
    profiling: Profiling
    heartbeat: Heartbeat

    def __init__(self, experiment: Experiment, place: Workdir, console: Console):
        self.experiment, self.config = experiment, experiment.config
        self.place, self.workdir, self.console = place, place.local, console
        self.leads = jax.process_index() == 0
        self.pending: _Pending | None = None
        self.failure: InputError | Interrupted | None = None
        # The newest checkpoint that is complete on the disk.
        self.saved: int | None = None
        # With which the process is to end.
        self.code = DONE
        config, data = self.config, self.config.data
        self.checkpoints = Checkpoints(
            place.checkpoints,
            keep=Keep(config.keep_checkpoints, config.keep_every),
            saved=self.note_saved,
            failed=self.note_failed,
        )
        name = experiment.split.training.name
        self.unreadable = UnreadableImages(
            name, limit=data.unreadable, repeats=data.repeats, say=console.line
        )
        self.skipped = SkippedUpdates(name, limit=config.max_skipped, say=console.line)
        self.workers = worker_count(data.workers)
        self.examination = Examination(experiment, self.workdir, console)

    @contextlib.contextmanager
    def watched(self, company: Company | None) -> Iterator[None]:
        """A heartbeat as long as the block lasts."""
        known = {} if company is None else {"steps": company.steps}
        self.heartbeat = Heartbeat(
            self.workdir,
            self.experiment.total_steps,
            host=jax.process_index(),
            say=self.console.line,
            log=self.console.log,
            **known,
        )
        state = "failed"
        try:
            yield
            state = "done" if self.code == DONE else "stopped"
        except Interrupted:
            state = "stopped"
            raise
        finally:
            self.heartbeat.close(state)

    def note_saved(self, step: int, seconds: float) -> None:
        """A checkpoint is complete on the disk."""
        self.saved = step
        self.heartbeat.saved(step)
        self.console.log(f"step {step} is saved, in {seconds:.1f} s")

    def note_failed(self, step: int, reason: str) -> None:
        """A checkpoint is not to be had."""
        before = (
            "there is none yet" if self.saved is None else f"the newest is of step {self.saved}"
        )
        self.console.line(f"the checkpoint of step {step} could not be saved: {reason}; {before}")

    def to_the_end(self, resumed: int | None) -> int:
        """Restores or begins, trains, exports, and says what was learnt."""
        experiment, total = self.experiment, self.experiment.total_steps
        self.saved = resumed
        self.refuse_hosts_that_differ(resumed)
        if resumed is None:
            state, step = experiment.init(), 0
            self.console.log(parameter_table(state.params))
        else:
            state = self.checkpoints.restore(
                resumed, experiment.state_shapes, experiment.state_shardings
            )
            step = resumed
            self.heartbeat.saved(step)
        trains = step < total
        self.metrics = MetricsWriter(self.workdir, resumed) if self.leads else NoMetrics()
        with contextlib.closing(self.metrics):
            if resumed is None:
                self.metrics.write(0, self.renamed(self.examination.measure(0, state)))
                self.examination.report()
            if trains:
                state, step = self.train(state, step)
        with self.heartbeat.standing():
            return self.end(state, step, trains)

    def end(self, state: TrainState, step: int, trained: bool) -> int:
        """Waits for the last checkpoint; exports where the run is at its end."""
        experiment, total = self.experiment, self.experiment.total_steps
        self.checkpoints.wait()
        if isinstance(self.failure, Interrupted) and not (step == total == self.saved):
            raise Interrupted(
                f"{self.failure}; the same command goes on from {self.where_it_goes_on()}, once "
                "there is room to write"
            )
        if isinstance(self.failure, InputError):
            raise self.failure
        if step < total:
            self.console.line(
                f"interrupted at step {step} of {total}; the same command goes on from "
                + ("here" if self.saved == step else self.where_it_goes_on())
            )
            return Interrupted.EXIT_CODE
        if self.unreadable.met:
            self.console.line(
                f"{len(self.unreadable.met)} images could not be read; others took their place"
            )
        directories = export_students(experiment, state, self.workdir)
        self.examination.draw(state, anew=trained)
        if self.leads:
            names = [self.place.named(directory) for directory in directories]
            conclude(experiment, self.workdir, names, self.console)
        if self.saved != step and self.leads:
            raise Interrupted(
                f"the run is at its end, but not its checkpoint: the same command goes on from "
                f"{self.where_it_goes_on()}"
            )
        return DONE

    def where_it_goes_on(self) -> str:
        """In words."""
        return "its beginning" if self.saved is None else f"step {self.saved}"

    def refuse_hosts_that_differ(self, resumed: int | None) -> None:
        """InputError on all hosts where one sees other images, another teacher or another workdir:
        they would wait for each other for ever, or train on something else.
        """
        views = b"" if self.examination.views is None else self.examination.views.tobytes()
        seen = {
            "images or teacher": json.dumps([self.experiment.facts, self.experiment.total_steps]),
            "checkpoint in the workdir": str(
                resumed is None or resumed in self.checkpoints.steps()
            ),
            "held-out images that can be read": hashlib.sha256(views).hexdigest(),
        }
        different = [what for what, text in seen.items() if not sharding.same_everywhere(text)]
        if different:
            raise InputError([f"the hosts do not see the same {what}" for what in different])

    def train(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Steps until the end or a request to stop; the last one is saved."""
        experiment, config, total = self.experiment, self.config, self.experiment.total_steps
        self.console.progress(f"step {step}/{total}: compiling")
        self.began, self.began_at = time.monotonic(), step
        clock = Clock()
        makers = f"{self.config.data.threads} threads"
        if self.workers:
            makers = f"{self.workers} worker processes"
        first = step + 2 * max(config.log_every, 5)
        self.notice = WaitNotice(makers, first, self.console.line)
        stopping, agreement = False, sharding.Agreement(experiment.mesh)
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
                    self.failure, self.stop.made = error, True
                images = sharding.place_batch(batch.images, experiment.mesh)
                state, values = experiment.train_step(state, experiment.teacher_params, images)
                step += 1
                self.heartbeat.step(step)
                self.skipped.note(step, values, batch)
                with self.heartbeat.standing():
                    self.profiling.after(step - self.began_at, values)
                if self.too_many_failed_saves():
                    self.stop.made = True
                stopping = agreement.any(self.stop.made)
                evaluating = step % config.eval_every == 0 or step == total
                if evaluating or step % config.log_every == 0:
                    # First the row before this one: its numbers are ready, and the device is
                    # already busy with this step.
                    self.write_pending()
                    measured = self.rates(clock.lap(step, config.batch))
                    if evaluating:
                        with (
                            clock.standing(),
                            self.heartbeat.standing(),
                            jax.transfer_guard("allow"),
                        ):
                            found = self.examination.measure(step, state)
                            measured |= self.renamed(found)
                    self.pending = _Pending(step, values, measured, evaluating)
                if stopping or step == total or step % config.checkpoint_every == 0:
                    self.save(step, state)
        if self.profiling.missed:
            self.console.line(
                f"--profile: no trace, as the run ended before step {Profiling.FIRST + 1} from here"
            )
        return state, step

    def rates(self, measured: dict[str, float]) -> dict[str, float]:
        """With the images a second of each device and, where the devices' peak is known, the share
        of it that the work needed.
        """
        rate = measured["images_per_second"]
        measured["images_per_second_per_device"] = rate / jax.device_count()
        if self.experiment.peak is not None:
            measured["mfu"] = rate * self.experiment.work / self.experiment.peak
        return measured

    def save(self, step: int, state: TrainState) -> None:
        """A checkpoint, once the rows before it are on the disk. Where too many fail the run
        stops.
        """
        self.write_pending()
        self.skipped.settle()
        with self.heartbeat.standing(), jax.transfer_guard("allow"):
            self.checkpoints.wait()
            failure = self.rows_written()
            if failure is None and self.leads:
                failure = self.checkpoints.why_not(step)
            # All hosts save, or none does: they wait for each other in it.
            if sharding.from_first_host(int(failure is None)):
                self.checkpoints.save(step, state, self.experiment.facts)
            else:
                self.checkpoints.fail(step, failure or OSError("host 0 cannot write"))

    def rows_written(self) -> OSError | None:
        """Why the rows until now are not where a resumed run would look for them; on host 0."""
        try:
            self.metrics.sync()
        except OSError as error:
            return error
        reason = self.place.upload()
        return None if reason is None else OSError(f"not uploaded: {reason}")

    def too_many_failed_saves(self) -> bool:
        """Whether they are a reason to stop; that is kept for the end."""
        failed = self.checkpoints.failed_in_a_row
        if failed <= self.config.max_failed_saves or self.failure is not None:
            return False
        self.failure = Interrupted(f"{failed} saves in a row failed (--config.max_failed_saves)")
        return True

    @contextlib.contextmanager
    def dumping(self, state: Callable[[], TrainState]) -> Iterator[None]:
        """A step of which training diverged in the block is kept, to be made again."""
        try:
            yield
        except Diverged as error:
            last = self.skipped.last
            if last is None:
                raise
            name = self.experiment.split.training.name
            moment = dump.Moment(
                last.step,
                last.batch.images,
                [name(index) for index in last.batch.numbers.tolist()],
                {key: float(value) for key, value in jax.device_get(dict(last.metrics)).items()},
            )
            folder = self.workdir / dump.FOLDER / f"step_{last.step}"
            self.checkpoints.wait()
            try:
                with jax.transfer_guard("allow"), self.heartbeat.standing():
                    dump.write_dump(
                        self.experiment, moment, state(), folder, self.place.address_of(folder)
                    )
            except OSError as failure:
                error.add_note(f"its batch and state could not be kept: {failure}")
            else:
                error.add_note(
                    "its batch and the state before it are kept: python main.py --replay "
                    f"{self.place.named(folder)}"
                )
            raise

    def batches(self, step: int) -> Any:
        """This host's batches from a step on; to be closed, as threads read ahead."""
        config = self.config
        return training_batches(
            self.experiment.split.training,
            order=self.experiment.order,
            recipe=self.experiment.recipe,
            batch=config.batch,
            steps=range(step, self.experiment.total_steps),
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=self.workers,
            threads=config.data.threads,
        )

    def write_pending(self) -> None:
        """Fetches and writes the row that waits; what is not finite is left out of it."""
        if self.pending is None:
            return
        step, metrics, measured, evaluated = self.pending
        self.pending = None
        values = (
            self.renamed({key: float(value) for key, value in jax.device_get(metrics).items()})
            | measured
        )
        values = {key: value for key, value in values.items() if np.isfinite(value)}
        self.metrics.write(step, values)
        if evaluated:
            with self.heartbeat.standing():
                self.examination.report()
        self.show(step, values)
        self.notice.lap(step, values["data_wait"], values["images_per_second"])

    def renamed(self, values: dict[str, float]) -> dict[str, float]:
        """With one student its name is left out of the keys."""
        if len(self.experiment.students) > 1:
            return values
        return {key.rpartition("/")[2]: value for key, value in values.items()}

    def show(self, step: int, values: dict[str, float]) -> None:
        """The live line."""
        total = self.experiment.total_steps
        used = f"MFU {values['mfu']:.0%}  " if "mfu" in values else ""
        pace = (time.monotonic() - self.began) / max(step - self.began_at, 1)
        first = next(iter(self.experiment.students))
        own = {key.removeprefix(f"{first}/"): value for key, value in values.items()}
        nothing = float("nan")
        losses = "  ".join(
            f"{name} {own.get(key, nothing):.3f}"
            for name, key in (
                ("loss", "loss"),
                ("token", "token_loss"),
                ("feature", "feature_loss"),
                ("patch", "patch_loss"),
            )
        )
        self.console.progress(
            f"step {step}/{total}  {losses}  "
            f"{values['images_per_second']:.1f} images/s  {used}"
            f"data wait {values['data_wait']:.0%}  "
            f"{duration(pace * (total - step))} left",
            last=step == total,
        )
