"""PyTorch's files, read and written without PyTorch, and bit for bit as it does."""

import contextlib
import io
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from proteus_jax.errors import InputError
from proteus_jax.weights.convert import inert_pickle, torch_writer
from proteus_jax.weights.convert.readers import read_weights
from proteus_jax.weights.convert.torch_file import Tensor, TorchFile

FILES = ROOT / "tests" / "files"
# Written by PyTorch 2.13 in both forms.
FORMS = ("torch_1_6.pth", "torch_1_5.pth")
GRID = np.arange(6, dtype=np.float32).reshape(2, 3)
CLASSIC = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "complex64", "complex128"),
)
NEWER = (
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
)


def arrays(path: Path) -> dict[str, np.ndarray]:
    opened = TorchFile(path)
    return {name: opened.array(tensor) for name, tensor in opened.value["state_dict"].items()}


@pytest.mark.parametrize("name", FORMS)
def test_both_forms_without_torch(name: str) -> None:
    found = arrays(FILES / name)
    np.testing.assert_array_equal(found["w"], GRID)
    # A view of the same storage, with an offset and swapped strides.
    np.testing.assert_array_equal(found["view"], GRID.T[1:])
    assert found["half"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(found["half"].astype(np.float32), GRID[0])
    weights = read_weights(FILES / name)
    assert weights.precision == "bfloat16"
    np.testing.assert_array_equal(weights.arrays["view"], GRID.T[1:])


@pytest.mark.parametrize("name", FORMS)
def test_reading_needs_no_torch(name: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; "
        "from proteus_jax.weights.convert.readers import read_weights; "
        f"read_weights(Path({name!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=FILES, env={"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0


def odd_tensors(torch: Any, dtypes: tuple[str, ...]) -> dict[str, Any]:
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    complex_ones = torch.complex(base, base + 1)
    found = {
        "whole": base,
        "transposed": base.T,
        "row": base[2],
        "steps": base[::2, 1::3],
        "expanded": base[:1].expand(5, 8),
        "number": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base.clone()),
        "conjugate": complex_ones.conj(),
        "negative": complex_ones.clone().conj().imag,
    }
    return found | {name: (base.abs() * 5).to(getattr(torch, name)) for name in dtypes}


def bits_of(tensor: Any, torch: Any) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""


@pytest.mark.parametrize("newer", [True, False])
def test_every_dtype_and_stride_equals_torch(tmp_path: Path, newer: bool) -> None:
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = odd_tensors(torch, CLASSIC + NEWER if newer else CLASSIC)
        beside = {"optimizer": {0: torch.ones(2), "x": [1, 2.5, None, (3,)]}}
        torch.save(
            {"state_dict": saved, **beside}, tmp_path / "w.pt", _use_new_zipfile_serialization=newer
        )
        loaded = torch.load(tmp_path / "w.pt", weights_only=True)["state_dict"]
    found = arrays(tmp_path / "w.pt")
    assert found.keys() == saved.keys()
    for name, theirs in loaded.items():
        assert found[name].shape == tuple(theirs.shape), name
        assert f"torch.{found[name].dtype.name}" == str(theirs.dtype)
        assert found[name].tobytes() == bits_of(theirs, torch), name
    assert TorchFile(tmp_path / "w.pt").value["optimizer"]["x"] == [1, 2.5, None, (3,)]


def test_what_is_written_is_read_by_torch(tmp_path: Path) -> None:
    written = {"a.w": GRID, "number": np.float32(2) * np.ones(()), "none": np.zeros((0, 3))}
    torch_writer.save(tmp_path / "w.pth", written)
    opened = TorchFile(tmp_path / "w.pth")
    for name, array in written.items():
        np.testing.assert_array_equal(opened.array(opened.value[name]), array)
        assert opened.value[name].shape == array.shape
    torch = pytest.importorskip("torch", reason="needs requirements-parity.txt")
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "w.pth", weights_only=True, mmap=mapped)
        assert list(loaded) == list(written)
        for name, array in written.items():
            assert loaded[name].dtype == torch.float32
            np.testing.assert_array_equal(loaded[name].numpy(), array)


def rewritten(
    source: Path, target: Path, change: Callable[[str, bytes], bytes], method: int = 0
) -> None:
    """A zip archive with other contents."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_compressed_and_big_endian_archives(tmp_path: Path) -> None:
    def other_order(name: str, content: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        if "/data/" not in name:
            return content
        return np.frombuffer(content, "<u4").byteswap().tobytes()

    torch_writer.save(tmp_path / "w.pth", {"w": GRID})
    rewritten(tmp_path / "w.pth", tmp_path / "big.pth", other_order)
    rewritten(tmp_path / "w.pth", tmp_path / "small.pth", lambda _, c: c, zipfile.ZIP_DEFLATED)
    for name in ("big.pth", "small.pth"):
        opened = TorchFile(tmp_path / name)
        np.testing.assert_array_equal(opened.array(opened.value["w"]), GRID)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    content = bytearray((FILES / FORMS[0]).read_bytes())
    content[content.index(GRID.tobytes()) + 5] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"not a readable PyTorch file .*data/0 is damaged"):
        TorchFile(tmp_path / "w.pth")


class Trap:
    """Leaves a file behind where a pickle is run rather than read."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, description: bytes, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("w/data.pkl", description)
        for key, content in storages.items():
            opened.writestr(f"w/data/{key[1:]}", content)
    return path


def test_nothing_named_in_a_file_is_called(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    for protocol in range(6):
        trap = {"a": Trap(Path.touch, target), "b": Trap(eval, f"open({str(target)!r}, 'w')")}
        path = archive(tmp_path / f"{protocol}.pth", pickle.dumps(trap, protocol))
        opened = TorchFile(path)
        assert all(isinstance(each, inert_pickle.Opaque) for each in opened.value.values())
        with pytest.raises(InputError, match="expected a state dict, found dict"):
            read_weights(path)
    assert not target.exists()


def test_values_of_every_protocol() -> None:
    value = {
        "numbers": [0, -1, 255, 65536, 2**40, -(2**70), 1.5, float("inf"), True, None],
        "texts": ["", "ä", "x" * 300, b"", b"\xff" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        3: {"nested": {}},
    }
    for protocol in range(6):
        stream = io.BytesIO(pickle.dumps(value, protocol) + b"rest")
        if protocol < 3:
            # Bytes were a call of a function then, which is not made.
            stream = io.BytesIO(pickle.dumps(value | {"texts": ["", "ä"]}, protocol) + b"rest")
        found = inert_pickle.load(stream, {}, lambda _: None)
        assert found == (value if protocol >= 3 else value | {"texts": ["", "ä"]})
        assert stream.read() == b"rest"


def tensor_pickle(offset: int, shape: tuple, strides: tuple) -> bytes:
    """A description of one tensor of float32 with such an offset, shape and strides."""
    return torch_writer._description({"w": GRID}).replace(
        torch_writer._pickled(0) + torch_writer._pickled((2, 3)) + torch_writer._pickled((3, 1)),
        torch_writer._pickled(offset)
        + torch_writer._pickled(shape)
        + torch_writer._pickled(strides),
    )


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "complaint"),
    [
        (1, (2, 3), (3, 1), "reaches beyond its storage of 24 bytes"),
        (0, (2, 3), (4, 1), "reaches beyond its storage of 24 bytes"),
        (-1, (2, 3), (3, 1), "expected a whole number, found -1"),
        (0, (2, 3), (-3, 1), "expected a whole number, found -3"),
        (0, (2**61, 2**61), (0, 0), "its tensors grow to more than 16 times the file"),
        (0, (2, 3), (1,), "unequal shape and strides"),
        (0, (1,) * 40, (1,) * 40, "a tensor of 40 dimensions"),
        (2**70, (2, 3), (3, 1), "expected a whole number"),
    ],
)
def test_tensors_that_no_storage_holds(
    tmp_path: Path, offset: int, shape: tuple, strides: tuple, complaint: str
) -> None:
    description = tensor_pickle(offset, shape, strides)
    path = archive(tmp_path / "w.pth", description, s0=GRID.tobytes())
    with pytest.raises(InputError, match=complaint):
        read_weights(path)


def test_archives_that_are_none_of_torchs(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    description = torch_writer._description({"w": GRID})
    archive(path, description)
    with pytest.raises(InputError, match="damaged: it has no storage '0'"):
        read_weights(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("w/data.pkl", description)
        opened.writestr("w/data/0", bytes(1 << 28))
    with pytest.raises(InputError, match="unpacks to more than 16 times its size"):
        read_weights(path)
    path.write_bytes(pickle.dumps({"w": GRID.tolist()}))
    with pytest.raises(InputError, match=r"a pickle, but not one of torch\.save"):
        read_weights(path)
    path.write_bytes(bytes(257) + b"ustar" + bytes(300))
    with pytest.raises(InputError, match="a tar archive, as PyTorch wrote before"):
        read_weights(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="not a readable PyTorch file"):
        read_weights(path)
    archive(path, pickle.dumps([1, 2]))
    with pytest.raises(InputError, match="expected a state dict, found list"):
        read_weights(path)


def hostile() -> dict[str, bytes]:
    """Pickles made to cost time or memory, or to trip a reader."""
    # Each list holds the one before it twice: 2 ** 200 paths lead through it.
    doubled = b"\x80\x02]" + b"".join(
        b"q" + bytes([i]) + b"]" + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(200)
    )
    return {
        "doubled": doubled + b".",
        "deep": b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
        "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
        "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
        "huge number": b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"\1.",
        "negative length": b"\x80\x02\x8b" + struct.pack("<i", -5) + b"\1.",
        "long decimal": b"L" + b"9" * 10_000 + b"L\n.",
        "empty stack": b"\x80\x020.",
        "no mark": b"\x80\x02t.",
        "no memo": b"\x80\x02h\x07.",
        "unhashable key": b"\x80\x02}](K\1e](K\2es.",
        "odd items": b"\x80\x02}(K\1K\2K\3u.",
        "items on a number": b"\x80\x02K\1(K\1K\2u.",
        "buffers": b"\x80\x05\x97.",
        "extensions": b"\x80\x02\x82\x01.",
        "no end": b"\x80\x02}",
        "persistent text": b"Pkey\n.",
        "many": b"\x80\x02" + b"N0" * 5000 + b"N.",
    }


@pytest.mark.parametrize("kind", hostile())
def test_hostile_pickles_end_in_words(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "many":
        monkeypatch.setattr(inert_pickle, "MOST_OPERATIONS", 10_000)
    with pytest.raises(InputError, match=r"not a readable PyTorch file|expected "):
        read_weights(archive(tmp_path / "w.pth", hostile()[kind]))


@pytest.mark.parametrize("name", FORMS)
def test_mutated_files_end_in_one_error(name: str, tmp_path: Path) -> None:
    """Whatever is changed, cut or added: what comes back is arrays or one InputError."""
    whole = (FILES / name).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(250):
        spoilt = bytearray(whole)
        kind = number % 4
        if kind < 2:
            for at in rng.integers(0, len(whole), 1 + 4 * kind):
                spoilt[at] = int(rng.integers(256))
        elif kind == 2:
            spoilt = spoilt[: int(rng.integers(0, len(whole)))]
        else:
            at = int(rng.integers(0, len(whole)))
            spoilt[at:at] = bytes(rng.integers(0, 256, 5, np.uint8))
        (tmp_path / "w.pth").write_bytes(spoilt)
        refused += 1
        # Anything else that it raises would end this test.
        with contextlib.suppress(InputError):
            read_weights(tmp_path / "w.pth")
            refused -= 1
    assert refused > 100


def test_a_tensor_is_read_only_when_wanted() -> None:
    opened = TorchFile(FILES / FORMS[0])
    assert isinstance(opened.value["state_dict"]["w"], Tensor)


class Keyworded:
    """Made anew by a call with keywords."""

    def __new__(cls, *_: Any, **__: Any) -> "Keyworded":
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple:
        return (1,), {"b": 2}


def test_objects_made_with_keywords_are_passed_over() -> None:
    """What stands beside them is as it was."""
    stream = io.BytesIO(pickle.dumps({"before": 1, "it": Keyworded(), "after": [2, 3]}, 4))
    found = inert_pickle.load(stream, {}, lambda _: None)
    assert isinstance(found.pop("it"), inert_pickle.Opaque)
    assert found == {"before": 1, "after": [2, 3]}


def test_an_archive_with_two_members_of_one_name_is_refused(tmp_path: Path) -> None:
    """Which of them is read would be chance."""
    path = tmp_path / "w.pth"
    torch_writer.save(path, {"a": np.ones(3, np.float32)})
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("w/data/0", np.zeros(3, np.float32).tobytes())
    with pytest.raises(InputError, match=r"w\.pth: "):
        read_weights(path)
