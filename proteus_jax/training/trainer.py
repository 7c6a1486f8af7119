"""The training of a run: restore or begin, train, export.

What happens in an iteration, and in which order, is proteus_jax.engine.loop's.
"""

import contextlib
from collections.abc import Callable, Generator

import jax

from proteus_jax.data.loader import HostBatch, training_batches
from proteus_jax.data.workers import WorkerPool
from proteus_jax.engine.batches import surviving_batches
from proteus_jax.engine.checkpointing import CheckpointManager
from proteus_jax.engine.hooks import Alive, Checkpointing, Logging, Monitors, Profiling
from proteus_jax.engine.loop import Loop, StopSignal
from proteus_jax.engine.metrics_logger import MetricsLogger, Written
from proteus_jax.engine.monitors import (
    CorruptImageMonitor,
    InputBoundWarning,
    NonFiniteMonitor,
    StepTimer,
)
from proteus_jax.errors import Diverged, InputError, Interrupted
from proteus_jax.runtime import sharding
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.heartbeat import Heartbeat
from proteus_jax.runtime.metric_writer import (
    MetricsWriter,
    NoMetrics,
    parameter_table,
)
from proteus_jax.runtime.preemption import PreemptionHandler
from proteus_jax.runtime.profiler import Profiler
from proteus_jax.runtime.workdir import Workdir
from proteus_jax.training import nan_replay
from proteus_jax.training.evaluator import Evaluator
from proteus_jax.training.export import export_students
from proteus_jax.training.resume import refuse_hosts_that_differ
from proteus_jax.training.setup import Experiment
from proteus_jax.training.summary import print_summary
from proteus_jax.training.train_state import TrainState, from_items, to_items

DONE = 0
# So many losses stand on the live line beside their sum.
SHOWN = 3


class Trainer:
    """A run: everything is constructed, `run` does it."""

    def __init__(
        self,
        experiment: Experiment,
        place: Workdir,
        console: Console,
        manager: CheckpointManager,
        pool: WorkerPool,
        heartbeat: Heartbeat,
        handler: PreemptionHandler,
        stop: StopSignal,
    ):
        config, name = experiment.config, experiment.split.training.name
        self._experiment, self._config, self._place = experiment, config, place
        self._console, self._manager, self._pool = console, manager, pool
        self._heartbeat, self._handler, self._stop = heartbeat, handler, stop
        self._corrupt = CorruptImageMonitor(
            name,
            limit=config.data.max_corrupt_fraction,
            repeats=config.data.repeated_aug,
            say=console.line,
        )
        self._finite = NonFiniteMonitor(name, limit=config.max_skipped, say=console.line)
        self._evaluator = Evaluator(experiment, place.local, console)

    def run(self, resumed: int | None, *, profile: bool = False) -> int:
        """Restores or begins, trains, exports, and says what was learned; returns the exit code."""
        experiment = self._experiment
        refuse_hosts_that_differ(
            experiment.facts | {"steps": experiment.total_steps},
            saved=resumed is None or resumed in self._manager.steps(),
            views=self._evaluator.views,
        )
        state, step = self._state(resumed), resumed or 0
        trains = step < experiment.total_steps
        logger = MetricsLogger(
            NoMetrics() if jax.process_index() else MetricsWriter(self._place.local, resumed),
            self._console,
            students=tuple(experiment.students),
            losses=("loss", *experiment.loss_names[:SHOWN]),
            total_steps=experiment.total_steps,
            work=experiment.work,
            peak=experiment.peak,
        )
        with contextlib.closing(logger):
            if resumed is None:
                logger.measure(step, self._evaluator.measure(step, state))
                self._evaluator.report()
            if trains:
                state, step = self._train(state, step, logger, profile)
        with self._heartbeat.paused():
            return self._finish(state, step, trains)

    def _state(self, resumed: int | None) -> TrainState:
        """The state to begin with: a new one, or that of a checkpoint."""
        experiment = self._experiment
        if resumed is None:
            state = experiment.init(self._console.progress)
            if not jax.process_index():
                for line in experiment.init.report(self._place.local):
                    self._console.line(line)
            self._console.log(parameter_table(state.params))
            return state
        shapes, places = experiment.state_shapes, experiment.state_shardings
        return from_items(self._manager.restore(resumed, to_items(shapes), to_items(places)))

    def _train(
        self, state: TrainState, step: int, logger: MetricsLogger, profile: bool
    ) -> tuple[TrainState, int]:
        """Steps until the end or a request to stop; the last one is saved."""
        experiment, config = self._experiment, self._config
        timer, profiler = StepTimer(step), Profiler(self._place.local / "profile", on=profile)
        logging = Logging(
            logger,
            timer,
            self._heartbeat,
            batch=config.batch,
            log_every=config.log_every,
            eval_every=config.eval_every,
            total_steps=experiment.total_steps,
            measure=self._evaluator.measure,
            written=self._row_written(step),
        )
        checkpointing = Checkpointing(
            self._manager,
            self._heartbeat.paused,
            self._stop,
            every=config.checkpoint_every,
            items_of=to_items,
            facts=experiment.facts,
            before=(logging.write, self._finite.flush),
            rows_written=lambda: self._rows_written(logger),
        )
        loop = Loop(
            lambda state, images: experiment.train_step(state, experiment.teacher_params, images),
            lambda batch: (sharding.place_batch(batch.images, experiment.mesh),),
            [
                Alive(self._heartbeat, self._handler),
                Monitors(self._corrupt, self._finite, self._stop),
                Profiling(profiler, self._heartbeat, step),
                logging,
                checkpointing,
            ],
            mesh=experiment.mesh,
            state=state,
            step=step,
            total_steps=experiment.total_steps,
            stop=self._stop,
            timer=timer,
            progress=self._console.progress,
        )
        logger.begin(step)
        with contextlib.closing(profiler):
            try:
                loop.run(surviving_batches(self._batches, self._pool, step, self._stop.fail))
            except Diverged as error:
                self._keep_diverged(error, loop.state)
                raise
        if profiler.missed:
            self._console.line(
                f"--profile: no trace, as the run ended before step {Profiler.FIRST + 1} from here"
            )
        return loop.state, loop.step

    def _batches(self, pool: WorkerPool, step: int) -> Generator[HostBatch]:
        """This host's batches from a step on, as long as these workers live."""
        experiment = self._experiment
        return training_batches(
            experiment.split.training,
            order=experiment.order,
            recipe=experiment.recipe,
            batch=self._config.batch,
            steps=range(step, experiment.total_steps),
            host=jax.process_index(),
            hosts=jax.process_count(),
            workers=pool.workers,
            threads=pool.threads,
        )

    def _row_written(self, step: int) -> Callable[[Written], None]:
        """Makes what hears of each row of a run that begins at a step."""
        first = step + 2 * max(self._config.log_every, 5)
        notice = InputBoundWarning(str(self._pool), first, self._console.line)

        def tell(row: Written) -> None:
            if row.evaluated:
                with self._heartbeat.paused():
                    self._evaluator.report()
            notice.lap(row.step, row.values["data_wait"], row.values["images_per_second"])

        return tell

    def _rows_written(self, logger: MetricsLogger) -> OSError | None:
        """Why the rows until now are not where a resumed run would look for them; on host 0."""
        try:
            logger.sync()
        except OSError as error:
            return error
        reason = self._place.upload()
        return None if reason is None else OSError(f"not uploaded: {reason}")

    def _keep_diverged(self, error: Diverged, state: TrainState) -> None:
        """Keeps the step of which training diverged, to be made again; notes on the error where."""
        if self._finite.last is None:
            return
        self._manager.wait()
        with jax.transfer_guard("allow"), self._heartbeat.paused():
            nan_replay.keep(self._experiment, self._finite.last, state, self._place, error)

    def _finish(self, state: TrainState, step: int, trained: bool) -> int:
        """Waits for the last checkpoint; exports where the run is at its end."""
        experiment, total = self._experiment, self._experiment.total_steps
        self._manager.wait()
        saved, goes_on = self._manager.newest, self._manager.resume_point()
        failure = self._stop.failure
        if isinstance(failure, Interrupted) and not (step == total == saved):
            raise Interrupted(f"{failure}; the same command goes on from {goes_on}")
        if isinstance(failure, InputError):
            raise failure
        if step < total:
            self._console.line(
                f"interrupted at step {step} of {total}; the same command goes on from "
                + ("here" if saved == step else goes_on)
            )
            return Interrupted.EXIT_CODE
        if self._corrupt.met:
            self._console.line(
                f"{len(self._corrupt.met)} images could not be read; others took their place"
            )
        if saved != step and not jax.process_index():
            # Nor is a student written: where one lies there is a checkpoint that it is of.
            raise Interrupted(
                "the run is at its end, but not its checkpoint: the same command goes on from "
                f"{goes_on}"
            )
        directories = export_students(experiment, state, self._place.local)
        self._evaluator.draw(state, again=trained)
        if not jax.process_index():
            names = [self._place.named(directory) for directory in directories]
            print_summary(experiment, self._place.local, names, self._console)
        return DONE
