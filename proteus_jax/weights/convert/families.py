"""Which family a set of names belongs to, and what no array tells of it.

Constants of each family are those of its authors' code: facebookresearch/dinov2 and /dinov3,
openai/CLIP, mlfoundations/open_clip, google-research/syn-rep-learn and /big_vision, timm.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from proteus_jax.errors import InputError
from proteus_jax.models import config
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.normalization import CLIP, HALF, IMAGENET, Normalization
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert import name_maps
from proteus_jax.weights.convert.name_maps import NameMap

Arrays = dict[str, np.ndarray]
_WITHOUT_OFFSET: dict[str, Any] = {"interpolate_offset": 0.0, "interpolate_antialias": False}


class Family(NamedTuple):
    """Facts that a family's members have in common and no array says: choices of the architecture,
    channel statistics, and what of _NEEDED they are without.
    """

    choices: Mapping[str, Any]
    normalisation: Normalization
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
_NEEDED = {
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
    Layout(name_maps.HF_DINOV3, ("dinov3",), lambda a: "embeddings.patch_embeddings.weight" in a),
    Layout(
        name_maps.HF_VIT, ("timm", "synclr"), lambda a: any(".layernorm_before." in n for n in a)
    ),
    Layout(name_maps.HF_DINOV2, ("dinov2",), lambda a: any(n.startswith("embeddings.") for n in a)),
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
# The name that every family's patch embedding has: what comes before it is a prefix.
_PATCHES = (
    "patch_embed.proj.weight",
    "conv1.weight",
    "embeddings.patch_embedding.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
)
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# DINOv3's own image size, as its positions have no table to tell it.
_DINOV3_SIDE = 224


class Detected(NamedTuple):
    """A model under canonical names, and what it is."""

    family: str
    arrays: Arrays
    spec: ViTSpec
    normalisation: Normalization
    # Names that carry nothing a backbone needs.
    ignored_keys: tuple[str, ...]
    layout: NameMap


def find_prefix(names: list[str]) -> str:
    """Finds the prefix of all names of the one ViT among the arrays; InputError where there is
    none, or several.
    """
    prefixes = set()
    for name in names:
        for patches in _PATCHES:
            before = name.removesuffix(patches)
            if before != name and (not before or before.endswith(".")):
                prefixes.add(before)
    if not prefixes:
        raise InputError(f"not a ViT: none of its {len(names)} names ends in {', '.join(_PATCHES)}")
    if len(prefixes) > 1:
        raise InputError(
            f"several models in it: choose one by --prefix: {', '.join(sorted(prefixes))}"
        )
    return prefixes.pop()


def detect_architecture(
    arrays: Arrays,
    settings: Mapping[str, Any] | None = None,
    *,
    family: str | None = None,
    heads: int | None = None,
    prefix: str = "",
) -> Detected:
    """Canonical arrays and their spec, from names and shapes, and from the `settings` of a
    Hugging Face or timm directory where there are any.

    InputError where the names fit no family, or several that only `family` can tell apart.
    """
    settings = dict(settings or {})
    # Nothing: DINOv3 without storage tokens, in transformers.
    arrays = {
        name: array
        for name, array in arrays.items()
        if array.size or not name.endswith("register_tokens")
    }
    layout, fitting = _layout(arrays)
    name = _chosen(fitting, family, _configured_family(settings, prefix))
    canonical = layout.to_canonical(arrays)
    ignored_keys = tuple(
        n for n in arrays if layout.ignored_keys and re.fullmatch(layout.ignored_keys, n)
    )
    choices = dict(FAMILIES[name].choices)
    if layout is name_maps.TIMM_MEAN or settings.get("global_pool") == "avg":
        choices |= {"pooling": "mean"}
        if layout is name_maps.TIMM_MEAN:
            choices |= {"final_norm": "class"}
    choices |= _configured_choices(settings)
    if name == "dinov3" and "grid" not in choices:
        choices["grid"] = max(1, _DINOV3_SIDE // canonical["patch_embed.proj.weight"].shape[-1])
    _refuse_without(name, canonical)
    heads = settings.get("num_attention_heads") if heads is None else heads
    spec = state_dict.infer_spec(canonical, heads, **choices)
    normalisation = _configured_normalization(settings) or FAMILIES[name].normalisation
    return Detected(name, canonical, spec, normalisation, ignored_keys, layout)


def _refuse_without(family: str, arrays: Arrays) -> None:
    """Refuses arrays without what every member of a family has: its absence must not pass for
    another choice.
    """
    for what, array in _NEEDED.items():
        if what not in FAMILIES[family].without and array not in arrays:
            raise InputError(f"not a ViT of {FAMILIES[family].title}: it has no {what}")


def _layout(arrays: Arrays) -> tuple[NameMap, tuple[str, ...]]:
    """The layout whose names these are, and the families that use it."""
    layout = next(each for each in LAYOUTS if each.fits(arrays))
    return layout.names, layout.families


def _chosen(fitting: Sequence[str], given: str | None, configured: str | None) -> str:
    name = given or configured
    if name is not None:
        if name not in fitting:
            raise InputError(
                f"these names are those of {' or '.join(fitting)}, not of the family {name}"
            )
        return name
    if len(fitting) > 1:
        kinds = "; ".join(f"--family {name} ({FAMILIES[name].title})" for name in fitting)
        raise InputError(f"the names do not tell the family: give {kinds}")
    return fitting[0]


def _configured_family(settings: Mapping[str, Any], prefix: str) -> str | None:
    """The family by a directory's config.json, or by the prefix that SynCLR's files have."""
    kind, architecture = str(settings.get("model_type", "")), str(settings.get("architecture", ""))
    if "clip" in kind:
        # transformers leaves out of a file what is its default, and QuickGELU is.
        return "openclip" if settings.get("hidden_act", "quick_gelu") == "gelu" else "clip"
    if kind == "vit":
        return "timm"
    if "clip" in architecture:
        return "clip" if "quickgelu" in architecture else "openclip"
    if architecture:
        return "dinov2" if "dinov2" in architecture else "timm"
    return "synclr" if prefix.endswith("module.visual.") else None


def _configured_choices(settings: Mapping[str, Any]) -> dict[str, Any]:
    choices: dict[str, Any] = {}
    if "layer_norm_eps" in settings:
        choices["norm_epsilon"] = float(_number(settings, "layer_norm_eps", 1e-15, 1.0))
    if "num_attention_heads" in settings:
        _number(settings, "num_attention_heads", 1, 4096, whole=True)
    if "hidden_act" in settings:
        activation = _ACTIVATIONS.get(str(settings["hidden_act"]))
        if activation is None:
            raise InputError(
                f"config.json: expected hidden_act to be one of {', '.join(_ACTIVATIONS)}, found "
                f"{settings['hidden_act']!r}"
            )
        choices["activation"] = activation
    if settings.get("model_type") == "dinov3_vit":
        if settings.get("rope_theta", 100.0) != 100.0:
            raise InputError(
                f"config.json: expected rope_theta to be 100, found {settings['rope_theta']!r}"
            )
        side = _number(settings, "image_size", 1, 65536, whole=True)
        choices["grid"] = max(1, int(side // _number(settings, "patch_size", 1, 1024, whole=True)))
    return choices


def _number(
    settings: Mapping[str, Any], name: str, least: float, most: float, *, whole: bool = False
) -> float:
    """A number of config.json; InputError where it is none, or out of reason."""
    value: Any = settings.get(name)
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not least <= value <= most:
        kind = "whole number" if whole else "number"
        raise InputError(
            f"config.json: expected {name} to be a {kind} from {least:g} to {most:g}, found "
            f"{str(value)[:60]!r}"
        )
    return value


def _configured_normalization(settings: Mapping[str, Any]) -> Normalization | None:
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if mean is None and std is None:
        return None
    try:
        return Normalization.checked(mean, std)
    except ValueError as error:
        raise InputError(str(error)) from None


def transformers_layout(family: str, spec: ViTSpec) -> NameMap:
    """The names that transformers has for the parameters of such a model."""
    if family in ("clip", "openclip"):
        return name_maps.HF_CLIP
    if family == "siglip":
        return name_maps.HF_SIGLIP
    if family == "dinov3":
        return name_maps.HF_DINOV3
    if spec.layer_scale:
        return name_maps.HF_DINOV2
    return name_maps.HF_VIT
