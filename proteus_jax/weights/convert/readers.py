"""Weight files as named numpy arrays. Whatever the format, a file is data and never code."""

import contextlib
import functools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_WRAPPED = ("state_dict.", "model.")


class Weights(NamedTuple):
    """Float32 arrays by name, the narrowest floats that the file held them as, and, in a file of
    this project, its card.
    """

    arrays: Arrays
    precision: str
    card: str = ""


# Names in the file, and under which of them each array is used.
Choose = Callable[[Sequence[str]], Mapping[str, str]]
Reads = Mapping[str, Callable[[], np.ndarray]]


def read_weights(path: Path, choose: Choose | None = None) -> Weights:
    """Reads a file of PyTorch (torch.save, whatever its suffix), .safetensors, .npz or .onnx.

    Only the arrays that are chosen are read, all without a choice; keys of dictionaries in
    dictionaries are joined by dots. Half-precision values are widened. InputError for anything that
    is no such file, and where what is chosen holds no floats or a value that is not finite.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    reader = _reader(path)
    with refusing(f"{path}: not a readable weight file"):
        _refuse_members_outside(path)
        stored = reader(path)
        chosen = _all(stored) if choose is None else choose(list(stored))
        read = {used: stored[name]() for name, used in chosen.items()}
    kept = {name: array for name, array in read.items() if _is_float(array) or _is_needed(name)}
    wrong = [
        f"{path}: {name} should hold floats, found {getattr(array, 'dtype', type(array).__name__)}"
        for name, array in kept.items()
        if not _is_float(array)
    ]
    if wrong:
        raise InputError(wrong)
    narrowest = min((array.dtype for array in kept.values()), key=_bits, default=np.float32)
    # ascontiguousarray would give a number without axes one.
    arrays = {name: np.asarray(array, np.float32, order="C") for name, array in kept.items()}
    spoilt = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if spoilt:
        raise InputError(f"{path}: not finite: {', '.join(spoilt)}")
    card = _card(path) if reader is _read_safetensors else ""
    return Weights(arrays, np.dtype(narrowest).name, card)


def _reader(path: Path) -> Callable[[Path], Reads]:
    """The reader of a file: by its content, and of ONNX, which has no mark, by its suffix."""
    with open(path, "rb") as file:
        head = file.read(16)
    suffix = path.suffix.lower()
    if suffix in _READERS:
        return _READERS[suffix]
    if head.startswith(b"PK"):
        return _read_npz if any(n.endswith(".npy") for n in _members(path)) else _read_torch
    if head[8:9] == b"{":
        return _read_safetensors
    if head.startswith(_PICKLE):
        return _read_torch
    raise InputError(f"{path}: expected a file ending in {', '.join(_READERS)}")


# How a pickle of protocol 2 or later begins.
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _members(path: Path) -> list[str]:
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return archive.namelist()
    return []


def _all(stored: Reads) -> dict[str, str]:
    """Every array, without the keys that all training code puts around a model."""
    before = ""
    for wrapper in _WRAPPED:
        if any(name.startswith(f"{before}{wrapper}") for name in stored):
            before += wrapper
    return {name: name.removeprefix(before) for name in stored if name.startswith(before)}


def _is_float(array: Any) -> bool:
    return isinstance(array, np.ndarray) and bool(jnp.issubdtype(array.dtype, np.floating))


def _is_needed(name: str) -> bool:
    """Whether a name may be that of a parameter; other integers are counters and indices."""
    return not _COUNTER.search(name)


# Integers that files keep beside the weights.
_COUNTER = re.compile(
    r"(^|\.)(position_ids|num_batches_tracked|\w*(index|indices|mask|step|steps|counter|ptr))$"
)


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


def _read_torch(path: Path) -> Reads:
    file = torch_file.TorchFile(path)
    tensors = dict(_tensors(file.value, "", 0))
    if not tensors:
        raise InputError(f"{path}: expected a state dict, found {_kind(file.value)}")
    return {name: functools.partial(file.array, tensor) for name, tensor in tensors.items()}


def _tensors(value: Any, name: str, depth: int) -> Iterator[tuple[str, torch_file.Tensor]]:
    """Every tensor in dictionaries of dictionaries, by its keys; what else lies there is not
    looked at.
    """
    if isinstance(value, torch_file.Tensor):
        yield name, value
    elif depth < _DEEPEST:
        for key, inside in (_items(value) or {}).items():
            yield from _tensors(inside, f"{name}.{key}" if name else str(key), depth + 1)


# Dictionaries in dictionaries: no training code has more, and one may hold itself.
_DEEPEST = 12


def _items(value: Any) -> dict[Any, Any] | None:
    """Items of a dictionary, or of an object that is filled like one."""
    if isinstance(value, Opaque):
        return value.items or None
    return value if isinstance(value, dict) else None


def _kind(value: Any) -> str:
    if isinstance(value, Opaque):
        return f"{value.kind}, which is not built"
    return "a tensor" if isinstance(value, torch_file.Tensor) else type(value).__name__


def _read_safetensors(path: Path) -> Reads:
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which the reader then knows)

    try:
        return _as_reads(safetensors.numpy.load_file(path))
    except (safetensors.SafetensorError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({_first_line(error)})"
        ) from None


def _read_npz(path: Path) -> Reads:
    try:
        # Opened here, as numpy leaves a file open that it cannot read.
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return _as_reads({name: loaded[name] for name in loaded.files})
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: not a readable .npz of plain arrays ({_first_line(error)})"
        ) from None


def _read_onnx(path: Path) -> Reads:
    return _as_reads(onnx_reader.read(path))


def _as_reads(arrays: Arrays) -> Reads:
    return {name: functools.partial(arrays.__getitem__, name) for name in arrays}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_READERS: dict[str, Callable[[Path], Reads]] = {
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".ckpt": _read_torch,
    # As in NAME.pth.tar, which is no tar archive.
    ".tar": _read_torch,
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".onnx": _read_onnx,
}
SUFFIXES = tuple(_READERS)
