"""Model directories of Hugging Face, timm and OpenCLIP: config.json and weights, in one file or in
several.
"""

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from proteus_jax.errors import InputError, refusing
from proteus_jax.weights.convert.readers import Arrays, Weights, read_weights

INDICES = {
    "model.safetensors.index.json": "model-*-of-*.safetensors",
    "pytorch_model.bin.index.json": "pytorch_model-*-of-*.bin",
}
DESCRIPTIONS, PROCESSOR = ("config.json", "open_clip_config.json"), "preprocessor_config.json"
_WEIGHTS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def wanted_files(names: Iterable[str]) -> list[str]:
    """Which files of a repository make such a directory: descriptions, and one set of weights."""
    there = set(names)
    described = [name for name in (*DESCRIPTIONS, PROCESSOR) if name in there]
    index = next((name for name in INDICES if name in there), None)
    if index is not None:
        shards = [name for name in there if fnmatch.fnmatch(name, INDICES[index])]
        return sorted([*described, index, *shards])
    weights = [name for name in _WEIGHTS if name in there][:1]
    return [*described, *weights] if weights else []


class Directory(NamedTuple):
    """A directory's description of its model, and its arrays."""

    settings: dict[str, Any]
    weights: Weights
    files: tuple[Path, ...]


def is_described(folder: Path) -> bool:
    """Returns True for a folder with a description of its model, readable or not."""
    return any((folder / name).is_file() for name in DESCRIPTIONS)


def read_directory(folder: Path) -> Directory:
    """InputError where it is no such directory, or names a file outside of it."""
    settings = _settings(folder)
    index = next((name for name in INDICES if (folder / name).is_file()), None)
    if index is not None:
        files = _shards(folder / index)
    else:
        files = [folder / name for name in _WEIGHTS if (folder / name).is_file()][:1]
    if not files:
        raise InputError(f"{folder}: expected one of {', '.join((*_WEIGHTS, *INDICES))} in it")
    for file in files:
        _refuse_outside(folder, file)
    parts = [read_weights(file) for file in files]
    arrays: Arrays = {}
    for file, part in zip(files, parts, strict=True):
        twice = arrays.keys() & part.arrays.keys()
        if twice:
            raise InputError(f"{file}: {min(twice)} is in another part as well")
        arrays |= part.arrays
    precision = min((part.precision for part in parts), key=lambda name: name != "float32")
    return Directory(settings, Weights(arrays, precision), tuple(files))


def _shards(index: Path) -> list[Path]:
    """The files of an index, each once."""
    folder, listed = index.parent, _json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{index}: expected a weight_map of names to files")
    names = sorted(set(listed.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(f"{index}: refused: {outside[0]} points outside the folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError([f"{folder / name}: a part of the model, and missing" for name in missing])
    return [folder / name for name in names]


def _refuse_outside(folder: Path, file: Path) -> None:
    """A link may lead about in its folder and, in Hugging Face's cache, to the blobs beside the
    snapshots.
    """
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parent.parent / "blobs")
    if not any(file.resolve().is_relative_to(place) for place in inside):
        raise InputError(f"{file}: refused: a link that points outside the folder")


def _settings(folder: Path) -> dict[str, Any]:
    """config.json of transformers or timm, and the image statistics beside it, in one dict."""
    for name in DESCRIPTIONS:
        if (folder / name).is_file():
            _refuse_outside(folder, folder / name)
            config: dict[str, Any] = _json(folder / name)
            break
    else:
        raise InputError(f"{folder}: not a model directory: it has no config.json")
    if str(config.get("format", "")).startswith("proteus_jax"):
        raise InputError(f"{folder}: a model directory already; give its name where one is wanted")
    if name == "open_clip_config.json":
        model = config.get("model_cfg")
        quick = isinstance(model, dict) and model.get("quick_gelu", False) is True
        activation = "quick_gelu" if quick else "gelu"
        statistics = _image_statistics(config.get("preprocess_cfg"), "mean", "std")
        config = {"model_type": "clip", "hidden_act": activation, **statistics}
    vision = config.get("vision_config")
    if isinstance(vision, dict):
        # What it leaves out is the family's default, not one of ours.
        config = {"model_type": config.get("model_type")} | vision
    statistics = config.get("pretrained_cfg")
    if isinstance(statistics, dict):
        config |= _image_statistics(statistics, "mean", "std")
    if (folder / PROCESSOR).is_file():
        beside = _json(folder / PROCESSOR)
        config |= _image_statistics(beside, "image_mean", "image_std")
    return config


def _image_statistics(settings: Any, mean: str, std: str) -> dict[str, Any]:
    if not isinstance(settings, dict) or mean not in settings or std not in settings:
        return {}
    return {"image_mean": settings[mean], "image_std": settings[std]}


def _json(path: Path) -> dict[str, Any]:
    with refusing(f"{path}: not readable as JSON"):
        content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object, found {type(content).__name__}")
    return content
