"""Finds out which family a set of arrays belongs to, and its architecture: from names, shapes, and
what a directory of Hugging Face or timm says.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from proteus_jax.errors import InputError
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.normalization import Normalization
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert import name_maps
from proteus_jax.weights.convert.families import FAMILIES, LAYOUTS, NEEDED, Arrays
from proteus_jax.weights.convert.name_maps import NameMap

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
    normalization: Normalization
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
    normalization = _configured_normalization(settings) or FAMILIES[name].normalization
    return Detected(name, canonical, spec, normalization, ignored_keys, layout)


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
