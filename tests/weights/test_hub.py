"""Models from the Hugging Face hub, from a store and from local files of other libraries.

The hub is a server on this machine that answers as it does.
"""

import dataclasses
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY
from small import of_spec

import proteus_jax
from proteus_jax.cli import convert
from proteus_jax.errors import InputError, Unreachable
from proteus_jax.weights import fetch
from proteus_jax.weights.convert import name_maps, torch_writer
from proteus_jax.weights.model_dir import load_card, load_model
from proteus_jax.weights.registry import TEACHERS

FIRST, SECOND = "a" * 40, "b" * 40
TOKEN = "hf_" + "s" * 30
SETTINGS = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 56,
    "layer_norm_eps": 1e-6,
}


def model_files(seed: int = 0) -> dict[str, bytes]:
    """A directory of transformers with random weights, by the names of its files."""
    arrays = name_maps.HF_DINOV2.from_canonical(of_spec(TINY))
    arrays = {name: array + np.float32(seed) for name, array in arrays.items()}
    return {
        "config.json": json.dumps(SETTINGS).encode(),
        "model.safetensors": safetensors.numpy.save(arrays),
        "README.md": b"not wanted",
    }


class Hub(http.server.ThreadingHTTPServer):
    """Repositories by name and revision; `refusal` is a status and the hub's own word for it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, dict[str, bytes]] = {FIRST: model_files()}
        self.main = FIRST
        self.refusal: tuple[int, str] | None = None
        self.paths: list[str] = []
        self.tokens: set[str | None] = set()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.paths.append(path)
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refusal is not None:
            status, word = self.server.refusal
            self.give(b"", status, {"X-Error-Code": word, "X-Error-Message": word})
            return
        revision = next((each for each in self.server.files if each in path), self.server.main)
        files = self.server.files[revision]
        if path.startswith("/api/models/") and "/tree/" in path:
            listed = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files.items()
            ]
            self.give(json.dumps(listed).encode())
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in files]
            self.give(
                json.dumps({"id": "org/name", "sha": revision, "siblings": siblings}).encode()
            )
        elif path.rpartition("/")[2] in files:
            content = files[path.rpartition("/")[2]]
            digest = hashlib.sha256(content).hexdigest()
            self.give(content, headers={"ETag": f'"{digest}"', "X-Repo-Commit": revision})
        else:
            self.give(b"", 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def give(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROTEUS_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def forget(cache: Path) -> None:
    """What was converted, and the hub's own cache; not what was recorded of it."""
    shutil.rmtree(cache / "models")
    shutil.rmtree(cache.parent / "hub")


def test_a_repository_is_fetched_converted_and_kept(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch.find_model("hf:org/name") is None
    assert fetch.teacher_spec("hf:org/name") is None
    directory = fetch.obtain_model("hf:org/name")
    said = capsys.readouterr().out
    assert f"hf:org/name: converted into {directory}" in said
    card = load_card(directory)
    assert card.spec == TINY
    assert card.source["repository"] == "org/name"
    assert card.source["revision"] == FIRST
    assert not any("README" in path for path in hub.paths)
    asked = len(hub.paths)
    assert fetch.obtain_model("hf:org/name") == directory == fetch.find_model("hf:org/name")
    assert proteus_jax.load("hf:org/name").spec == TINY
    assert len(hub.paths) == asked
    # The token goes to the hub, and nowhere else.
    assert f"Bearer {TOKEN}" in hub.tokens
    written = [path for path in cache.rglob("*") if path.is_file()]
    assert written
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in said


def test_the_first_revision_is_taken_from_then_on(hub: Hub, cache: Path) -> None:
    before = load_model(fetch.obtain_model("hf:org/name"))[0]
    hub.files[SECOND], hub.main = model_files(1), SECOND
    forget(cache)
    again = fetch.obtain_model("hf:org/name")
    assert load_card(again).source["revision"] == FIRST
    np.testing.assert_array_equal(load_model(again)[0]["cls_token"], before["cls_token"])
    other = fetch.obtain_model(f"hf:org/name@{SECOND}")
    assert load_card(other).source["revision"] == SECOND
    assert (load_model(other)[0]["cls_token"] != before["cls_token"]).all()


def test_each_repository_keeps_its_own_revision(hub: Hub, cache: Path) -> None:
    """One that is fetched after it does not make it forget."""
    fetch.obtain_model("hf:org/name")
    hub.files[SECOND], hub.main = model_files(1), SECOND
    assert load_card(fetch.obtain_model("hf:org/other")).source["revision"] == SECOND
    forget(cache)
    assert load_card(fetch.obtain_model("hf:org/name")).source["revision"] == FIRST
    assert load_card(fetch.obtain_model("hf:org/other")).source["revision"] == SECOND


def test_other_bytes_under_the_same_revision_are_refused(hub: Hub, cache: Path) -> None:
    fetch.obtain_model("hf:org/name")
    hub.files[FIRST] = model_files(1)
    forget(cache)
    with pytest.raises(InputError, match=r"model\.safetensors: its sha256 should be .* at first"):
        fetch.obtain_model("hf:org/name")
    assert list((cache / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("refusal", "complaint"),
    [
        ((403, "GatedRepo"), r"gated: accept its terms at https://huggingface\.co/org/name"),
        ((404, "RepoNotFound"), "no such repository, or it is private"),
        ((404, "RevisionNotFound"), "it has no revision"),
        ((500, "Trouble"), r"cannot be fetched \("),
    ],
)
def test_refusals_say_what_to_do(hub: Hub, refusal: tuple[int, str], complaint: str) -> None:
    hub.refusal = refusal
    with pytest.raises(InputError, match=complaint) as caught:
        fetch.obtain_model("hf:org/name")
    assert TOKEN not in str(caught.value)


def test_a_repository_without_weights(hub: Hub) -> None:
    hub.files[FIRST] = {"config.json": b"{}", "tf_model.h5": b""}
    with pytest.raises(InputError, match="it holds no weights that are read here"):
        fetch.obtain_model("hf:org/name")


def test_offline_nothing_is_asked_for(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unreachable, match=r"offline .* hf download org/name"):
        fetch.obtain_model("hf:org/name")
    with pytest.raises(InputError) as caught:
        fetch.obtain_model("dinov2_vits14")
    assert len(caught.value.problems) == 2
    assert all("offline" in problem for problem in caught.value.problems)
    assert hub.paths == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert convert.main(["import", "hf:org/name", "--offline"]) == 2
    assert "nothing is fetched offline" in capsys.readouterr().err
    monkeypatch.delenv("HF_HUB_OFFLINE")
    # What the hub's own cache has needs no network.
    fetch.obtain_model("hf:org/name")
    shutil.rmtree(cache / "models")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.paths)
    assert load_card(fetch.obtain_model("hf:org/name")).source["revision"] == FIRST
    assert len(hub.paths) == asked


def test_without_a_network_the_hubs_cache_serves(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch.obtain_model("hf:org/name")
    shutil.rmtree(cache / "models")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert load_card(fetch.obtain_model("hf:org/name")).spec == TINY
    with pytest.raises(Unreachable, match="hf:org/other: cannot be fetched"):
        fetch.obtain_model("hf:org/other")


def test_a_known_name_has_a_second_source(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = dataclasses.replace(
        TEACHERS["dinov2_vits14"], spec=TINY, url="http://127.0.0.1:9/x.pth", repository="org/name"
    )
    monkeypatch.setitem(TEACHERS, "dinov2_vits14", known)
    card = load_card(fetch.obtain_model("dinov2_vits14"))
    assert (card.spec, card.source["repository"]) == (TINY, "org/name")
    assert card.license == known.license
    assert "cannot fetch http://127.0.0.1:9/x.pth" in capsys.readouterr().out
    other = dataclasses.replace(known, spec=dataclasses.replace(TINY, depth=3))
    monkeypatch.setitem(TEACHERS, "dinov2_vitb14", other)
    with pytest.raises(InputError, match=r"expected ViTSpec\(.*depth=3"):
        fetch.obtain_model("dinov2_vitb14")


def test_a_directory_of_another_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name, content in model_files().items():
        (folder / name).write_bytes(content)
    assert fetch.find_model(str(folder)) is None
    first = fetch.obtain_model(str(folder))
    assert capsys.readouterr().out.count("\n") == 1
    assert load_card(first).spec == TINY
    assert fetch.find_model(str(folder)) == first
    # What is changed is converted anew, and what was made of it before stays.
    (folder / "model.safetensors").write_bytes(model_files(1)["model.safetensors"])
    assert fetch.find_model(str(folder)) is None
    assert fetch.obtain_model(str(folder)) != first


def test_a_single_file(tmp_path: Path) -> None:
    wide = dataclasses.replace(TINY, width=64, heads=1)
    torch_writer.save(tmp_path / "w.pth", of_spec(wide))
    assert load_card(fetch.obtain_model(str(tmp_path / "w.pth"))).spec == wide
    assert proteus_jax.load(tmp_path / "w.pth").spec == wide
    torch_writer.save(tmp_path / "odd.pth", of_spec(TINY))
    with pytest.raises(InputError, match=r"give --heads .*convert_weights\.py import .*odd\.pth"):
        fetch.obtain_model(str(tmp_path / "odd.pth"))


def test_addresses_on_a_store(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model directory, of another library's and of a file, as gs:// and s3:// are read."""
    store = tmp_path / "store"
    shutil.copytree(tiny_teacher, store / "ours")
    (store / "theirs").mkdir()
    for name, content in model_files().items():
        (store / "theirs" / name).write_bytes(content)
    torch_writer.save(store / "w.pth", of_spec(dataclasses.replace(TINY, width=64, heads=1)))
    ours = fetch.obtain_model(f"file://{store}/ours")
    assert load_card(ours) == load_card(tiny_teacher)
    assert (ours / "model.safetensors").read_bytes() == (
        tiny_teacher / "model.safetensors"
    ).read_bytes()
    assert proteus_jax.load(f"file://{store}/ours/").spec == TINY
    assert load_card(fetch.obtain_model(f"file://{store}/theirs")).spec == TINY
    assert load_card(fetch.obtain_model(f"file://{store}/w.pth")).spec.width == 64
    (store / "theirs" / "model.safetensors").write_bytes(model_files(1)["model.safetensors"])
    assert fetch.find_model(f"file://{store}/theirs") is None
    (store / "empty").mkdir()
    with pytest.raises(InputError, match="expected a weight file, or a directory of weights"):
        fetch.obtain_model(f"file://{store}/empty")
    with pytest.raises(InputError, match=r"no-such|No such file"):
        fetch.obtain_model(f"file://{store}/absent.pth")


def test_an_address_must_not_hold_a_password() -> None:
    with pytest.raises(InputError, match="must not hold a password") as caught:
        fetch.find_model("s3://me:secret@bucket/teacher")
    assert "secret" not in str(caught.value).replace("SECRET", "")
