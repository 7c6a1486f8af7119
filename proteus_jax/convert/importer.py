"""A weight file becomes a model directory."""

from pathlib import Path
from typing import Any

from proteus_jax.convert import dinov2, huggingface
from proteus_jax.convert.formats import read_arrays
from proteus_jax.errors import InputError
from proteus_jax.pretrained import ModelCard, save_model
from proteus_jax.storage import sha256


def read_official(file: Path, prefix: str | None = None) -> dict[str, Any]:
    """The ViT's arrays of a weight file under DINOv2's official names.

    With a `prefix` only the names below it belong to the ViT. An ONNX file holds a whole program:
    there the one prefix below which a class token lies is found without being asked for.
    """
    arrays = read_arrays(file)
    if prefix is None:
        prefix = _prefix_of_program(list(arrays)) if Path(file).suffix.lower() == ".onnx" else ""
    arrays = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    if not arrays:
        raise InputError(f"{file}: no name begins with {prefix!r}")
    return huggingface.to_official(arrays) if huggingface.is_huggingface(arrays) else arrays


def _prefix_of_program(names: list[str]) -> str:
    tokens = [name for name in names if name.endswith("cls_token")]
    if len(tokens) != 1:
        return ""
    return tokens[0].removesuffix("cls_token").removesuffix("embeddings.")


def import_weights(
    file: Path,
    target: Path,
    *,
    heads: int | None = None,
    prefix: str | None = None,
    licence: str = "not stated",
    source: dict[str, Any] | None = None,
    replace: bool = False,
) -> ModelCard:
    """Reads a weight file and writes a model directory; InputError lists all that does not fit.

    A mask token alone may be absent: a teacher does not need it. It becomes zeros, and the card
    says so.
    """
    file = Path(file).expanduser()
    arrays = read_official(file, prefix)
    try:
        spec = dinov2.infer_spec(arrays, heads)
        params = dinov2.to_params(arrays, spec, optional=("mask_token",))
    except InputError as error:
        raise InputError([f"{file}: {problem}" for problem in error.problems]) from None
    card = ModelCard(
        spec=spec,
        licence=licence,
        source={"file": file.name, "sha256": sha256(file)} | (source or {}),
        absent=() if "mask_token" in arrays else ("mask_token",),
    )
    save_model(target, params, card, replace=replace)
    return card
