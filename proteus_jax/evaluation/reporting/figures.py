"""Pictures of what models see, as Pillow images.

As in the DINOv2 papers a patch's color is its token along the three largest principal components.
They are the teacher's, and so is the scale: the same color says the same thing in every column.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, HEADING, GAP = 140, 24, 4
# So much of the teacher's range fills the scale from dark to bright; the rest is cut.
PERCENTILES = (2, 98)
# From 0 to 1: dark blue to yellow.
_HEAT = np.array([[30, 50, 110], [60, 120, 170], [220, 200, 110], [250, 240, 120]], np.float64)
Colors = Callable[[np.ndarray], np.ndarray]


def agreement_picture(
    views: np.ndarray, teacher: np.ndarray, others: Sequence[tuple[str, np.ndarray]]
) -> Image.Image:
    """One row a view uint8 [M, H, W, 3]; columns: itself, the teacher's and the others' patch
    tokens [M, N, D].
    """
    project = principal_colors(teacher)
    columns = [("held-out view", [Image.fromarray(view) for view in views])]
    for title, tokens in [("teacher", teacher), *others]:
        columns.append((title, [tile(project(each), views.shape[1:3]) for each in tokens]))
    return table_of(columns, CELL)


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


def token_strip(tokens: np.ndarray, project: Colors, sides: Sequence[int]) -> Image.Image:
    """Patch tokens [M, N, D] of M views of these sides, as colors."""
    return strip([tile(project(each), sides) for each in tokens])


def error_strip(views: np.ndarray, errors: np.ndarray, mask: np.ndarray) -> Image.Image:
    """Views uint8 [M, H, W, 3], darkened, and over them the errors [M, N] of the patches under the
    mask [M, N]; 1 is the teacher's own spread.
    """
    tiles = []
    for view, error, hidden in zip(views, errors, mask, strict=True):
        heat = tile(_heat(error), view.shape[:2])
        over = tile(np.repeat(hidden[:, None] * np.uint8(255), 3, axis=1), view.shape[:2])
        size = (view.shape[1], view.shape[0])
        heat, over = (each.resize(size, Image.Resampling.NEAREST) for each in (heat, over))
        dark = Image.fromarray((view * 0.5).astype(np.uint8))
        tiles.append(Image.composite(heat, dark, over.convert("L")))
    return strip(tiles)


def neighbor_sheet(views: np.ndarray, queries: Sequence[int], nearest: np.ndarray) -> Image.Image:
    """One row a query: itself, and the views [M, H, W, 3] that are nearest [M, K] to it."""
    side = CELL // 2
    rows = [
        strip([Image.fromarray(views[at]) for at in (query, *nearest[query])], side)
        for query in queries
    ]
    sheet = Image.new("RGB", (rows[0].width, len(rows) * (side + GAP) - GAP), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * (side + GAP)))
    return sheet


def foreground_colors(
    tokens: Sequence[np.ndarray], borders: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Colors uint8 [N, 3] of the patch tokens [N, D] of several images, as the DINOv2 papers show
    them: the first principal component tells foreground from background, which is black; three
    components of the foreground alone are its colors. `borders` bool [N] are the patches at the
    images' edges: of the two sides the one with fewer of them is the foreground.
    """
    flat = np.concatenate(tokens).astype(np.float64)
    edge = np.concatenate(borders)
    centered = flat - flat.mean(axis=0)
    first = centered @ np.linalg.svd(centered, full_matrices=False)[2][0]
    front = first > 0
    if front[edge].mean() > (~front)[edge].mean():
        front = ~front
    colors = np.zeros((len(flat), 3), np.uint8)
    if front.sum() > 3:
        colors[front] = principal_colors(flat[front][None])(flat[front])
    return np.split(colors, np.cumsum([len(each) for each in tokens])[:-1])


def _heat(share: np.ndarray) -> np.ndarray:
    """Colors uint8 [N, 3] of numbers [N] from 0 to 1."""
    at = share.clip(0, 1) * (len(_HEAT) - 1)
    channels = [np.interp(at, np.arange(len(_HEAT)), each) for each in _HEAT.T]
    return np.stack(channels, axis=-1).astype(np.uint8)


def number_tile(values: np.ndarray) -> Image.Image:
    """A grid of numbers [rows, columns] as colors, from the smallest to the largest."""
    share = (values - values.min()) / max(np.ptp(values), 1e-12)
    small = grid_tile(_heat(share.ravel()), values.shape)
    return small.resize((2 * CELL, 2 * CELL), Image.Resampling.NEAREST)


def heat_tile(view: np.ndarray, weights: np.ndarray, grid: Sequence[int]) -> Image.Image:
    """A view uint8 [H, W, 3] in gray, and warmer where the weights [N] of a grid are large."""
    share = (weights - weights.min()) / max(np.ptp(weights), 1e-12)
    size = (view.shape[1], view.shape[0])
    heat = grid_tile(_heat(share), grid).resize(size, Image.Resampling.BICUBIC)
    gray = Image.fromarray(view).convert("L").convert("RGB")
    return Image.blend(gray, heat, 0.6)


def fitted(pixels: np.ndarray, side: int, multiple: int) -> np.ndarray:
    """Uint8 [H, W, 3] with a shorter side of about `side` pixels and sides that are multiples of
    `multiple`, the shape kept as near as that allows.
    """
    scale = side / min(pixels.shape[:2])
    height, width = (
        max(round(length * scale / multiple), 1) * multiple for length in pixels.shape[:2]
    )
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def fitted_image(pixels: np.ndarray, side: int) -> Image.Image:
    """An image with a shorter side of `side` pixels."""
    return Image.fromarray(fitted(pixels, side, 1))


def table_of(columns: Sequence[tuple[str, Sequence[Image.Image]]], height: int) -> Image.Image:
    """Columns of tiles of one height and of any width under their titles."""
    font, count = ImageFont.load_default(14), len(columns[0][1])
    rows = [
        [each.resize((round(each.width * height / each.height), height)) for each in tiles]
        for _, tiles in columns
    ]
    widths = [
        max(*(each.width for each in tiles), int(font.getlength(title)) + 8)
        for (title, _), tiles in zip(columns, rows, strict=True)
    ]
    size = (sum(widths) + GAP * (len(widths) - 1), HEADING + count * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw, left = ImageDraw.Draw(sheet), 0
    for (title, _), tiles, width in zip(columns, rows, widths, strict=True):
        draw.text((left + 2, 3), title, fill="black", font=font)
        for row, each in enumerate(tiles):
            sheet.paste(each, (left, HEADING + row * (height + GAP)))
        left += width + GAP
    return sheet


def save_picture(sheet: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    sheet.save(partial, "PNG")
    partial.replace(path)


def principal_colors(tokens: np.ndarray) -> Colors:
    """A function from tokens [N, D] to colors uint8 [N, 3], fitted to all tokens [M, N, D]."""
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    _, _, directions = np.linalg.svd(flat - mean, full_matrices=False)
    axes = directions[:3]
    low, high = np.percentile((flat - mean) @ axes.T, PERCENTILES, axis=0)

    def project(each: np.ndarray) -> np.ndarray:
        share = ((each - mean) @ axes.T - low) / np.maximum(high - low, 1e-12)
        return (share.clip(0, 1) * 255).astype(np.uint8)

    return project


def tile(colors: np.ndarray, sides: Sequence[int]) -> Image.Image:
    """The patches uint8 [N, 3] of one view in their places; the grid has the view's shape."""
    rows = round((len(colors) * sides[0] / sides[1]) ** 0.5)
    return grid_tile(colors, (rows, len(colors) // rows))


def grid_tile(colors: np.ndarray, grid: Sequence[int]) -> Image.Image:
    """The patches uint8 [N, 3] of a grid (rows, columns) in their places."""
    return Image.fromarray(colors.reshape(*grid, colors.shape[-1]))
