"""The formats that a model is exported in: how each is written, and how it is read back."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import UInt8

from proteus_jax.errors import InputError
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.models.pos_embed import resize_position_table
from proteus_jax.weights import state_dict
from proteus_jax.weights.convert import (
    name_maps,
    onnx_writer,
    torch_reference,
    torch_writer,
)
from proteus_jax.weights.convert.import_weights import read_model
from proteus_jax.weights.convert.name_maps import Arrays
from proteus_jax.weights.convert.parity import our_outputs
from proteus_jax.weights.convert.readers import CARD_KEY, read_weights
from proteus_jax.weights.convert.torch_reference import Outputs
from proteus_jax.weights.model_card import transformers_text
from proteus_jax.weights.model_dir import OPTIONAL, README, ModelCard

# More of either would not fit where it has to be tried.
LARGEST_SIDE, LARGEST_BATCH = 4096, 1024


class ExportSource(NamedTuple):
    """A model to export: canonical arrays, those that it has in truth, and what they are."""

    directory: Path
    params: Params
    card: ModelCard
    arrays: Arrays

    @property
    def spec(self) -> ViTSpec:
        """The sizes of the model."""
        return self.card.spec

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [b, h, w, 3] in the model's statistics, float32."""
        return np.asarray(self.card.normalization(jnp.asarray(images)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Height and width of images in pixels and batch size; None for the table's own, and for any
    batch.
    """

    sides: tuple[int, int] | None = None
    batch: int | None = None

    def sides_of(self, spec: ViTSpec) -> tuple[int, int]:
        """The height and the width that are meant."""
        rows, columns = spec.table_shape
        sides = self.sides or (rows * spec.patch_size, columns * spec.patch_size)
        for side in sides:
            if not spec.patch_size <= side <= LARGEST_SIDE or side % spec.patch_size:
                raise InputError(
                    f"--size: expected a multiple of the patch size {spec.patch_size} up to "
                    f"{LARGEST_SIDE}, found {side}"
                )
        return sides


class Format(NamedTuple):
    """How a format is written to a path, and what its own library makes of it."""

    write: Callable[[ExportSource, Path, Settings], None]
    outputs: Callable[[ExportSource, Path, UInt8[np.ndarray, "b h w 3"]], Outputs]
    suffixes: tuple[str, ...]


def _save(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> None:
    arrays = {name: np.asarray(array, np.float32, order="C") for name, array in arrays.items()}
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path, metadata)
        return
    torch_writer.save(path, arrays)


def _read_back(subject: ExportSource, path: Path) -> Arrays:
    """Canonical arrays of a file that was written, which PyTorch must read as this project does."""
    if path.suffix == ".pth":
        torch_reference.refuse_what_torch_reads_otherwise(path, read_weights(path).arrays)
    model, _ = read_model(path, family=subject.card.family, heads=subject.spec.heads)
    return model.arrays


def _by_transformers(subject: ExportSource, path: Path, images: np.ndarray) -> Outputs:
    return torch_reference.transformers_outputs(
        subject.card.family, subject.spec, _read_back(subject, path), subject.pixels(images)
    )


def _write_own(subject: ExportSource, path: Path, _: Settings) -> None:
    _save(path, subject.arrays, {CARD_KEY: json.dumps(subject.card.to_json())})


def _own_outputs(subject: ExportSource, path: Path, images: np.ndarray) -> Outputs:
    model, _ = read_model(path)
    params = state_dict.to_params(model.arrays, model.spec, optional=subject.card.absent)
    return our_outputs(params, model.spec, subject.pixels(images))


def _write_dinov2(subject: ExportSource, path: Path, _: Settings) -> None:
    spec = subject.spec
    plain = dataclasses.replace(
        ViTSpec(width=spec.width, depth=spec.depth, heads=spec.heads),
        **{name: getattr(spec, name) for name in _FREE},
    )
    if spec != plain or subject.card.family != "dinov2":
        raise InputError(
            f"{subject.directory}: a model of the family {subject.card.family}, which DINOv2's "
            "code cannot hold"
        )
    # The official model has a mask token, whether it was trained or not.
    _save(path, state_dict.from_params(subject.params, spec))


# What may differ among DINOv2's models.
_FREE = (
    *("patch_size", "grid", "feed_forward", "registers"),
    *("interpolate_offset", "interpolate_antialias"),
)


def _write_synclr(subject: ExportSource, path: Path, _: Settings) -> None:
    spec = subject.spec
    plain = ViTSpec(width=spec.width, depth=spec.depth, heads=spec.heads)
    alike = not spec.layer_scale and spec.pooling == "token" and spec.class_position
    alike = alike and (spec.norm_epsilon, spec.activation) == (plain.norm_epsilon, "gelu")
    if subject.card.family not in ("synclr", "timm") or not alike:
        raise InputError(
            f"{subject.directory}: a model of the family {subject.card.family}, not SynCLR's"
        )
    _save(path, name_maps.SYNCLR.from_canonical(subject.arrays))


def _write_clip(subject: ExportSource, path: Path, _: Settings) -> None:
    if subject.card.family not in ("clip", "openclip"):
        raise InputError(
            f"{subject.directory}: a model of the family {subject.card.family}, not CLIP's"
        )
    _save(path, name_maps.CLIP.from_canonical(subject.arrays))


def _write_timm(subject: ExportSource, path: Path, _: Settings) -> None:
    _save(path, torch_reference.timm_arrays(subject.spec, subject.arrays))


def _timm_outputs(subject: ExportSource, path: Path, images: np.ndarray) -> Outputs:
    """Outputs of the file: by our own reading in any case, by timm where it can be imported."""
    spec, pixels = subject.spec, subject.pixels(images)
    model, _ = read_model(path, family=subject.card.family, heads=spec.heads)
    choices = {"interpolate_offset": spec.interpolate_offset, "grid": spec.grid}
    choices["interpolate_antialias"] = spec.interpolate_antialias
    read = dataclasses.replace(model.spec, **choices)
    params = state_dict.to_params(model.arrays, read, optional=OPTIONAL)
    return our_outputs(params, read, pixels) | (
        torch_reference.timm_outputs(read, model.arrays, pixels) or {}
    )


def _write_huggingface(subject: ExportSource, folder: Path, settings: Settings) -> None:
    if settings.sides is not None and settings.sides[0] != settings.sides[1]:
        raise InputError("--size: expected one side, as transformers' tables are squares")
    subject = with_table_of(subject, settings.sides_of(subject.spec))
    card, spec = subject.card, subject.spec
    arrays = subject.arrays
    if spec.pooling == "mean":
        raise InputError(f"{subject.directory}: transformers has no model that averages patches")
    if spec.layer_scale or card.family == "dinov3":
        # There it has one, whether it was trained or not.
        arrays = state_dict.from_params(subject.params, spec)
    theirs = torch_reference.transformers_arrays(card.family, spec, arrays)
    _save(folder / "model.safetensors", theirs, {"format": "pt"})
    described = torch_reference.transformers_settings(card.family, spec)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    side = spec.grid * spec.patch_size
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(side * 256 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(card.normalization.mean),
        "image_std": list(card.normalization.std),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    text = transformers_text(card, subject.directory.name, settings.sides is not None)
    before = subject.directory / README
    if before.is_file():
        # Without the front matter, which comes once.
        text += "\n" + re.sub(r"\A---\n.*?\n---\n", "", before.read_text(), flags=re.DOTALL)
    (folder / README).write_text(text)


def _huggingface_outputs(subject: ExportSource, folder: Path, images: np.ndarray) -> Outputs:
    subject = with_table_of(subject, (images.shape[1], images.shape[2]))
    return torch_reference.directory_outputs(folder, subject.spec, subject.pixels(images))


def _table(subject: ExportSource, sides: tuple[int, int]) -> np.ndarray | None:
    spec = subject.spec
    if spec.positions != "table":
        return None
    rows, columns = (side // spec.patch_size for side in sides)
    return np.asarray(
        resize_position_table(jnp.asarray(subject.params["pos_embed"]), spec, (rows, columns))
    )


def with_table_of(subject: ExportSource, sides: tuple[int, int]) -> ExportSource:
    """The same model with the position table of images of other sides as its own."""
    table = _table(subject, sides)
    if table is None or sides == Settings().sides_of(subject.spec):
        return subject
    rows, columns = (side // subject.spec.patch_size for side in sides)
    spec = dataclasses.replace(
        subject.spec, grid=rows, grid_columns=0 if rows == columns else columns
    )
    return subject._replace(
        params=dict(subject.params) | {"pos_embed": table},
        arrays=dict(subject.arrays) | {"pos_embed": table},
        card=dataclasses.replace(subject.card, spec=spec),
    )


def _write_onnx(subject: ExportSource, path: Path, settings: Settings) -> None:
    import onnx

    sides = settings.sides_of(subject.spec)
    model = onnx_writer.model_of(
        subject.spec, subject.arrays, _table(subject, sides), sides, settings.batch
    )
    statistics = subject.card.normalization
    facts = {
        "normalisation": json.dumps({"mean": statistics.mean, "std": statistics.std}),
        "licence": subject.card.license,
    }
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)


def _onnx_outputs(subject: ExportSource, path: Path, images: np.ndarray) -> Outputs:
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            "an ONNX file is checked with onnxruntime: pip install -r requirements-parity.txt"
        ) from None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = np.ascontiguousarray(subject.pixels(images).transpose(0, 3, 1, 2))
    outputs = session.run(["class_token", "patch_tokens"], {"pixel_values": pixels})
    return dict(zip(("class token", "patches"), map(np.asarray, outputs), strict=True))


def _write_stablehlo(subject: ExportSource, path: Path, settings: Settings) -> None:
    """Images uint8 [batch, height, width, 3] -> Features' class token, patches and registers; runs
    on CPUs, GPUs and TPUs.
    """
    backbone, normalize = BackboneFunction(subject.spec), subject.card.normalization
    params = jax.tree.map(jnp.asarray, subject.params)

    def of_one(image: jax.Array) -> tuple[jax.Array, ...]:
        features = backbone(params, normalize(image[None]))
        return tuple(part[0] for part in features)

    sides = settings.sides_of(subject.spec)
    (batch,) = (settings.batch,) if settings.batch else jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *sides, 3), jnp.uint8)
    with jax.default_matmul_precision("highest"):
        # One image under vmap: the number of images stays open.
        program = jax.export.export(jax.jit(jax.vmap(of_one)), platforms=("cpu", "cuda", "tpu"))
        path.write_bytes(program(shape).serialize())


def _stablehlo_outputs(_: ExportSource, path: Path, images: np.ndarray) -> Outputs:
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    cls, patches, _registers = program.call(jnp.asarray(images))
    return {"class token": np.asarray(cls), "patches": np.asarray(patches)}


HUGGINGFACE = "huggingface"
_ARRAYS, _TORCH = (".safetensors", ".pth"), (".pth",)


FORMATS: dict[str, Format] = {
    "safetensors": Format(_write_own, _own_outputs, (".safetensors",)),
    "dinov2": Format(_write_dinov2, _by_transformers, _TORCH),
    "timm": Format(_write_timm, _timm_outputs, _ARRAYS),
    HUGGINGFACE: Format(_write_huggingface, _huggingface_outputs, ()),
    "clip": Format(_write_clip, _by_transformers, _ARRAYS),
    "synclr": Format(_write_synclr, _by_transformers, _ARRAYS),
    "onnx": Format(_write_onnx, _onnx_outputs, (".onnx",)),
    "stablehlo": Format(_write_stablehlo, _stablehlo_outputs, (".stablehlo", ".bin")),
}


PROGRAMS: Sequence[str] = ("onnx", "stablehlo")
# Formats that images of other sizes can be chosen for.
SIZED: Sequence[str] = (*PROGRAMS, HUGGINGFACE)
