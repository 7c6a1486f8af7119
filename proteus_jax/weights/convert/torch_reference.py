"""A model run by transformers in PyTorch: what this package's arithmetic is compared with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from proteus_jax.errors import InputError, refusing
from proteus_jax.models.config import ViTSpec
from proteus_jax.weights.convert import name_maps
from proteus_jax.weights.convert.families import transformers_layout
from proteus_jax.weights.convert.name_maps import Arrays

_HIDDEN_ACT = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
Outputs = dict[str, np.ndarray]


def transformers_settings(family: str, spec: ViTSpec) -> dict[str, Any]:
    """The fields of transformers' configuration of such a model, `model_type` and `architectures`
    among them.
    """
    settings: dict[str, Any] = {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "image_size": spec.grid * spec.patch_size,
        "patch_size": spec.patch_size,
        "layer_norm_eps": spec.norm_epsilon,
        "hidden_act": _HIDDEN_ACT[spec.activation],
        "intermediate_size": spec.hidden,
    }
    layout = transformers_layout(family, spec)
    if layout is name_maps.HF_DINOV2:
        if spec.inner:
            raise InputError(
                f"transformers' Dinov2Model has no feed-forward layer {spec.inner} wide"
            )
        settings |= {"use_swiglu_ffn": spec.feed_forward == "swiglu", "mlp_ratio": 4}
        del settings["intermediate_size"]
        if spec.registers:
            return _of("dinov2_with_registers", "Dinov2WithRegistersModel", settings) | {
                "num_register_tokens": spec.registers
            }
        return _of("dinov2", "Dinov2Model", settings)
    if layout is name_maps.HF_DINOV3:
        kept = {"num_register_tokens": spec.registers, "key_bias": spec.key_bias}
        return _of("dinov3_vit", "DINOv3ViTModel", settings | kept)
    if layout is name_maps.HF_CLIP:
        return _of("clip_vision_model", "CLIPVisionModel", settings)
    if layout is name_maps.HF_SIGLIP:
        return _of("siglip_vision_model", "SiglipVisionModel", settings)
    return _of("vit", "ViTModel", settings)


def _of(model_type: str, architecture: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture]} | settings


def transformers_arrays(family: str, spec: ViTSpec, arrays: Arrays) -> Arrays:
    """Canonical arrays under the names of transformers' class for it. InputError where that class
    cannot hold them.
    """
    layout = transformers_layout(family, spec)
    arrays = dict(arrays)
    if layout in (name_maps.HF_CLIP, name_maps.HF_SIGLIP, name_maps.HF_VIT):
        # No place for it there, nor any use of it.
        arrays.pop("mask_token", None)
    if spec.class_token and not spec.class_position and "pos_embed" in arrays:
        table = arrays["pos_embed"]
        arrays["pos_embed"] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    return layout.from_canonical(arrays, key_bias=spec.key_bias)


def transformers_outputs(
    family: str, spec: ViTSpec, arrays: Arrays, pixels: Float[np.ndarray, "b h w 3"]
) -> Outputs:
    """Every block's tokens, the class token and the patches, of normalized images."""
    torch, transformers = _libraries()
    settings = transformers_settings(family, spec)
    kind = getattr(transformers, settings["architectures"][0])
    config = kind.config_class(**settings)
    weights = {
        name: torch.from_numpy(np.array(array))
        for name, array in transformers_arrays(family, spec, arrays).items()
    }
    if "embeddings.cls_token" in weights and spec.layer_scale:
        shape = (1, 1, spec.width) if family == "dinov3" else (1, spec.width)
        weights.setdefault("embeddings.mask_token", torch.zeros(shape))
    transformers.utils.logging.disable_progress_bar()
    extra = {"add_pooling_layer": False} if settings["model_type"] == "vit" else {}
    # from_pretrained and not load_state_dict: newer releases name modules otherwise than the files
    # they read.
    with refusing("transformers does not take these weights"):
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, **extra
        )
    wrong = [
        name
        for reason in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in loading[reason]
        # DINOv3 without storage tokens has an array of none, which a file need not hold.
        if not (str(name).endswith("register_tokens") and not spec.registers)
    ]
    if wrong:
        raise InputError(
            f"transformers does not take these weights: {len(wrong)} names differ, as {wrong[0]}"
        )
    return run_transformers(model, spec, pixels)


def directory_outputs(folder: Path, spec: ViTSpec, pixels: Float[np.ndarray, "b h w 3"]) -> Outputs:
    """Outputs as of `transformers_outputs`, of a directory that it can open by itself."""
    _, transformers = _libraries()
    transformers.utils.logging.disable_progress_bar()
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    extra = {"add_pooling_layer": False} if architecture == "ViTModel" else {}
    with refusing(f"{folder}: transformers does not take it"):
        model = getattr(transformers, architecture).from_pretrained(folder, **extra)
    return run_transformers(model, spec, pixels)


def refuse_what_torch_reads_otherwise(path: Path, arrays: Arrays) -> None:
    """InputError unless `torch.load`, which runs nothing, finds the same bits under the same names
    in a file.
    """
    torch, _ = _libraries()
    with refusing(f"{path}: PyTorch does not read it"):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    same = loaded.keys() == arrays.keys() and all(
        loaded[name].numpy().tobytes() == array.tobytes() for name, array in arrays.items()
    )
    if not same:
        raise InputError(f"{path}: PyTorch reads something else in it")


def run_transformers(model: Any, spec: ViTSpec, pixels: Float[np.ndarray, "b h w 3"]) -> Outputs:
    """The outputs of a model of transformers that is loaded already."""
    torch, _ = _libraries()
    with torch.no_grad():
        inputs = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        result = model.eval()(inputs, output_hidden_states=True)
    blocks = result.hidden_states[1 : spec.depth + 1]
    outputs = {f"block {number}": tokens for number, tokens in enumerate(blocks)}
    final = result.last_hidden_state
    pooled = getattr(result, "pooler_output", None)
    if spec.pooling == "mean":
        raw = blocks[-1][:, spec.prefix :]
        mean = (final if spec.final_norm == "tokens" else raw)[:, -raw.shape[1] :].mean(dim=1)
        norm = model.layernorm
        cls = mean if spec.final_norm == "tokens" else norm(mean)
        final = final if spec.final_norm == "tokens" else blocks[-1]
    elif spec.pooling == "attention" or spec.final_norm == "class":
        cls = pooled
    else:
        cls = final[:, 0]
    outputs |= {"class token": cls, "patches": final[:, spec.prefix :]}
    return {name: value.detach().numpy() for name, value in outputs.items()}


def timm_outputs(
    spec: ViTSpec, arrays: Arrays, pixels: Float[np.ndarray, "b h w 3"]
) -> Outputs | None:
    """The class token and the patches as timm computes them; None where timm is not there, or has
    no such model.
    """
    try:
        import timm.layers
        import timm.models.vision_transformer as timm_vit
        import torch
    except (ImportError, RuntimeError, AttributeError):
        # Beside a torch of another build torchvision fails to load, and timm with it.
        return None
    return run_timm(timm_vit, timm.layers, torch, spec, timm_arrays(spec, arrays), pixels)


def run_timm(
    timm_vit: Any, timm_layers: Any, torch: Any, spec: ViTSpec, arrays: Arrays, pixels: np.ndarray
) -> Outputs:
    """See `timm_outputs`; `arrays` under timm's names."""
    swiglu = spec.feed_forward == "swiglu"
    # timm counts gate and value of a packed feed-forward layer together.
    hidden = 2 * spec.hidden if swiglu else spec.hidden
    model = timm_vit.VisionTransformer(
        img_size=spec.grid * spec.patch_size,
        patch_size=spec.patch_size,
        embed_dim=spec.width,
        depth=spec.depth,
        num_heads=spec.heads,
        mlp_ratio=hidden / spec.width,
        init_values=1.0 if spec.layer_scale else None,
        class_token=spec.class_token,
        no_embed_class=bool(spec.registers) or not spec.class_position,
        reg_tokens=spec.registers,
        pre_norm=spec.pre_norm,
        num_classes=0,
        global_pool="avg" if spec.pooling == "mean" else "token",
        fc_norm=spec.final_norm == "class" and spec.pooling == "mean",
        act_layer="silu" if swiglu else spec.activation,
        mlp_layer=timm_layers.SwiGLUPacked if swiglu else timm_layers.Mlp,
        norm_layer=lambda width, **_: torch.nn.LayerNorm(width, eps=spec.norm_epsilon),
    )
    weights = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        inputs = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        tokens = model.eval().forward_features(inputs)
        cls = model.forward_head(tokens, pre_logits=True)
    return {"class token": cls.numpy(), "patches": tokens[:, spec.prefix :].numpy()}


def timm_arrays(spec: ViTSpec, arrays: Arrays) -> Arrays:
    """Canonical arrays under timm's names. A model with registers has no class entry in its table
    there: the entry goes to the class token, to which it is added anyway.
    """
    layout = timm_layout(spec)
    arrays = {name: array for name, array in arrays.items() if name != "mask_token"}
    if spec.registers and spec.class_position:
        table = arrays["pos_embed"]
        arrays["cls_token"] = arrays["cls_token"] + table[:, :1]
        arrays["pos_embed"] = np.ascontiguousarray(table[:, 1:])
    return layout.from_canonical(arrays)


def timm_layout(spec: ViTSpec) -> name_maps.NameMap:
    """InputError where timm's ViT has no such model."""
    fits = (
        spec.positions == "table"
        and spec.key_bias
        and spec.pooling != "attention"
        and (spec.final_norm == "tokens" or spec.pooling == "mean")
        and spec.patch_bias is not spec.pre_norm
    )
    if not fits:
        raise InputError("timm's plain ViT has no place for this model's parts")
    if spec.feed_forward == "swiglu":
        return name_maps.TIMM_SWIGLU
    return name_maps.TIMM_MEAN if spec.final_norm == "class" else name_maps.TIMM


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError:
        raise InputError(
            "comparing with PyTorch needs torch and transformers: pip install -r "
            "requirements-parity.txt; an export with --no-check goes without"
        ) from None
    return torch, transformers
