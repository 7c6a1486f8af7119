"""Snapshots of a run for its report: pictures in WORKDIR/report, by student and step.

views.png, teacher.png                the same eight views, and the teacher's patch tokens of them
neighbours-teacher.png                the nearest held-out views of a few, by the teacher
NAME/pca-STEP.png                     the student's patch tokens through its feature head
NAME/errors-STEP.png                  how wrong the patch head is where patches are hidden
NAME/neighbours.png                   the nearest, by the student, at the last step
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from proteus_jax.evaluation.reporting import figures
from proteus_jax.evaluation.teacher_agreement import StudentTokens, TeacherTokens, nearest

FOLDER, VIEWS, QUERIES, NEIGHBORS = "report", 8, 5, 5


class Scene(NamedTuple):
    """The views that a report shows all along: uint8 [M, H, W, 3], the teacher's tokens of them,
    and which patches bool [VIEWS, N] are hidden.
    """

    views: np.ndarray
    target: TeacherTokens
    hidden: np.ndarray
    colors: Callable[[np.ndarray], np.ndarray]


def scene(views: np.ndarray, target: TeacherTokens, ratio: float, most: int) -> Scene:
    """The first views, at most so many; the same patches are hidden in every run."""
    shown, patches = min(VIEWS, len(views), most), target.patches.shape[1]
    ranks = np.random.default_rng(0).random((shown, patches)).argsort(axis=1).argsort(axis=1)
    hidden = ranks < int(patches * ratio)
    return Scene(views, target, hidden, figures.principal_colors(target.patches[:shown]))


def draw_teacher(scene: Scene, workdir: Path) -> None:
    """Draws the pictures that do not change during a run."""
    folder, shown = workdir / FOLDER, len(scene.hidden)
    views = scene.views[:shown]
    sides = views.shape[1:3]
    figures.save_picture(figures.view_strip(views), folder / "views.png")
    target_tiles = figures.token_strip(scene.target.patches[:shown], scene.colors, sides)
    figures.save_picture(target_tiles, folder / "teacher.png")
    _draw_neighbors(scene, scene.target.cls, folder / "neighbours-teacher.png")


def draw_student(
    scene: Scene,
    name: str,
    step: int,
    student: StudentTokens,
    predicted: np.ndarray | None,
    workdir: Path,
) -> None:
    """Draws a student's pictures at a step; `predicted` are the patch head's tokens [VIEWS, N, T]
    where patches are hidden.
    """
    folder, shown = workdir / FOLDER / name, len(scene.hidden)
    views = scene.views[:shown]
    seen = figures.token_strip(student.feature[:shown], scene.colors, views.shape[1:3])
    figures.save_picture(seen, folder / f"pca-{step:08}.png")
    if predicted is not None:
        target = scene.target.patches[:shown]
        spread = np.mean((target - target.mean(axis=(0, 1))) ** 2)
        errors = np.mean((predicted - target) ** 2, axis=-1) / spread
        figures.save_picture(
            figures.error_strip(views, errors, scene.hidden), folder / f"errors-{step:08}.png"
        )
    _draw_neighbors(scene, student.own, folder / "neighbours.png")


def _draw_neighbors(scene: Scene, tokens: np.ndarray, path: Path) -> None:
    count = len(scene.views)
    if count > 1:
        neighbors = nearest(tokens, min(NEIGHBORS, count - 1))
        queries = np.linspace(0, count - 1, min(QUERIES, count)).round().astype(int).tolist()
        figures.save_picture(figures.neighbor_sheet(scene.views, queries, neighbors), path)
