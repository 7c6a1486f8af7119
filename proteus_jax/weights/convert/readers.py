"""Weight files as named numpy arrays. Whatever the format, a file is data and never code."""

import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from proteus_jax.errors import InputError, refusing
from proteus_jax.weights.convert import onnx_reader, torch_file
from proteus_jax.weights.convert.inert_pickle import Opaque

Arrays = dict[str, np.ndarray]
_WRAPPERS = ("state_dict", "model")


class Weights(NamedTuple):
    """Float32 arrays by name, the narrowest floats that the file held them as, and, in a file of
    this project, its card.
    """

    arrays: Arrays
    precision: str
    card: str = ""


def read_weights(path: Path) -> Weights:
    """Reads a file of PyTorch (.pth, .pt, .bin, .ckpt, .pth.tar), .safetensors, .npz or .onnx.

    Half-precision values are widened. InputError for anything that is no such file, holds what is
    no float array, or holds a value that is not finite.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected a file ending in {', '.join(_READERS)}")
    with refusing(f"{path}: not a readable weight file"):
        _refuse_members_outside(path)
        kept = {name: array for name, array in reader(path).items() if not _COUNTED.search(name)}
    wrong = [
        f"{path}: {name} should hold floats, found {getattr(array, 'dtype', type(array).__name__)}"
        for name, array in kept.items()
        if not isinstance(array, np.ndarray) or not jnp.issubdtype(array.dtype, np.floating)
    ]
    if wrong:
        raise InputError(wrong)
    narrowest = min((array.dtype for array in kept.values()), key=_bits, default=np.float32)
    # ascontiguousarray would give a number without axes one.
    arrays = {name: np.asarray(array, np.float32, order="C") for name, array in kept.items()}
    spoilt = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if spoilt:
        raise InputError(f"{path}: not finite: {', '.join(spoilt)}")
    card = _card(path) if path.suffix.lower() == ".safetensors" else ""
    return Weights(arrays, np.dtype(narrowest).name, card)


# Integers that older files keep beside the weights: 0, 1, 2 ...
_COUNTED = re.compile(r"(^|\.)position_ids$")


# Where an exported file keeps what it is.
CARD_KEY = "proteus_jax"


def _card(path: Path) -> str:
    with safetensors.safe_open(path, "numpy") as file:
        return (file.metadata() or {}).get(CARD_KEY, "")


def _bits(dtype: np.dtype) -> int:
    return np.dtype(dtype).itemsize


def _refuse_members_outside(path: Path) -> None:
    """Refuses members outside of the archive: nothing is ever unpacked to a disk, but who writes
    such a name means harm. Nor is a TorchScript archive a file of weights.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for name in names:
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
            raise InputError(f"{path}: refused: its member {name!r} points outside the archive")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise InputError(
            f"{path}: a TorchScript archive, as OpenAI's own CLIP files are: it holds code, which "
            "is not run; take the same model from Hugging Face or OpenCLIP"
        )


def _read_torch(path: Path) -> Arrays:
    torch_weights = torch_file.TorchFile(path)
    items = _items(torch_weights.value)
    for wrapper in _WRAPPERS:
        # Training code saves the model beside the optimizer and the epoch.
        if items is not None and _items(items.get(wrapper)) is not None:
            items = _items(items[wrapper])
    if items is None:
        raise InputError(f"{path}: expected a state dict, found {_kind(torch_weights.value)}")
    others = [
        f"{name} ({_kind(value)})"
        for name, value in items.items()
        if not isinstance(value, torch_file.Tensor)
    ]
    if others:
        raise InputError(f"{path}: expected tensors only, found others: {', '.join(others[:20])}")
    return {str(name): torch_weights.array(value) for name, value in items.items()}


def _items(value: Any) -> dict[Any, Any] | None:
    """Items of a dictionary, or of an object that is filled like one."""
    if isinstance(value, Opaque):
        return value.items or None
    return value if isinstance(value, dict) else None


def _kind(value: Any) -> str:
    if isinstance(value, Opaque):
        return f"{value.kind}, which is not built"
    return "a tensor" if isinstance(value, torch_file.Tensor) else type(value).__name__


def _read_safetensors(path: Path) -> Arrays:
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which the reader then knows)

    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({_first_line(error)})"
        ) from None


def _read_npz(path: Path) -> Arrays:
    try:
        # Opened here, as numpy leaves a file open that it cannot read.
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: not a readable .npz of plain arrays ({_first_line(error)})"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_READERS: dict[str, Callable[[Path], Arrays]] = {
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".ckpt": _read_torch,
    # As in NAME.pth.tar, which is no tar archive.
    ".tar": _read_torch,
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".onnx": onnx_reader.read,
}
SUFFIXES = tuple(_READERS)
