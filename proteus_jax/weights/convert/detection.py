"""Finds out which family a set of arrays belongs to, and its architecture: from names, shapes, and
what a directory of Hugging Face or timm says.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from proteus_jax.errors import InputError
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.normalization import Normalization
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert import name_maps
from proteus_jax.weights.convert.families import FAMILIES, LAYOUTS, NEEDED, Arrays
from proteus_jax.weights.convert.name_maps import NameMap

_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}


# DINOv3's own image size, as its positions have no table to tell it.
_DINOV3_SIDE = 224


# Types of transformers' models: plain ViTs, and those whose names tell the family.
_PLAIN = ("vit", "vit_msn", "vit_mae", "deit", "ijepa")
_TOLD_BY_NAMES = (
    *("dinov2", "dinov2_with_registers", "dinov3_vit", "siglip", "siglip_vision_model"),
    *("siglip2", "siglip2_vision_model"),
)


class Detected(NamedTuple):
    """A model under canonical names, and what it is."""

    family: str
    arrays: Arrays
    spec: ViTSpec
    normalization: Normalization
    # Names that carry nothing a backbone needs.
    ignored_keys: tuple[str, ...]
    layout: NameMap


def detect_architecture(
    arrays: Arrays,
    settings: Mapping[str, Any] | None = None,
    *,
    family: str | None = None,
    heads: int | None = None,
    prefix: str = "",
    grid: tuple[int, int] | None = None,
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
    arrays, plain = _without_decoder(arrays), _is_plain(arrays)
    arrays = _with_distillation_as_register(arrays)
    layout, fitting = _layout(arrays)
    family = family or ("timm" if plain and "timm" in fitting else None)
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
    sides = grid or _configured_grid(settings)
    if sides is not None and sides[0] != sides[1]:
        choices |= {"grid": sides[0], "grid_columns": sides[1]}
    if name == "dinov3" and "grid" not in choices:
        choices["grid"] = max(1, _DINOV3_SIDE // canonical["patch_embed.proj.weight"].shape[-1])
    _refuse_without(name, canonical)
    heads = settings.get("num_attention_heads") if heads is None else heads
    spec = state_dict.infer_spec(canonical, heads, **choices)
    normalization = _configured_normalization(settings) or FAMILIES[name].normalization
    return Detected(name, canonical, spec, normalization, ignored_keys, layout)


# Tokens of DeiT that were taught by a teacher's labels.
_DISTILLATION = {
    "dist_token": ("register_tokens", "pos_embed"),
    "embeddings.distillation_token": (
        "embeddings.register_tokens",
        "embeddings.position_embeddings",
    ),
}


def _is_plain(arrays: Arrays) -> bool:
    """Returns True for what only plain ViTs have: DeiT's second token, MAE's mask token."""
    return bool(_DISTILLATION.keys() & arrays.keys()) or _has_decoders_mask(arrays)


def _has_decoders_mask(arrays: Arrays) -> bool:
    """Returns True where the mask token is that of MAE's decoder, as wide as that."""
    cls, mask = arrays.get("cls_token"), arrays.get("mask_token")
    return cls is not None and mask is not None and mask.shape[-1] != cls.shape[-1]


def _without_decoder(arrays: Arrays) -> Arrays:
    if not _has_decoders_mask(arrays):
        return arrays
    return {name: array for name, array in arrays.items() if name != "mask_token"}


def _with_distillation_as_register(arrays: Arrays) -> Arrays:
    """DeiT's distillation token comes after the class token and has a row of the position table:
    with that row it is a register, which has none.
    """
    tokens = [name for name in _DISTILLATION if name in arrays]
    if not tokens:
        return arrays
    register, table = _DISTILLATION[tokens[0]]
    if table not in arrays or arrays[table].ndim != 3 or arrays[table].shape[1] < 3:
        raise InputError(f"it has a {tokens[0]} and no {table} with a row for it")
    rows = arrays[table]
    token = arrays[tokens[0]].reshape(1, 1, -1) + rows[:, 1:2]
    rest = {name: array for name, array in arrays.items() if name != tokens[0]}
    return rest | {register: token, table: np.concatenate([rows[:, :1], rows[:, 2:]], axis=1)}


def _configured_grid(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of patches, where config.json has two sides of an image."""
    sides, patch = settings.get("image_size"), settings.get("patch_size")
    if not isinstance(sides, list) or len(sides) != 2 or not isinstance(patch, int) or patch < 1:
        return None
    if not all(isinstance(side, int) and side >= patch for side in sides):
        return None
    return sides[0] // patch, sides[1] // patch


def _refuse_without(family: str, arrays: Arrays) -> None:
    """Refuses arrays without what every member of a family has: its absence must not pass for
    another choice.
    """
    for what, array in NEEDED.items():
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
    if kind in _PLAIN:
        return "timm"
    if kind and kind not in _TOLD_BY_NAMES:
        raise InputError(
            f"config.json: a model of the type {kind!r} is not read; those that are: "
            f"{', '.join(sorted({*_PLAIN, *_TOLD_BY_NAMES}))}"
        )
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
    # The gate of a SwiGLU layer has its own.
    if "hidden_act" in settings and settings["hidden_act"] != "silu":
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
