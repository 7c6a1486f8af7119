"""Hugging Face's names of DINOv2 (transformers' Dinov2Model) and the official ones, both ways."""

import re

import numpy as np

from proteus_jax.errors import InputError

Arrays = dict[str, np.ndarray]

_OUTSIDE_BLOCKS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_IN_BLOCK = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layer_scale2.lambda1": "ls2.gamma",
}
_QKV = ("query", "key", "value")
_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+?)(\.weight|\.bias)?$")
_OFFICIAL_BLOCK = re.compile(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias)?$")


def is_huggingface(arrays: Arrays) -> bool:
    """Whether the names are transformers' rather than the official ones."""
    return any(name.startswith(("embeddings.", "encoder.layer.")) for name in arrays)


def to_official(arrays: Arrays) -> Arrays:
    """Official names for transformers' names; query, key and value become one qkv.

    Names that have no counterpart are kept as they are: the strict loader lists them as unexpected.
    """
    arrays = _joined_position_table(arrays)
    result: Arrays = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        block = _BLOCK.match(name)
        if name in _OUTSIDE_BLOCKS:
            result[_OUTSIDE_BLOCKS[name]] = array
        elif block and block[2].removeprefix("attention.attention.") in _QKV:
            whole = f"blocks.{block[1]}.attn.qkv{block[3] or ''}"
            parts.setdefault(whole, {})[block[2].rpartition(".")[2]] = array
        elif block and block[2] in _IN_BLOCK:
            result[f"blocks.{block[1]}.{_IN_BLOCK[block[2]]}{block[3] or ''}"] = array
        else:
            result[name] = array
    for whole, three in parts.items():
        absent = [part for part in _QKV if part not in three]
        if absent:
            raise InputError(f"{whole}: its {' and '.join(absent)} part is missing")
        result[whole] = np.concatenate([three[part] for part in _QKV])
    return result


def from_official(arrays: Arrays) -> Arrays:
    """The inverse of `to_official`, names and values."""
    outside = {official: name for name, official in _OUTSIDE_BLOCKS.items()}
    inside = {official: name for name, official in _IN_BLOCK.items()}
    result: Arrays = {}
    for name, array in arrays.items():
        block = _OFFICIAL_BLOCK.match(name)
        if name in outside:
            result[outside[name]] = array
        elif block and block[2] == "attn.qkv":
            for part, values in zip(_QKV, np.split(array, 3), strict=True):
                result[f"encoder.layer.{block[1]}.attention.attention.{part}{block[3]}"] = values
        elif block and block[2] in inside:
            result[f"encoder.layer.{block[1]}.{inside[block[2]]}{block[3] or ''}"] = array
        else:
            raise InputError(f"{name}: transformers' Dinov2Model has no such parameter")
    return result


def _joined_position_table(arrays: Arrays) -> Arrays:
    """An ONNX export splits the position table into its class row and its patches: join them
    again.
    """
    table = "embeddings.position_embeddings"
    rows = {
        name: array
        for name, array in arrays.items()
        if re.fullmatch(r"embeddings\.(Concat|Reshape)(_\d+)?", name)
    }
    cls = [name for name, array in rows.items() if array.ndim == 3 and array.shape[1] == 1]
    patches = [name for name, array in rows.items() if array.ndim == 3 and array.shape[1] > 1]
    if table in arrays or len(cls) != 1 or len(patches) != 1:
        return arrays
    rest = {name: array for name, array in arrays.items() if name not in (cls[0], patches[0])}
    return rest | {table: np.concatenate([arrays[cls[0]], arrays[patches[0]]], axis=1)}
