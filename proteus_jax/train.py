"""The loop: build, restore, iterate, evaluate, save, log.

The order inside an iteration is a contract: a step, its row of metrics, then what is due of
evaluation and checkpoint. A checkpoint of step k holds all that came of the first k steps, and its
rows are on the disk before it is.
"""

import contextlib
import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import proteus_jax
from proteus_jax import sharding
from proteus_jax.checkpoint import Checkpoints, differences
from proteus_jax.compiled import keep_compiled_programs
from proteus_jax.console import Console, duration
from proteus_jax.data.pipeline import training_batches, worker_count
from proteus_jax.errors import InputError, Interrupted
from proteus_jax.examination import Examination
from proteus_jax.experiment import Experiment, Inputs, build
from proteus_jax.lessons import FIRST, lessons
from proteus_jax.messages import conclude, introduce
from proteus_jax.metrics import MetricsWriter, NoMetrics, parameter_table, read_metrics
from proteus_jax.modelcard import text_of
from proteus_jax.pretrained import ModelCard, save_model
from proteus_jax.step import TrainState
from proteus_jax.storage import write_atomically
from proteus_jax.watch import Clock, Profiling, SkippedUpdates, UnreadableImages, WaitNotice
from proteus_jax.workdir import Workdir

DONE = 0


def run(
    config: Any, inputs: Inputs, place: Workdir, console: Console, *, profile: bool = False
) -> int:
    """Trains, or goes on training, to the end; returns the exit code. `profile` writes a trace of a
    few steps.

    InputError, before anything is changed, where another run is using the workdir, or it holds one
    of other images, seed, batch or models.
    """
    keep_compiled_programs()
    # The hosts of a run share a workdir: the first one holds it.
    with contextlib.nullcontext() if jax.process_index() else place.locked():
        return _run_alone(config, inputs, place, console, profile)


def _run_alone(config: Any, inputs: Inputs, place: Workdir, console: Console, profile: bool) -> int:
    experiment, workdir = build(config, inputs), place.local
    workdir.mkdir(parents=True, exist_ok=True)
    host = jax.process_index()
    console.quiet = host > 0
    manager = Checkpoints(place.checkpoints, keep=config.keep_checkpoints)
    with contextlib.closing(manager) as checkpoints:
        resumed = checkpoints.latest()
        if resumed is not None:
            _refuse_other_run(checkpoints.facts(resumed), experiment.facts, resumed)
        console.keep_log(workdir / (f"log.{host}.txt" if host else "log.txt"))
        if host == 0:
            text = json.dumps(json.loads(config.to_json()), indent=2) + "\n"
            write_atomically(workdir / "config.json", text)
        introduce(experiment, place.named(workdir), resumed, console)
        with _StopRequest() as stop:
            profiling = Profiling(workdir / "profile", on=profile and host == 0)
            run = _Run(experiment, place, console, checkpoints, stop, profiling)
            return run.to_the_end(resumed)


def _refuse_other_run(found: dict[str, Any], expected: dict[str, Any], step: int) -> None:
    different = differences(found, expected)
    if different:
        raise InputError(
            [f"--workdir holds another run, at step {step}: {line}" for line in different]
        )


class _StopRequest:
    """SIGINT and SIGTERM ask for an end after the current step; a second signal does not wait."""

    def __enter__(self) -> "_StopRequest":
        self.made = False
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.made = True
        signal.signal(number, signal.SIG_DFL)


class _Pending(NamedTuple):
    """A logged step whose numbers are still on the device."""

    step: int
    metrics: dict[str, jax.Array]
    measured: dict[str, float]
    evaluated: bool


class _Run:
    """One run of the loop and its accounts."""

    def __init__(
        self,
        experiment: Experiment,
        place: Workdir,
        console: Console,
        checkpoints: Checkpoints,
        stop: _StopRequest,
        profiling: Profiling,
    ):
        self.experiment, self.config = experiment, experiment.config
        self.place, self.workdir = place, place.local
        self.console, self.checkpoints, self.stop = console, checkpoints, stop
        self.profiling = profiling
        self.leads = jax.process_index() == 0
        self.pending: _Pending | None = None
        self.failure: InputError | None = None
        data = self.config.data
        self.unreadable = UnreadableImages(
            experiment.split.training.name,
            limit=data.unreadable,
            repeats=data.repeats,
            say=console.line,
        )
        self.skipped = SkippedUpdates(
            experiment.split.training.name, limit=self.config.max_skipped, say=console.line
        )
        self.workers = worker_count(data.workers)
        self.examination = Examination(experiment, self.workdir, console)

    def to_the_end(self, resumed: int | None) -> int:
        """Restores or begins, trains, exports, and says what was learnt."""
        experiment, total = self.experiment, self.experiment.total_steps
        self.refuse_hosts_that_differ(resumed)
        if resumed is None:
            state, step = experiment.init(), 0
            self.console.log(parameter_table(state.params))
        else:
            state = self.checkpoints.restore(
                resumed, experiment.state_shapes, experiment.state_shardings
            )
            step = resumed
        self.metrics = MetricsWriter(self.workdir, resumed) if self.leads else NoMetrics()
        with contextlib.closing(self.metrics):
            if resumed is None:
                self.metrics.write(0, self.renamed(self.examination.measure(0, state)))
                self.examination.report()
            if step < total:
                state, step = self.train(state, step)
        self.checkpoints.wait()
        if self.failure is not None:
            raise self.failure
        if step < total:
            self.console.line(
                f"interrupted at step {step} of {total}; the same command goes on from here"
            )
            return Interrupted.EXIT_CODE
        if self.unreadable.met:
            self.console.line(
                f"{len(self.unreadable.met)} images could not be read; others took their place"
            )
        directories = _export(experiment, state, self.workdir)
        self.examination.draw(state)
        if self.leads:
            names = [self.place.named(directory) for directory in directories]
            conclude(experiment, self.workdir, names, self.console)
        return DONE

    def refuse_hosts_that_differ(self, resumed: int | None) -> None:
        """InputError on all hosts where one sees other images, another teacher or another workdir:
        they would wait for each other for ever, or train on something else.
        """
        views = b"" if self.examination.views is None else self.examination.views.tobytes()
        seen = {
            "images or teacher": json.dumps([self.experiment.facts, self.experiment.total_steps]),
            "checkpoint in the workdir": str(resumed),
            "held-out images that can be read": hashlib.sha256(views).hexdigest(),
        }
        different = [what for what, text in seen.items() if not sharding.same_everywhere(text)]
        if different:
            raise InputError([f"the hosts do not see the same {what}" for what in different])

    def train(self, state: TrainState, step: int) -> tuple[TrainState, int]:
        """Steps until the end or a request to stop; the last one is saved."""
        experiment, config, total = self.experiment, self.config, self.experiment.total_steps
        self.console.progress(f"step {step}/{total}: compiling")
        self.began, self.began_at, self.saved = time.monotonic(), step, step
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
                self.skipped.note(step, values["skipped_in_a_row"], batch.numbers)
                self.profiling.after(step - self.began_at, values)
                stopping = agreement.any(self.stop.made)
                evaluating = step % config.eval_every == 0 or step == total
                if evaluating or step % config.log_every == 0:
                    # First the row before this one: its numbers are ready, and the device is
                    # already busy with this step.
                    self.write_pending()
                    measured = self.rates(clock.lap(step, config.batch))
                    if evaluating:
                        with clock.standing(), jax.transfer_guard("allow"):
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
        """A checkpoint, once the rows before it are on the disk."""
        self.write_pending()
        self.metrics.sync()
        self.skipped.settle()
        reason = self.place.upload()
        if reason is not None:
            self.console.line(f"not uploaded, tried again at the next checkpoint: {reason}")
        if step > self.saved:
            self.saved = step
            self.checkpoints.save(step, state, self.experiment.facts)

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


def _export(experiment: Experiment, state: TrainState, workdir: Path) -> list[Path]:
    """The backbones alone, as model directories; the averaged ones beside them where there are
    any.
    """
    several = len(experiment.students) > 1
    directories = []
    for name in experiment.students:
        card = _card(experiment, name)
        copies = {"student": state.params[name]["backbone"]}
        results = _results(experiment, name, workdir)
        if state.ema is not None:
            copies["student_ema"] = state.ema[name]
        for folder, params in copies.items():
            # Nothing is measured of averages.
            readme = _readme(experiment, name, card, results if folder == "student" else {})
            target = workdir / folder / name if several else workdir / folder
            # Of all hosts: each may hold a part.
            whole = sharding.gather(params, experiment.mesh)
            if jax.process_index() == 0:
                save_model(target, whole, card, replace=True, readme=readme)
        directories.append(workdir / "student" / name if several else workdir / "student")
    return directories


def _card(experiment: Experiment, name: str) -> ModelCard:
    """What config.json says of a student."""
    config = experiment.config
    taught = {key: lesson.source for key, lesson in lessons(config).items()}
    digests = {key: facts["weights"] for key, facts in experiment.facts["teachers"].items()}
    several = {"teachers": taught, "teachers_sha256": digests} if len(taught) > 1 else {}
    return ModelCard(
        spec=experiment.students[name].spec,
        family=experiment.facts["card"]["families"][name],
        normalisation=experiment.normalisation,
        licence=experiment.facts["card"]["licence"],
        source={
            "student": name,
            "teacher": taught[FIRST],
            "teacher_sha256": digests[FIRST],
            **several,
            **_recipe(experiment),
        },
    )


def _recipe(experiment: Experiment) -> dict[str, Any]:
    config = experiment.config
    recipe = {
        "steps": experiment.total_steps,
        "batch": config.batch,
        "crop": config.data.crop,
        "images": ", ".join(config.data.root),
        "proteus_jax": proteus_jax.__version__,
    }
    if config.start:
        recipe |= {"start": config.start, "start_sha256": experiment.facts["start"]}
    return recipe


def _results(experiment: Experiment, name: str, workdir: Path) -> dict[str, float]:
    """The newest value of each key of a student's metrics; nothing on other hosts than the
    first.
    """
    if jax.process_index():
        return {}
    prefix = f"{name}/" if len(experiment.students) > 1 else ""
    return {
        key.removeprefix(prefix): value
        for row in read_metrics(workdir)
        for key, value in row.items()
    }


def _readme(experiment: Experiment, name: str, card: ModelCard, results: dict[str, float]) -> str:
    teachers = {
        key: (lesson.source, experiment.cards[key])
        for key, lesson in lessons(experiment.config).items()
    }
    return text_of(card, name, teachers, _recipe(experiment), results)
