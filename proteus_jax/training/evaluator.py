"""Evaluation of students while they train: agreement with the teacher, scores on images with
classes, pictures, and the report that shows them.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from proteus_jax.data.loader import held_out_views
from proteus_jax.data.sources.base import Source
from proteus_jax.evaluation import teacher_agreement
from proteus_jax.evaluation.reporting import figures, snapshots
from proteus_jax.evaluation.reporting.html_report import write_report
from proteus_jax.methods.config import PRIMARY
from proteus_jax.runtime.console import Console
from proteus_jax.training.online_evaluation import OnlineEvaluation
from proteus_jax.training.setup import Experiment
from proteus_jax.training.train_state import TrainState

# Before the key of what is measured of the average of a student's weights.
AVERAGE, RANDOM = "ema_", "random_"
PICTURE, PICTURE_ROWS = "agreement.png", 8


class Evaluator:
    """The held-out views, the labeled images, and what the teacher says of them."""

    def __init__(self, experiment: Experiment, workdir: Path, console: Console):
        self.experiment, self.config = experiment, experiment.config
        self.workdir, self.console = workdir, console
        self.leads = jax.process_index() == 0
        self.views: np.ndarray | None = None
        self._target: teacher_agreement.TeacherTokens | None = None
        self._scene: snapshots.Scene | None = None
        self._taught: dict[str, float] | None = None
        self._untrained: dict[str, dict[str, float]] | None = None
        self._online = OnlineEvaluation(
            experiment.evaluations, experiment.backbones, experiment.sides, workdir, console
        )
        self._heads = experiment.config.make_method().heads
        if experiment.split.held_out is not None:
            self.views = self._held_out_views(experiment.split.held_out)

    def _held_out_views(self, source: Source) -> np.ndarray:
        """The fixed views that agreement is measured on; what of it cannot be read is named."""
        data = self.config.data
        views, unreadable = held_out_views(
            source, count=data.held_out.views, size=self.experiment.side
        )
        for index in unreadable:
            self.console.line(f"{source.name(index)} cannot be read; it is not measured on")
        return views

    def measure(self, step: int, state: TrainState) -> dict[str, float]:
        """All there is to measure, by key, the student's name first; pictures are drawn meanwhile.
        Empty where nothing is held out and no labeled images are given.
        """
        values = {}
        if self.views is not None:
            values |= self._agreement(step, state, self.views)
        if self.experiment.evaluations:
            values |= self._scores(step, state)
        return values

    def _agreement(self, step: int, state: TrainState, views: np.ndarray) -> dict[str, float]:
        self.console.progress(f"step {step}: measuring agreement on {len(views)} held-out views")
        batch, values = self.config.batch, {}
        if self._target is None:
            self._target = teacher_agreement.teacher_tokens(
                self.experiment.teacher_features, views, batch
            )
            ratio = self.config.method.fields.get("mask_ratio", 0.0)
            self._scene = snapshots.scene(views, self._target, ratio, batch)
            if self.leads:
                with self._writing("a picture"):
                    snapshots.draw_teacher(self._scene, self.workdir)
        assert self._scene is not None
        for name in state.params:

            def predict(images: np.ndarray, name: str = name) -> teacher_agreement.StudentOutputs:
                return self.experiment.student_outputs(name, state, images)

            tokens = teacher_agreement.student_tokens(predict, views, batch)
            agreement = teacher_agreement.measure(tokens, self._target)
            values[f"{name}/agreement_class"] = agreement.cls
            if self._says_patches:
                values[f"{name}/agreement_patch"] = agreement.patch
            values |= {
                f"{name}/neighbour_overlap": agreement.neighbors,
                f"{name}/cka": agreement.cka,
            }
            values |= self._agreement_of_average(name, state, views)
            predicted = self._masked_predictions(name, state, self._scene)
            if self.leads:
                with self._writing("a picture"):
                    snapshots.draw_student(self._scene, name, step, tokens, predicted, self.workdir)
        return values

    def _agreement_of_average(
        self, name: str, state: TrainState, views: np.ndarray
    ) -> dict[str, float]:
        """Agreement of the average of a student's weights, which has no heads."""
        if state.ema is None or self._target is None:
            return {}
        averaged = state.params[name] | {"backbone": state.ema[name]}
        at = state._replace(params=state.params | {name: averaged})
        tokens = teacher_agreement.student_tokens(
            lambda images: self.experiment.student_outputs(name, at, images),
            views,
            self.config.batch,
        )
        agreement = teacher_agreement.measure(tokens, self._target)
        return {
            f"{name}/{AVERAGE}neighbour_overlap": agreement.neighbors,
            f"{name}/{AVERAGE}cka": agreement.cka,
        }

    @property
    def _says_patches(self) -> bool:
        """True where the feature head is trained: CLIP's student has its class token only."""
        return "feature" in self._heads

    def _masked_predictions(
        self, name: str, state: TrainState, scene: snapshots.Scene
    ) -> np.ndarray | None:
        """The patch head's predictions of hidden patches; None where it is not trained."""
        if "patch" not in self._heads or not scene.hidden.any():
            return None
        shown = len(scene.hidden)
        # As many as in a step, so that any number of devices has its share.
        rows = np.arange(self.config.batch) % shown
        patches = self.experiment.hidden_patches(name, state, scene.views[rows], scene.hidden[rows])
        return np.asarray(patches, np.float32)[:shown]

    def _scores(self, step: int, state: TrainState) -> dict[str, float]:
        """Scores of the teacher and of random weights, which stay, of every student, and of its
        average.
        """
        if self._taught is None:
            params = self.experiment.teacher_params[PRIMARY]
            self._taught = self._online.measure(PRIMARY, params, step)
        values = {f"teacher_{key}": value for key, value in self._taught.items()}
        for name, params in state.params.items():
            scores = self._online.measure(name, params["backbone"], step)
            values |= {f"{name}/{key}": value for key, value in scores.items()}
            random = self._scores_of_random_weights(step).get(name, {})
            values |= {f"{name}/{RANDOM}{key}": value for key, value in random.items()}
            if state.ema is not None:
                scores = self._online.measure(name, state.ema[name], step)
                values |= {f"{name}/{AVERAGE}{key}": value for key, value in scores.items()}
        return values

    def _scores_of_random_weights(self, step: int) -> dict[str, dict[str, float]]:
        """What each student would score if it had started from random weights; nothing where it
        has.
        """
        if self._untrained is None:
            params = self.experiment.init.random().params if self.config.start else {}
            self._untrained = {
                name: self._online.measure(name, each["backbone"], step)
                for name, each in params.items()
            }
        return self._untrained

    def report(self) -> None:
        """Renews the report, on the first host; where nothing is measured there is one as well."""
        if self.leads:
            experiment = self.experiment
            with self._writing("the report"):
                write_report(self.workdir, list(experiment.students), experiment.total_steps)

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Training goes on without what the disk has no room for."""
        try:
            yield
        except OSError as error:
            self.console.line(f"{what} could not be written: {error.strerror or error}")

    def draw(self, state: TrainState, *, again: bool) -> None:
        """Patch tokens of some held-out views as colors: the teacher's and each student's; where
        there is such a picture only if `again`.
        """
        path = self.workdir / PICTURE
        if self.views is None or (path.is_file() and not again):
            return
        # The students before are no part of a checkpoint: the seed makes them again.
        moments = (("before", self.experiment.init()), ("after", state))
        batch = self.views[np.arange(self.config.batch) % len(self.views)]
        rows = min(PICTURE_ROWS, len(batch))
        target = np.asarray(self.experiment.teacher_features(batch).patches)[:rows]
        outputs = [
            (f"{name} {moment}", self.experiment.student_outputs(name, at, batch).feature)
            for name in self.experiment.students
            for moment, at in moments
        ]
        columns = [(title, np.asarray(tokens)[:rows]) for title, tokens in outputs]
        if self.leads:
            with self._writing("a picture"):
                figures.save_picture(figures.agreement_picture(batch[:rows], target, columns), path)
