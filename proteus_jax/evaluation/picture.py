"""A picture of agreement: patch tokens as colours, the teacher's beside the student's.

As in the DINOv2 papers a patch's colour is its token along the three largest principal components.
They are the teacher's, and so is the scale: the same colour says the same thing in every column.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, HEADING, GAP = 140, 24, 4
# So much of the teacher's range fills the scale from dark to bright; the rest is cut.
PERCENTILES = (2, 98)


def agreement_picture(
    views: np.ndarray, teacher: np.ndarray, others: Sequence[tuple[str, np.ndarray]]
) -> Image.Image:
    """One row a view uint8 [M, H, W, 3]; columns: itself, the teacher's and the others' patch
    tokens [M, N, D].
    """
    project = _principal_colours(teacher)
    columns = [("held-out view", [Image.fromarray(view) for view in views])]
    for title, tokens in [("teacher", teacher), *others]:
        columns.append((title, [_tile(project(each), views.shape[1:3]) for each in tokens]))
    size = (len(columns) * (CELL + GAP) - GAP, HEADING + len(views) * (CELL + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, tiles) in enumerate(columns):
        left = column * (CELL + GAP)
        draw.text((left + 4, 4), title, fill="black", font=ImageFont.load_default(13))
        for row, tile in enumerate(tiles):
            resized = tile.resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(resized, (left, HEADING + row * (CELL + GAP)))
    return sheet


def save_picture(sheet: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}")
    sheet.save(partial, "PNG")
    partial.replace(path)


def _principal_colours(tokens: np.ndarray):
    """A function from tokens [N, D] to colours uint8 [N, 3], fitted to all tokens [M, N, D]."""
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    _, _, directions = np.linalg.svd(flat - mean, full_matrices=False)
    axes = directions[:3]
    low, high = np.percentile((flat - mean) @ axes.T, PERCENTILES, axis=0)

    def project(each: np.ndarray) -> np.ndarray:
        share = ((each - mean) @ axes.T - low) / np.maximum(high - low, 1e-12)
        return (share.clip(0, 1) * 255).astype(np.uint8)

    return project


def _tile(colours: np.ndarray, sides: Sequence[int]) -> Image.Image:
    """The patches of one view in their places; the grid has the view's shape."""
    rows = round((len(colours) * sides[0] / sides[1]) ** 0.5)
    return Image.fromarray(colours.reshape(rows, -1, colours.shape[-1]))
