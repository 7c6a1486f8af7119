"""Which arrays of a file are the backbone: training code saves it among heads, averages, losses
and optimizers, below keys and prefixes of all kinds.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from proteus_jax.errors import InputError

# The name that every family's patch embedding has: what comes before it is a prefix.
PATCHES = (
    "patch_embed.proj.weight",
    "conv1.weight",
    "embeddings.patch_embedding.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
)
# What torch.compile, FSDP and activation checkpointing put into names, anywhere.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
# Keys under which an average of the weights is saved.
_AVERAGES = re.compile(r"(^|_)(ema|swa|avg|averaged?|shadow|teacher|momentum)($|_)")
# First parts of names that some family has.
_OWN = frozenset(
    ("patch_embed", "cls_token", "pos_embed", "mask_token", "register_tokens", "reg_token",
     "storage_tokens", "dist_token", "rope_embed", "blocks", "norm", "norm_pre", "fc_norm",
     "embeddings", "encoder", "layernorm", "layer", "conv1", "class_embedding", "transformer",
     "positional_embedding", "ln_pre", "ln_post", "proj", "pre_layrnorm", "post_layernorm")
)  # fmt: skip
# Words in the first part of names of what is built on a backbone, or beside it.
_BESIDE = re.compile(
    r"head|proj|predict|decod|loss|center|classif|queue|criter|optim|text|logit|contrast|momentum"
    r"|pooler|^fc\d*$"
)
# Of SigLIP's pooling, which is no head.
_POOLING = re.compile(r"head\.(probe|attention|layernorm|mlp)")
# Blocks in chunks, as DINOv2 saves those that FSDP shards: blocks.<chunk>.<block>.
_CHUNKED = re.compile(r"blocks\.(\d{1,4})\.(\d{1,4})\.(.+)")
# Models whose names are known, and which are none of the families that are read.
_OTHERS = {
    r"relative_position_(bias_)?table": "Swin or BEiT, with relative positions",
    r"stages\.\d+\.": "ConvNeXt or another model of stages",
    r"(^|\.)layer[1-4]\.\d+\.conv\d": "ResNet",
    r"\.attn\.[qk]_norm\.": "a ViT with norms of queries and keys",
    r"\.mlp\.fc1_g\.": "EVA-02",
    r"\.gamma_[12]$": "BEiT or CaiT",
    r"(^|\.)dist_head|tokens_to_token": "T2T",
}


class Choice(NamedTuple):
    """The arrays of a backbone: the prefix of their names, the names that are used by those in the
    file, and names below the prefix that are beside it.
    """

    prefix: str
    names: dict[str, str]
    ignored: tuple[str, ...]


def choose(names: Iterable[str], prefix: str | None = None, key: str | None = None) -> Choice:
    """Chooses the one backbone among arrays; `prefix` or a `key` on the way to it where there are
    several.

    InputError lists the choices, and says which are averages.
    """
    plain = {name: _WRAPPERS.sub("", name).removeprefix(".") for name in names}
    before = find_prefix(list(plain.values()), prefix, key)
    below = {
        name: text.removeprefix(before) for name, text in plain.items() if text.startswith(before)
    }
    pooled = any(_POOLING.match(text) for text in below.values())
    ignored = tuple(name for name, text in below.items() if _is_beside(text, pooled))
    used = {name: text for name, text in below.items() if name not in ignored}
    return Choice(before, _unrolled(used), ignored)


def find_prefix(names: Sequence[str], prefix: str | None = None, key: str | None = None) -> str:
    """Finds what comes before the names of a backbone, with its last dot."""
    prefixes = {
        before
        for name in names
        for patches in PATCHES
        if (before := name.removesuffix(patches)) != name and (not before or before[-1] == ".")
    }
    if not prefixes or _of_another_family(names):
        other = _of_another_family(names)
        kind = f" (they look like those of {other})" if other else ""
        ends = ", ".join(PATCHES)
        raise InputError(f"not a ViT: none of its {len(names)} names ends in {ends}{kind}")
    wanted = prefixes
    if prefix is not None:
        wanted = {each for each in prefixes if _ends_with(each, prefix)}
    if key is not None:
        wanted = {each for each in wanted if f".{key}." in f".{each}"}
    if len(wanted) == 1:
        return wanted.pop()
    if not wanted:
        place = f"begins with {prefix!r}" if prefix is not None else f"lies below {key!r}"
        raise InputError(f"no name {place}; the models in it are {_listed(prefixes)}")
    raise InputError(f"several models in it: choose one by {_listed(wanted)}")


def _ends_with(whole: str, prefix: str) -> bool:
    """Whether a prefix is the one that is meant, perhaps below keys that need no naming."""
    ending = prefix if prefix.endswith(".") or not prefix else f"{prefix}."
    return whole == ending or (bool(ending) and whole.endswith(f".{ending}"))


def _listed(prefixes: Iterable[str]) -> str:
    """The choices, as options: by the one key that no other has, or by the whole prefix."""
    parts = {each: each.rstrip(".").split(".") for each in sorted(prefixes)}
    texts = []
    for each, own in parts.items():
        others = {part for other, theirs in parts.items() if other != each for part in theirs}
        key = next((part for part in own if part and part not in others), None)
        average = next((part for part in own if _AVERAGES.search(part)), None)
        notes = [f"{each or 'no prefix'}", *([f"{average} is an average"] * (average is not None))]
        option = f"--key {key}" if key else f"--prefix {each or repr('')}"
        texts.append(f"{option} ({', '.join(notes)})")
    return ", ".join(texts)


def _of_another_family(names: Iterable[str]) -> str | None:
    """What a file's names look like, where that is no family that is read."""
    names = list(names)
    for pattern, kind in _OTHERS.items():
        if any(re.search(pattern, name) for name in names):
            return kind
    return None


def _is_beside(name: str, pooled: bool) -> bool:
    root = name.split(".")[0]
    if root in _OWN or (pooled and root == "head"):
        return False
    return _BESIDE.search(root) is not None


def _unrolled(names: Mapping[str, str]) -> dict[str, str]:
    """Names whose blocks are numbered through, where they are in chunks."""
    chunked = {name: match for name, text in names.items() if (match := _CHUNKED.fullmatch(text))}
    blocks = [name for name, text in names.items() if text.startswith("blocks.")]
    if not blocks or len(chunked) < len(blocks):
        return dict(names)
    places = sorted({(int(match[1]), int(match[2])) for match in chunked.values()})
    inner = [block for _, block in places]
    # DINOv2 counts through; other code begins anew in each chunk.
    through = len(set(inner)) == len(inner)
    number = {place: place[1] if through else at for at, place in enumerate(places)}
    return {
        name: f"blocks.{number[int(match[1]), int(match[2])]}.{match[3]}"
        if (match := chunked.get(name))
        else text
        for name, text in names.items()
    }
