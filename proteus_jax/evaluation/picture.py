"""Pictures of what models see, as Pillow images.

As in the DINOv2 papers a patch's colour is its token along the three largest principal components.
They are the teacher's, and so is the scale: the same colour says the same thing in every column.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, HEADING, GAP = 140, 24, 4
# So much of the teacher's range fills the scale from dark to bright; the rest is cut.
PERCENTILES = (2, 98)
# Colours of an error from none to one as large as the teacher's own spread: dark blue to yellow.
_HEAT = np.array([[30, 50, 110], [60, 120, 170], [220, 200, 110], [250, 240, 120]], np.float64)
Colours = Callable[[np.ndarray], np.ndarray]


def agreement_picture(
    views: np.ndarray, teacher: np.ndarray, others: Sequence[tuple[str, np.ndarray]]
) -> Image.Image:
    """One row a view uint8 [M, H, W, 3]; columns: itself, the teacher's and the others' patch
    tokens [M, N, D].
    """
    project = principal_colours(teacher)
    columns = [("held-out view", [Image.fromarray(view) for view in views])]
    for title, tokens in [("teacher", teacher), *others]:
        columns.append((title, [tile(project(each), views.shape[1:3]) for each in tokens]))
    return columns_of(columns)


def columns_of(columns: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Columns of tiles under their titles."""
    rows = max(len(tiles) for _, tiles in columns)
    size = (len(columns) * (CELL + GAP) - GAP, HEADING + rows * (CELL + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, tiles) in enumerate(columns):
        left = column * (CELL + GAP)
        draw.text((left + 4, 4), title, fill="black", font=ImageFont.load_default(13))
        for row, each in enumerate(tiles):
            resized = each.resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(resized, (left, HEADING + row * (CELL + GAP)))
    return sheet


def strip(tiles: Sequence[Image.Image], side: int = CELL) -> Image.Image:
    """Tiles in one row."""
    sheet = Image.new("RGB", (len(tiles) * (side + GAP) - GAP, side), "white")
    for place, each in enumerate(tiles):
        resized = each.resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(resized, (place * (side + GAP), 0))
    return sheet


def view_strip(views: np.ndarray) -> Image.Image:
    """Views uint8 [M, H, W, 3] themselves."""
    return strip([Image.fromarray(view) for view in views])


def token_strip(tokens: np.ndarray, project: Colours, sides: Sequence[int]) -> Image.Image:
    """Patch tokens [M, N, D] of M views of these sides, as colours."""
    return strip([tile(project(each), sides) for each in tokens])


def error_strip(views: np.ndarray, errors: np.ndarray, mask: np.ndarray) -> Image.Image:
    """Views uint8 [M, H, W, 3], darkened, and over them the errors [M, N] of the patches under the
    mask [M, N]; 1 is the teacher's own spread.
    """
    tiles = []
    for view, error, hidden in zip(views, errors, mask, strict=True):
        at = error.clip(0, 1) * (len(_HEAT) - 1)
        colours = np.stack(
            [np.interp(at, np.arange(len(_HEAT)), _HEAT[:, channel]) for channel in range(3)],
            axis=-1,
        )
        heat = tile(colours.astype(np.uint8), view.shape[:2])
        over = tile(np.repeat(hidden[:, None] * np.uint8(255), 3, axis=1), view.shape[:2])
        size = (view.shape[1], view.shape[0])
        heat, over = (each.resize(size, Image.Resampling.NEAREST) for each in (heat, over))
        dark = Image.fromarray((view * 0.5).astype(np.uint8))
        tiles.append(Image.composite(heat, dark, over.convert("L")))
    return strip(tiles)


def neighbour_sheet(views: np.ndarray, queries: Sequence[int], found: np.ndarray) -> Image.Image:
    """One row a query: itself, and the views [M, H, W, 3] that are nearest [M, K] to it."""
    side = CELL // 2
    rows = [
        strip([Image.fromarray(views[at]) for at in (query, *found[query])], side)
        for query in queries
    ]
    sheet = Image.new("RGB", (rows[0].width, len(rows) * (side + GAP) - GAP), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * (side + GAP)))
    return sheet


def save_picture(sheet: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    sheet.save(partial, "PNG")
    partial.replace(path)


def principal_colours(tokens: np.ndarray) -> Colours:
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


def tile(colours: np.ndarray, sides: Sequence[int]) -> Image.Image:
    """The patches uint8 [N, 3] of one view in their places; the grid has the view's shape."""
    rows = round((len(colours) * sides[0] / sides[1]) ** 0.5)
    return Image.fromarray(colours.reshape(rows, -1, colours.shape[-1]))
