"""What models see in images, as one picture.

    python -m proteus_jax.evaluation.reporting.visualize MODEL IMAGES... --output out.png
        [--beside MODEL] [--size 448]

One row an image; for each model its patch tokens as colours (the first principal component tells
what is in front, three more are its colours, as in the DINOv2 papers) and what its class token
attends to in the last block. MODEL is whatever proteus_jax.load takes; --beside, which may come
several times, names another.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from proteus_jax.data import decode
from proteus_jax.errors import InputError, Unreadable, exit_code
from proteus_jax.evaluation.reporting import figures
from proteus_jax.loading import load_any
from proteus_jax.runtime import process
from proteus_jax.runtime.filesystem import why_unwritable
from proteus_jax.weights.feature_extractor import Model

SIZE, HEIGHT, THIN = 448, 224, 20


def read_images(paths: Sequence[str]) -> list[np.ndarray]:
    """Pixels uint8 [H, W, 3] of each; InputError lists those that cannot be read."""
    found, problems = [], []
    for path in paths:
        try:
            pixels = decode.decode(Path(path).expanduser().read_bytes())
            if max(pixels.shape[:2]) > THIN * min(pixels.shape[:2]):
                raise Unreadable(f"one side is more than {THIN} times the other")
            found.append(pixels)
        except Unreadable as error:
            problems.append(f"{path}: {error}")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    if problems:
        raise InputError(problems)
    return found


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
    colours = figures.foreground_colours(tokens, edges)
    tiles = [figures.grid_tile(each, grid) for each, grid in zip(colours, views, strict=True)]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m proteus_jax.evaluation.reporting.visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--beside", action="append", default=[], metavar="MODEL")
    parser.add_argument("--size", type=int, default=SIZE, help="shorter side in pixels")
    if arguments is None:
        process.begin()
    read = parser.parse_args(arguments)
    try:
        if not 14 <= read.size <= 4096:
            raise InputError(f"--size: expected from 14 to 4096 pixels, found {read.size}")
        output = read.output.expanduser()
        visualize([read.model, *read.beside], read.images, output, read.size)
    except InputError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return exit_code(error)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
