"""The sizes that a slice of a model can have."""

import dataclasses

from proteus_jax.models.config import ViTSpec, named_spec

# Sizes that a slice may have of its own, beside those of a named student.
FIELDS = ("width", "heads", "hidden", "depth")


def sliced_spec(
    source: ViTSpec,
    crop: int,
    *,
    name: str = "",
    width: int | None = None,
    heads: int | None = None,
    hidden: int | None = None,
    depth: int | None = None,
) -> ViTSpec:
    """The spec of a slice of `source` for square crops: sizes of the student called `name`, or
    those that are given, and of `source` all else.

    Heads keep their size, so a width alone tells their number, and their number the width.
    ValueError lists what does not fit.
    """
    named = named_spec(name) if name else source
    if named is None:
        raise ValueError(f"{name}: no student has that name")
    size = source.width // source.heads
    if heads is not None and width is None:
        width = heads * size
    if width is not None and heads is None:
        heads = max(width // size, 1)
    own_width, own_heads = width or named.width, heads or named.heads
    if hidden is None:
        hidden = _usual_hidden(source, own_width) if name or own_width != source.width else None
    made = {
        "width": own_width,
        "heads": own_heads,
        "hidden": source.hidden if hidden is None else hidden,
        "depth": depth or named.depth,
    }
    problems = _problems(source, made, size, crop, name)
    if problems:
        raise ValueError("; ".join(problems))
    spec = dataclasses.replace(
        source,
        width=own_width,
        heads=own_heads,
        depth=made["depth"],
        inner=made["hidden"],
        grid=crop // source.patch_size,
    )
    usual = dataclasses.replace(spec, inner=0)
    return usual if usual.hidden == spec.hidden else spec


def _usual_hidden(source: ViTSpec, width: int) -> int:
    """The hidden units of the source's kind of feed-forward layer at another width, as many for
    each channel as the source has.
    """
    usual = dataclasses.replace(source, inner=0)
    if usual.hidden == source.hidden:
        size = source.width // source.heads
        return dataclasses.replace(usual, width=width, heads=max(width // size, 1)).hidden
    return max(1, round(source.hidden * width / source.width))


def _problems(source: ViTSpec, made: dict[str, int], size: int, crop: int, name: str) -> list[str]:
    about = f"{name}: " if name else ""
    there = {"width": source.width, "heads": source.heads, "hidden": source.hidden}
    there["depth"] = source.depth
    problems = [
        f"{about}{field}: expected from 1 to the {most} of the model that is sliced, found "
        f"{made[field]}"
        for field, most in there.items()
        if not 1 <= made[field] <= most
    ]
    if made["width"] != made["heads"] * size:
        problems.append(
            f"{about}width {made['width']} with {made['heads']} heads: expected heads of {size} "
            "channels, as the model that is sliced has"
        )
    if crop % source.patch_size:
        problems.append(
            f"{about}patches of {source.patch_size} px do not divide images of {crop} px"
        )
    return problems
