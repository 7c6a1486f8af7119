"""How others name a ViT's parameters, and this project's names (canonical.py): tables, and one way
to read them in either direction.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from proteus_jax.errors import InputError

Arrays = dict[str, np.ndarray]
QKV = "attn.qkv"
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NameMap:
    """One set of names. Tables go from canonical names to the others'; modules stand for their
    weight and bias.

    `block` begins the names of a block. `qkv` names one module, or three. `axes` says how many axes
    an array has there, where the canonical one has others of length one in front.
    """

    block: str
    modules: dict[str, str]
    block_modules: dict[str, str]
    qkv: Sequence[str]
    arrays: dict[str, str] = dataclasses.field(default_factory=dict)
    block_arrays: dict[str, str] = dataclasses.field(default_factory=dict)
    axes: dict[str, int] = dataclasses.field(default_factory=dict)
    # Modules of a block that are several of theirs, one after the other.
    merged: dict[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    # Names without a counterpart, which carry nothing that a backbone needs.
    ignored_keys: str = ""

    def to_canonical(self, arrays: Arrays) -> Arrays:
        """Canonical names; query, key and value become one. What is not known keeps its name, so
        that a strict reader lists it.
        """
        layers = {int(found[1]) for name in arrays if (found := self._number.match(name))}
        ours = {theirs: name for name, theirs in self._pairs(sorted(layers))}
        result: Arrays = {}
        parts: dict[str, dict[int, np.ndarray]] = {}
        for name, array in arrays.items():
            if self.ignored_keys and re.fullmatch(self.ignored_keys, name):
                continue
            whole, _, part = ours.get(name, name).partition("#")
            if part:
                parts.setdefault(whole, {})[int(part)] = array
            else:
                result[whole] = _with_axes(array, self._canonical_axes(whole, array))
        for whole, found in parts.items():
            if whole.endswith(f"{QKV}.bias") and 1 not in found and len(found) == 2:
                # DINOv3 has no bias of keys: a constant 0, which the model never reads.
                found[1] = np.zeros_like(found[0])
            names = self._parts_of(whole)
            missing = [name for part, name in enumerate(names) if part not in found]
            if missing:
                raise InputError(f"{whole}: its part {' and '.join(missing)} is missing")
            shapes = [list(found[part].shape) for part in range(len(names))]
            if any(shape != shapes[0] for shape in shapes):
                raise InputError(f"{whole}: its parts differ in shape: {shapes}")
            result[whole] = np.concatenate([found[part] for part in range(len(names))])
        return result

    def from_canonical(self, arrays: Arrays, *, key_bias: bool = True) -> Arrays:
        """The inverse: their names and shapes. InputError for what they have no name for."""
        layers = {int(match[1]) for name in arrays if (match := _BLOCK.match(name))}
        theirs = dict(self._pairs(sorted(layers)))
        result: Arrays = {}
        for name, array in arrays.items():
            if name in theirs:
                result[theirs[name]] = _with_axes(array, self.axes.get(name, array.ndim))
            elif f"{name}#0" in theirs:
                count = len(self._parts_of(name))
                if not array.ndim or array.shape[0] % count:
                    raise InputError(f"{name}: expected {count} parts, found {list(array.shape)}")
                for part, values in enumerate(np.split(array, count)):
                    if part != 1 or key_bias or not name.endswith(f"{QKV}.bias"):
                        result[theirs[f"{name}#{part}"]] = np.ascontiguousarray(values)
            else:
                raise InputError(f"{name}: there is no such parameter in that layout")
        return result

    def _parts_of(self, name: str) -> Sequence[str]:
        """The modules whose parameters, one after the other, are one of ours."""
        module = name.rpartition(".")[0].split(".", 2)[-1]
        return self.merged.get(module, self.qkv)

    @property
    def _number(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.block).replace(r"\{\}", r"(\d{1,4})"))

    def _canonical_axes(self, name: str, array: np.ndarray) -> int:
        return CANONICAL_AXES.get(name, array.ndim) if name in self.axes else array.ndim

    def _pairs(self, layers: Sequence[int]) -> Iterator[tuple[str, str]]:
        """(canonical name, their name) of every parameter; a part of a qkv as NAME#0, #1, #2."""
        yield from _parameters(self.modules)
        yield from self.arrays.items()
        inside = dict(_parameters(self.block_modules)) | dict(self.block_arrays)
        if len(self.qkv) == 1:
            inside |= dict(_parameters({QKV: self.qkv[0]}))
        else:
            for part, module in enumerate(self.qkv):
                inside |= {f"{ours}#{part}": theirs for ours, theirs in _parameters({QKV: module})}
        for module, several in self.merged.items():
            for part, each in enumerate(several):
                inside |= {f"{ours}#{part}": theirs for ours, theirs in _parameters({module: each})}
        for layer in layers:
            for ours, theirs in inside.items():
                yield f"blocks.{layer}.{ours}", self.block.format(layer) + theirs


# Where a layout says how many axes it has, the canonical array has these.
CANONICAL_AXES = {"cls_token": 3, "pos_embed": 3, "mask_token": 2, "register_tokens": 3}


def _parameters(modules: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Weight and bias of each module. A module that ends in _ joins them by itself: in_proj_weight,
    not in_proj.weight.
    """
    for ours, theirs in modules.items():
        for parameter in ("weight", "bias"):
            joint = "" if theirs.endswith("_") else "."
            yield f"{ours}.{parameter}", f"{theirs}{joint}{parameter}"


def _with_axes(array: np.ndarray, count: int) -> np.ndarray:
    """Adds axes of length one in front, up to so many."""
    if array.ndim == count:
        return array
    while array.ndim > count and array.shape[0] == 1:
        array = array[0]
    return array.reshape((1,) * (count - array.ndim) + array.shape)


_PLAIN_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SCALES = {"ls1.gamma": "ls1.gamma", "ls2.gamma": "ls2.gamma"}
_TOKENS = {name: name for name in CANONICAL_AXES}
_CLASSIFIER = r"head(_dist)?\.(weight|bias)"
_HF_POOL = {
    "pool.qkv": "head.attention.in_proj_",
    "pool.proj": "head.attention.out_proj",
    "pool.norm": "head.layernorm",
    "pool.mlp.fc1": "head.mlp.fc1",
    "pool.mlp.fc2": "head.mlp.fc2",
}
_HF_SCALES = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
_HF_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
_HF_TOKENS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
}

DINOV2 = NameMap(
    block="blocks.{}.",
    modules={"patch_embed.proj": "patch_embed.proj", "norm": "norm"},
    block_modules=_PLAIN_BLOCK | {"mlp.w12": "mlp.w12", "mlp.w3": "mlp.w3"},
    qkv=["attn.qkv"],
    arrays=_TOKENS,
    block_arrays=_SCALES,
)
# The authors' SynCLR; its mask token has three axes.
SYNCLR = dataclasses.replace(DINOV2, axes={"mask_token": 3}, ignored_keys=_CLASSIFIER)
# Packed: gate and value are one fc1.
TIMM_SWIGLU = dataclasses.replace(
    DINOV2,
    block_modules=_PLAIN_BLOCK | {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"},
    arrays=_TOKENS | {"register_tokens": "reg_token"},
)
TIMM = dataclasses.replace(
    DINOV2,
    modules=DINOV2.modules | {"norm_pre": "norm_pre"},
    block_modules=_PLAIN_BLOCK,
    arrays=_TOKENS | {"register_tokens": "reg_token"},
    ignored_keys=_CLASSIFIER,
)
# Average pooling: its one norm comes after the mean.
TIMM_MEAN = dataclasses.replace(TIMM, modules=TIMM.modules | {"norm": "fc_norm"})
DINOV3 = dataclasses.replace(
    DINOV2,
    arrays=_TOKENS | {"register_tokens": "storage_tokens"},
    ignored_keys=r"rope_embed\.periods|blocks\.\d+\.attn\.qkv\.bias_mask",
)
# The gate and the values of DINOv3's largest models are two modules.
DINOV3_GATED = dataclasses.replace(
    DINOV3,
    block_modules={n: m for n, m in _PLAIN_BLOCK.items() if not n.startswith("mlp.")}
    | {"mlp.w3": "mlp.w3"},
    merged={"mlp.w12": ("mlp.w1", "mlp.w2")},
)
CLIP = NameMap(
    block="transformer.resblocks.{}.",
    modules={"patch_embed.proj": "conv1", "norm_pre": "ln_pre", "norm": "ln_post"},
    block_modules={
        "norm1": "ln_1",
        "attn.proj": "attn.out_proj",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
    qkv=["attn.in_proj_"],
    arrays={
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "mask_token": "mask_token",
    },
    axes={"cls_token": 1, "pos_embed": 2},
    ignored_keys="proj",
)
HF_DINOV2 = NameMap(
    block="encoder.layer.{}.",
    modules={"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"},
    block_modules={
        "norm1": "norm1",
        "attn.proj": "attention.output.dense",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.weights_out",
    },
    qkv=_HF_QKV,
    arrays=_HF_TOKENS,
    block_arrays=_HF_SCALES,
    ignored_keys=r"classifier\.(weight|bias)",
)
HF_VIT = dataclasses.replace(
    HF_DINOV2,
    block_modules={
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    block_arrays={},
    axes={"mask_token": 3},
    ignored_keys=r"classifier\.(weight|bias)|pooler\.dense\.(weight|bias)",
)
_HF_CLIP_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
HF_CLIP = NameMap(
    block="encoder.layers.{}.",
    modules={
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm_pre": "pre_layrnorm",
        "norm": "post_layernorm",
    },
    block_modules=_HF_CLIP_BLOCK,
    qkv=tuple(f"self_attn.{part}_proj" for part in "qkv"),
    arrays={
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight",
    },
    axes={"cls_token": 1, "pos_embed": 2},
    ignored_keys=r"embeddings\.position_ids",
)
HF_SIGLIP = dataclasses.replace(
    HF_CLIP,
    modules={
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
        **_HF_POOL,
    },
    arrays={"pos_embed": "embeddings.position_embedding.weight", "pool.probe": "head.probe"},
    axes={"pos_embed": 2},
)
HF_DINOV3 = NameMap(
    block="layer.{}.",
    modules={"patch_embed.proj": "embeddings.patch_embeddings", "norm": "norm"},
    block_modules={
        "norm1": "norm1",
        "attn.proj": "attention.o_proj",
        "norm2": "norm2",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    },
    qkv=tuple(f"attention.{part}_proj" for part in "qkv"),
    arrays={name: theirs for name, theirs in _HF_TOKENS.items() if name != "pos_embed"},
    block_arrays=_HF_SCALES,
    axes={"mask_token": 3},
)
HF_DINOV3_GATED = dataclasses.replace(
    HF_DINOV3,
    block_modules={n: m for n, m in HF_DINOV3.block_modules.items() if not n.startswith("mlp.")}
    | {"mlp.w3": "mlp.down_proj"},
    merged={"mlp.w12": ("mlp.gate_proj", "mlp.up_proj")},
)
