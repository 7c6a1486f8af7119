"""Patch tokens as colors, as in the DINOv2 papers, and the attention of the class token in the last
block.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from proteus_jax.data import decode
from proteus_jax.errors import InputError, Unreadable
from proteus_jax.evaluation.reporting import figures
from proteus_jax.feature_extractor import Model
from proteus_jax.loading import load_any
from proteus_jax.runtime.filesystem import why_unwritable

SIZE, HEIGHT, THIN = 448, 224, 20


def read_images(paths: Sequence[str]) -> list[np.ndarray]:
    """Pixels uint8 [H, W, 3] of each; InputError lists those that cannot be read."""
    pictures, problems = [], []
    for path in paths:
        try:
            pixels = decode.decode(Path(path).expanduser().read_bytes())
            if max(pixels.shape[:2]) > THIN * min(pixels.shape[:2]):
                raise Unreadable(f"one side is more than {THIN} times the other")
            pictures.append(pixels)
        except Unreadable as error:
            problems.append(f"{path}: {error}")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    if problems:
        raise InputError(problems)
    return pictures


def columns(model: Model, title: str, pixels: Sequence[np.ndarray], size: int) -> list:
    """A model's two columns: titles, and a tile for each image."""
    tokens, edges, heats, views = [], [], [], []
    for each in pixels:
        view = figures.fitted(each, size, model.spec.patch_size)
        grid = [side // model.spec.patch_size for side in view.shape[:2]]
        tokens.append(np.asarray(model(view[None]).patches)[0])
        weights = np.asarray(model.attention(view[None]))[0].mean(axis=0)
        heats.append(figures.heat_tile(view, weights, grid))
        inside = np.ones(grid, bool)
        inside[1:-1, 1:-1] = False
        edges.append(inside.ravel())
        views.append(grid)
    colors = figures.foreground_colors(tokens, edges)
    tiles = [figures.grid_tile(each, grid) for each, grid in zip(colors, views, strict=True)]
    return [(title, tiles), ("attention", heats)]


def visualize(models: Sequence[str], paths: Sequence[str], output: Path, size: int = SIZE) -> None:
    """Writes the picture; InputError where a model or an image is none, before anything is
    written.
    """
    reason = why_unwritable(output.parent)
    if reason or output.is_dir():
        raise InputError(f"--output: {reason or f'{output} is a directory'}")
    pixels, problems, loaded = [], [], []
    for read in (
        lambda: pixels.extend(read_images(paths)),
        *(lambda name=name: loaded.append(load_any(name)) for name in models),
    ):
        try:
            read()
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    sheet = [("image", [figures.fitted_image(each, HEIGHT) for each in pixels])]
    for name, model in zip(models, loaded, strict=True):
        sheet += columns(model, Path(name).name or name, pixels, size)
    try:
        figures.save_picture(figures.table_of(sheet, HEIGHT), output)
    except OSError as error:
        raise InputError(f"--output: {output}: {error.strerror}") from None
