"""Checkpoints as training code leaves them: one backbone is found by itself whatever lies around
it, several are listed.
"""

import dataclasses
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import official

from proteus_jax.cli.convert import main
from proteus_jax.errors import InputError
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.pos_embed import resize_position_table
from proteus_jax.weights.convert import name_maps
from proteus_jax.weights.convert.detection import detect_architecture
from proteus_jax.weights.convert.import_weights import import_weights, read_model
from proteus_jax.weights.convert.selection import choose

SPEC = ViTSpec(width=64, depth=4, heads=1, grid=3)
Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def backbone() -> dict[str, np.ndarray]:
    return dict(official(SPEC))


class _Tensor:
    """Pickles as torch.save pickles a tensor."""

    def __init__(self, array: np.ndarray):
        self.array = array


class _Class:
    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


# Python's own pickler, whose methods can be put in the place of.
_Pickler: Any = pickle._Pickler  # pyright: ignore[reportAttributeAccessIssue]


class Pickler(_Pickler):
    """Writes tensors by storages, as torch.save does, and names of classes that are not here."""

    KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}  # noqa: RUF012

    def __init__(self, file: io.BytesIO):
        super().__init__(file, 2)
        self.storages: list[np.ndarray] = []

    def persistent_id(self, value: Any) -> Any:
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, _Class):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, _Tensor):
            array = value.array
            storage = _Class("torch", self.KINDS[array.dtype.name])
            identity = ("storage", storage, str(len(self.storages)), "cpu", array.size)
            self.storages.append(array)
            strides = tuple(side // array.itemsize for side in array.strides)
            self.save(_Class("torch._utils", "_rebuild_tensor_v2"))
            self.save((identity, 0, array.shape, strides, False, {}))
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def torch_save(value: Any, path: Path) -> Path:
    """Writes what torch.save would of dictionaries of arrays."""

    def as_tensors(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return _Tensor(np.ascontiguousarray(value))
        return {k: as_tensors(v) for k, v in value.items()} if isinstance(value, dict) else value

    file = io.BytesIO()
    pickler = Pickler(file)
    pickler.dump(as_tensors(value))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", file.getvalue())
        for number, array in enumerate(pickler.storages):
            archive.writestr(f"a/data/{number}", array.tobytes())
    return path


def below(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in arrays.items()}


def chunked(arrays: Arrays, size: int, through: bool) -> dict[str, np.ndarray]:
    """Blocks in chunks; numbered through, or anew in each."""
    renamed = {}
    for name, array in arrays.items():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            chunk, within = divmod(int(block), size)
            name = f"blocks.{chunk}.{block if through else within}.{rest}"
        renamed[name] = array
    return renamed


HEAD = {
    "dino_head.mlp.0.weight": np.ones((3, 3), np.float32),
    "dino_head.last_layer.weight_g": np.full((3, 1), np.nan, np.float32),
    "head.fc.weight": np.ones((2, 2), np.float32),
    "projection_head.1.num_batches_tracked": np.array(7),
    "projection_head.1.running_mean": np.ones(3, np.float32),
}
AROUND = {
    "optimizer": {"state": {0: {"step": 3, "exp_avg": np.full(3, np.inf, np.float32)}}},
    "epoch": 5,
    "counter": np.array(7),
    "args": ["x", None, 1.5],
}

FORMS: dict[str, Callable[[dict], Any]] = {
    "plain": lambda b: b,
    "teacher": lambda b: {"teacher": b},
    "ema": lambda b: {"ema": b},
    "params": lambda b: {"params": b},
    "net": lambda b: {"net": b, **AROUND},
    "backbone": lambda b: {"backbone": b},
    "twice": lambda b: {"state_dict": {"backbone": b}},
    "DINOv2's teacher": lambda b: {"teacher": {**below("backbone.", b), **HEAD}},
    "DINOv2's teacher in chunks": lambda b: {
        "teacher": {**below("backbone.", chunked(b, 2, True)), **HEAD}
    },
    "chunks": lambda b: chunked(b, 2, True),
    "chunks counted anew": lambda b: chunked(b, 2, False),
    "one chunk": lambda b: chunked(b, 9, True),
    "compiled": lambda b: below("_orig_mod.", b),
    "compiled inside": lambda b: below("backbone._orig_mod.", b),
    "compiled blocks": lambda b: {
        name.replace(".attn.", "._orig_mod.attn."): array for name, array in b.items()
    },
    "distributed and compiled": lambda b: below("module._orig_mod.", b),
    "sharded": lambda b: below("_fsdp_wrapped_module.", b),
    "lightning": lambda b: {"state_dict": below("model.backbone.", b), "callbacks": {}, **AROUND},
    "with heads": lambda b: {"state_dict": {**below("student_backbone.", b), **HEAD}},
    "heads beside": lambda b: {"model": {**b, **HEAD}, **AROUND},
    "half": lambda b: {"model": {n: a.astype(np.float16) for n, a in b.items()}},
}


@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        *((form, ".pth") for form in FORMS),
        *(
            (form, suffix)
            for form in ("plain", "lightning")
            for suffix in (".ckpt", ".pkl", ".x", "")
        ),
    ],
)
def test_the_one_backbone_is_found(
    tmp_path: Path, backbone: dict[str, np.ndarray], form: str, suffix: str
) -> None:
    file = torch_save(FORMS[form](backbone), tmp_path / f"w{suffix}")
    found, _ = read_model(file)
    assert found.family == "dinov2"
    assert found.spec == SPEC
    assert found.arrays.keys() == backbone.keys()
    for name, array in backbone.items():
        expected = array.astype(np.float16).astype(np.float32) if form == "half" else array
        assert np.array_equal(found.arrays[name], expected), name


def test_what_is_left_out_is_said(tmp_path: Path, backbone: dict[str, np.ndarray]) -> None:
    _, facts = read_model(torch_save({"model": {**backbone, **HEAD}}, tmp_path / "w.pth"))
    assert facts["left_out"] == [f"model.{name}" for name in HEAD]
    # A part that no family has is no head, and may be what the model computes with.
    more = {**backbone, "blocks.0.attn.q_scale": np.ones(3, np.float32)}
    with pytest.raises(InputError, match=r"unexpected: blocks\.0\.attn\.q_scale"):
        import_weights(torch_save(more, tmp_path / "x.pth"), tmp_path / "x")


def test_several_are_choices(
    tmp_path: Path, backbone: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    other = {name: array + 1 for name, array in backbone.items()}
    student, teacher = below("student.backbone.", backbone), below("teacher.backbone.", other)
    forms = {
        "dino": {"student": below("module.backbone.", backbone), "teacher": below("b.", other)},
        "dinov2": {"model": {**student, **teacher}},
        "timm": {"model": below("module.", backbone), "model_ema": other, "args": 1},
    }
    choices = {"dino": "student teacher", "dinov2": "student teacher", "timm": "model model_ema"}
    for name, keys in choices.items():
        file = torch_save(forms[name], tmp_path / f"{name}.pth")
        first, second = keys.split()
        assert main(["import", str(file), "--output", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr().err
        assert f"choose one by --key {first} (" in printed
        assert f"--key {second} (" in printed
        assert f"{second} is an average" in printed
        for key, expected in ((first, backbone), (second, other)):
            found, _ = read_model(file, key=key)
            assert np.array_equal(found.arrays["cls_token"], expected["cls_token"])
    for prefix in ("teacher.backbone.", "teacher.backbone", "model.teacher.backbone."):
        found, _ = read_model(tmp_path / "dinov2.pth", prefix=prefix)
        assert np.array_equal(found.arrays["cls_token"], other["cls_token"])
    with pytest.raises(InputError, match=r"no name begins with 'x'; the models in it are --key"):
        read_model(tmp_path / "dinov2.pth", prefix="x")


def test_what_is_no_number_matters_in_the_backbone_alone(
    tmp_path: Path, backbone: dict[str, np.ndarray]
) -> None:
    spoilt = backbone | {"blocks.1.mlp.fc1.bias": np.full(256, np.nan, np.float32)}
    file = torch_save({"student": backbone, "teacher": spoilt}, tmp_path / "w.pth")
    assert read_model(file, key="student")[0].spec == SPEC
    with pytest.raises(InputError, match=r"not finite: blocks\.1\.mlp\.fc1\.bias"):
        read_model(file, key="teacher")


def test_deits_second_token_is_a_register(tmp_path: Path) -> None:
    """It has a row of the position table; a register, which has none, gets it added."""
    rng = np.random.default_rng(3)
    spec = ViTSpec(
        width=64, depth=2, heads=1, patch_size=16, grid=2, layer_scale=False, registers=1,
        interpolate_offset=0.0, interpolate_antialias=True,
    )  # fmt: skip
    arrays = dict(official(spec))
    register, table = arrays.pop("register_tokens"), arrays.pop("pos_embed")
    arrays.pop("mask_token")
    row = rng.normal(size=(1, 1, 64)).astype(np.float32)
    arrays["dist_token"] = register - row
    arrays["pos_embed"] = np.concatenate([table[:, :1], row, table[:, 1:]], axis=1)
    arrays |= {
        "head.weight": np.zeros((3, 64), np.float32),
        "head_dist.bias": np.zeros(3, np.float32),
    }
    found, _ = read_model(torch_save({"model": arrays}, tmp_path / "w.pth"))
    assert (found.family, found.spec) == ("timm", spec)
    assert np.allclose(found.arrays["register_tokens"], register, atol=1e-6)
    assert np.array_equal(found.arrays["pos_embed"], table)


def test_a_position_table_that_is_no_square(tmp_path: Path) -> None:
    spec = ViTSpec(width=64, depth=2, heads=1, grid=2, grid_columns=5)
    file = torch_save(dict(official(spec)), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"give rows and columns, as --grid 16x12"):
        read_model(file)
    with pytest.raises(InputError, match=r"none of a grid of \(3, 5\)"):
        read_model(file, grid=(3, 5))
    assert main(["import", str(file), "--output", str(tmp_path / "m"), "--grid", "2x5"]) == 0
    card = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (card["spec"]["grid"], card["spec"]["grid_columns"]) == (2, 5)
    found, _ = read_model(file, grid=(2, 5))
    table = jnp.asarray(found.arrays["pos_embed"])
    assert resize_position_table(table, spec, (2, 5)) is table
    # Turned by a quarter it is the table of the turned grid.
    turned_spec = dataclasses.replace(spec, grid=5, grid_columns=2)

    def turned(table: jax.Array, rows: int, columns: int) -> jax.Array:
        patches = table[:, 1:].reshape(rows, columns, -1).swapaxes(0, 1)
        return jnp.concatenate([table[:, :1], patches.reshape(1, rows * columns, -1)], axis=1)

    resized = resize_position_table(table, spec, (4, 7))
    again = resize_position_table(turned(table, 2, 5), turned_spec, (7, 4))
    assert np.allclose(turned(resized, 4, 7), again, atol=1e-6)


def test_maes_decoder_is_left_out(tmp_path: Path) -> None:
    spec = ViTSpec(
        width=64, depth=2, heads=1, patch_size=16, grid=2, layer_scale=False,
        interpolate_offset=0.0, interpolate_antialias=True,
    )  # fmt: skip
    arrays = dict(official(spec)) | {"mask_token": np.ones((1, 1, 32), np.float32)}
    arrays |= {f"decoder_{name}": np.ones(3, np.float32) for name in ("pos_embed", "embed.weight")}
    found, _ = read_model(torch_save({"model": arrays}, tmp_path / "w.pth"))
    assert (found.family, found.spec) == ("timm", spec)
    assert "mask_token" not in found.arrays


@pytest.mark.parametrize("kind", ["vit", "vit_msn", "vit_mae", "deit"])
def test_the_type_in_config_json_decides(tmp_path: Path, kind: str) -> None:
    spec = ViTSpec(
        width=64, depth=2, heads=2, patch_size=16, grid=2, layer_scale=False, norm_epsilon=1e-12,
        interpolate_offset=0.0, interpolate_antialias=True,
    )  # fmt: skip
    arrays = {n: a for n, a in official(spec).items() if n != "mask_token"}
    theirs = below(f"{kind.removeprefix('vit_')}.", name_maps.HF_VIT.from_canonical(arrays))
    theirs |= below("decoder.", {"mask_token": np.ones((1, 1, 8), np.float32)})
    theirs |= below("classifier.", {"weight": np.ones((2, 64), np.float32)})
    settings: dict[str, Any] = {"model_type": kind, "num_attention_heads": 2}
    settings |= {"layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    torch_save(theirs, tmp_path / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(theirs, "pytorch_model-00001-of-00001.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found, _ = read_model(tmp_path)
    assert (found.family, found.spec) == ("timm", spec)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "swin"}))
    with pytest.raises(InputError, match="a model of the type 'swin' is not read"):
        read_model(tmp_path)


@pytest.mark.parametrize("layout", [name_maps.DINOV3_GATED, name_maps.HF_DINOV3_GATED])
def test_dinov3s_gate_is_read_and_written(layout: name_maps.NameMap) -> None:
    """Gate and values are two modules there, one after the other here."""
    spec = ViTSpec(
        width=64, depth=2, heads=1, patch_size=16, grid=14, registers=4, feed_forward="swiglu",
        positions="rotary", key_bias=False, norm_epsilon=1e-5, inner=96,
    )  # fmt: skip
    arrays = dict(official(spec))
    for block in range(2):
        # There is no bias of keys.
        arrays[f"blocks.{block}.attn.qkv.bias"][64:128] = 0
    theirs = layout.from_canonical(arrays, key_bias=layout is name_maps.DINOV3_GATED)
    gate, value = layout.merged["mlp.w12"]
    first = layout.block.format(0)
    both = arrays["blocks.0.mlp.w12.weight"]
    assert np.array_equal(theirs[f"{first}{gate}.weight"], both[:96])
    assert np.array_equal(theirs[f"{first}{value}.weight"], both[96:])
    found = detect_architecture(theirs, heads=1)
    assert found.family == "dinov3"
    assert (found.spec.feed_forward, found.spec.inner) == ("swiglu", 96)
    assert found.arrays.keys() == arrays.keys()
    assert all(np.array_equal(found.arrays[name], array) for name, array in arrays.items())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("layers.0.blocks.0.attn.relative_position_bias_table", "Swin or BEiT"),
        ("stages.0.0.dwconv.weight", "ConvNeXt"),
        ("layer1.0.conv1.weight", "ResNet"),
        ("blocks.0.attn.q_norm.weight", "norms of queries and keys"),
    ],
)
def test_other_families_are_named(name: str, kind: str) -> None:
    with pytest.raises(InputError, match=kind):
        choose(["patch_embed.proj.weight", name])
