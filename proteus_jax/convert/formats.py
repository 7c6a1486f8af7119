"""Weight files as named numpy arrays. Whatever the format, a file is data and never code."""

import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from proteus_jax.convert import onnx_file
from proteus_jax.errors import InputError, refusing

Arrays = dict[str, np.ndarray]
_WRAPPERS = ("state_dict", "model")


class Weights(NamedTuple):
    """Float32 arrays by name, the narrowest floats that the file held them as, and, in a file of
    this project, its card.
    """

    arrays: Arrays
    precision: str
    card: str = ""


def read_arrays(path: Path) -> Arrays:
    """The arrays of `read_weights`."""
    return read_weights(path).arrays


def read_weights(path: Path) -> Weights:
    """What a .pth, .bin, .safetensors, .npz or .onnx file holds.

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
        found = {name: array for name, array in reader(path).items() if not _COUNTED.search(name)}
    wrong = [
        f"{path}: {name} should hold floats, found {getattr(array, 'dtype', type(array).__name__)}"
        for name, array in found.items()
        if not isinstance(array, np.ndarray) or not jnp.issubdtype(array.dtype, np.floating)
    ]
    if wrong:
        raise InputError(wrong)
    narrowest = min((array.dtype for array in found.values()), key=_bits, default=np.float32)
    arrays = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in found.items()}
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
    """Nothing is ever unpacked to a disk, but who writes such a name means harm. Nor is a
    TorchScript archive a file of weights.
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
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path}: reading a PyTorch file needs torch: pip install -r requirements-parity.txt"
        ) from None
    try:
        with warnings.catch_warnings():
            # It warns of every pickle protocol but its own; what it cannot read it refuses anyway.
            warnings.simplefilter("ignore")
            # weights_only keeps the pickle to tensors and containers: nothing in the file can run.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused: a state dict of tensors is expected, this pickle wants more "
            f"({_first_line(error)})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a readable PyTorch file ({_first_line(error)})") from None
    for wrapper in _WRAPPERS:
        # Training code saves the model beside the optimizer and the epoch.
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: expected a state dict, found {type(loaded).__name__}")
    strange = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise InputError(f"{path}: expected tensors only, found others under: {', '.join(strange)}")
    return {str(name): _numpy_of_tensor(value) for name, value in loaded.items()}


def _numpy_of_tensor(value: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.float().numpy().astype(ml_dtypes.bfloat16)
    return value.numpy()


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
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".onnx": onnx_file.read,
}
