"""Weight files as named numpy arrays. Whatever the format, a file is data and never code."""

import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from proteus_jax.convert import onnx_file
from proteus_jax.errors import InputError

Arrays = dict[str, np.ndarray]


def read_arrays(path: Path) -> Arrays:
    """Float32 arrays by name from a .pth, .safetensors, .npz or .onnx file.

    Half-precision values are widened. InputError for anything that is no such file, holds what is
    no float array, or holds a value that is not finite.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected a file ending in {', '.join(_READERS)}")
    arrays = reader(path)
    wrong = [
        f"{path}: {name} should hold floats, found {array.dtype}"
        for name, array in arrays.items()
        if not jnp.issubdtype(array.dtype, np.floating)
    ]
    if wrong:
        raise InputError(wrong)
    arrays = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    spoilt = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if spoilt:
        raise InputError(f"{path}: not finite: {', '.join(spoilt)}")
    return arrays


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
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: expected a state dict, found {type(loaded).__name__}")
    strange = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise InputError(f"{path}: expected tensors only, found others under: {', '.join(strange)}")
    return {str(name): _numpy_of_tensor(value) for name, value in loaded.items()}


def _numpy_of_tensor(value: Any) -> np.ndarray:
    # numpy has no bfloat16: every float becomes float32 here.
    return (value.float() if value.is_floating_point() else value).numpy()


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
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".onnx": onnx_file.read,
}
