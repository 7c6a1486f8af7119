"""The families of models: what their members have in common, and the names of their arrays.

Constants of each family are those of its authors' code: facebookresearch/dinov2 and /dinov3,
openai/CLIP, mlfoundations/open_clip, google-research/syn-rep-learn and /big_vision, timm.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from proteus_jax.errors import InputError
from proteus_jax.models import config
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.normalization import CLIP, HALF, IMAGENET, Normalization
from proteus_jax.weights.convert import name_maps
from proteus_jax.weights.convert.name_maps import NameMap

Arrays = dict[str, np.ndarray]
_WITHOUT_OFFSET: dict[str, Any] = {"interpolate_offset": 0.0, "interpolate_antialias": False}


class Family(NamedTuple):
    """Facts that a family's members have in common and no array says: choices of the architecture,
    channel statistics, and what of NEEDED they are without.
    """

    choices: Mapping[str, Any]
    normalization: Normalization
    title: str
    without: tuple[str, ...] = ()


class Layout(NamedTuple):
    """Names that the arrays of some families have; `fits` recognizes them."""

    names: NameMap
    families: tuple[str, ...]
    fits: Callable[[Arrays], bool]


_CLIP = {name: config.CLIP[name] for name in ("norm_epsilon", "activation", "xavier_qkv")}
_CLIP |= {"final_norm": "class", **_WITHOUT_OFFSET}
FAMILIES: dict[str, Family] = {
    "dinov2": Family({}, IMAGENET, "DINOv2"),
    "dinov3": Family(
        {"norm_epsilon": 1e-5, "key_bias": False}, IMAGENET, "DINOv3", ("position table",)
    ),
    "synclr": Family(
        {"mask_deviation": 0.02, "interpolate_offset": 0.1, "interpolate_antialias": False},
        CLIP,
        "SynCLR",
    ),
    "clip": Family(_CLIP, CLIP, "OpenAI's CLIP, with QuickGELU", ("patch bias",)),
    "openclip": Family(
        _CLIP | {"activation": "gelu"}, CLIP, "OpenCLIP, with GELU", ("patch bias",)
    ),
    "siglip": Family(
        {"activation": "gelu_tanh", **_WITHOUT_OFFSET}, HALF, "SigLIP", ("class token",)
    ),
    "timm": Family(
        {"interpolate_offset": 0.0, "interpolate_antialias": True}, IMAGENET, "timm's plain ViT"
    ),
}
# Arrays that every model has but for the families that say otherwise.
NEEDED = {
    "class token": "cls_token",
    "position table": "pos_embed",
    "patch bias": "patch_embed.proj.bias",
}


def _is_flexible(arrays: Arrays) -> bool:
    """SigLIP's patch embedding; InputError where it is that of flexible sizes."""
    table = arrays.get("embeddings.patch_embedding.weight")
    if table is not None and table.ndim == 2:
        raise InputError(
            "SigLIP 2 of flexible sizes (naflex) is not read; take one of a fixed size"
        )
    return table is not None


def _is_packed(arrays: Arrays) -> bool:
    """Whether the first linear of a SwiGLU layer holds both of its halves."""
    first, last = (arrays.get(f"blocks.0.mlp.{fc}.weight") for fc in ("fc1", "fc2"))
    return (
        first is not None
        and last is not None
        and first.ndim == last.ndim == 2
        and first.shape[0] == 2 * last.shape[1]
    )


def _is_square(arrays: Arrays) -> bool:
    """Whether the position table has rows for patches alone."""
    table = arrays.get("pos_embed")
    return (
        table is not None and table.ndim == 3 and math.isqrt(table.shape[1]) ** 2 == table.shape[1]
    )


# The first that fits counts; the last fits all.
LAYOUTS = [
    Layout(name_maps.CLIP, ("clip", "openclip"), lambda a: "class_embedding" in a),
    Layout(name_maps.HF_CLIP, ("clip", "openclip"), lambda a: "embeddings.class_embedding" in a),
    Layout(name_maps.HF_SIGLIP, ("siglip",), _is_flexible),
    Layout(name_maps.HF_DINOV3_GATED, ("dinov3",), lambda a: "layer.0.mlp.gate_proj.weight" in a),
    Layout(name_maps.HF_DINOV3, ("dinov3",), lambda a: "embeddings.patch_embeddings.weight" in a),
    Layout(
        name_maps.HF_VIT, ("timm", "synclr"), lambda a: any(".layernorm_before." in n for n in a)
    ),
    Layout(name_maps.HF_DINOV2, ("dinov2",), lambda a: any(n.startswith("embeddings.") for n in a)),
    Layout(name_maps.DINOV3_GATED, ("dinov3",), lambda a: "blocks.0.mlp.w1.weight" in a),
    Layout(
        name_maps.DINOV3, ("dinov3",), lambda a: "storage_tokens" in a or "rope_embed.periods" in a
    ),
    # From here on names that DINOv2, SynCLR and timm share.
    Layout(name_maps.TIMM, ("clip", "openclip"), lambda a: "norm_pre.weight" in a),
    Layout(name_maps.TIMM_MEAN, ("timm",), lambda a: "fc_norm.weight" in a),
    Layout(name_maps.SYNCLR, ("synclr", "timm"), lambda a: not any(".ls1." in name for name in a)),
    Layout(name_maps.TIMM_SWIGLU, ("dinov2",), _is_packed),
    Layout(name_maps.TIMM, ("dinov2",), lambda a: "reg_token" in a),
    Layout(name_maps.TIMM, ("timm",), _is_square),
    Layout(name_maps.DINOV2, ("dinov2",), lambda _: True),
]


def transformers_layout(family: str, spec: ViTSpec) -> NameMap:
    """The names that transformers has for the parameters of such a model."""
    if family in ("clip", "openclip"):
        return name_maps.HF_CLIP
    if family == "siglip":
        return name_maps.HF_SIGLIP
    if family == "dinov3":
        gated = spec.feed_forward == "swiglu"
        return name_maps.HF_DINOV3_GATED if gated else name_maps.HF_DINOV3
    if spec.layer_scale:
        return name_maps.HF_DINOV2
    return name_maps.HF_VIT
