"""What --doctor finds, says and writes, and that training can take it."""

import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm
from conftest import ROOT, photograph
from PIL import Image

from proteus_jax.data.dataset import open_images, open_source
from proteus_jax.data.sources.base import MemorySource
from proteus_jax.data.splits import HeldOut
from proteus_jax.data.validate import _RECORD, Findings, _alike, examine
from proteus_jax.data.workers import in_parallel
from proteus_jax.errors import InputError


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of each kind of trouble, and twenty healthy ones."""
    folder, rng = tmp_path_factory.mktemp("hospital"), np.random.default_rng(3)
    healthy = [photograph(rng, 90, 120) for _ in range(20)]
    for number, array in enumerate(healthy):
        Image.fromarray(array).save(folder / f"healthy {number:02}.png")
    one = Image.fromarray(healthy[0])
    whole = io.BytesIO()
    Image.fromarray(photograph(rng, 90, 120)).save(whole, "JPEG")
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[:-300])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "copy.png").write_bytes((folder / "healthy 03.png").read_bytes())
    Image.fromarray(photograph(rng, 80, 80)).convert("CMYK").save(folder / "cmyk.jpg")
    deep = np.asarray(Image.fromarray(photograph(rng)).convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(photograph(rng, 20, 300)).save(folder / "tiny.png")
    frames = [Image.fromarray(photograph(rng)) for _ in range(2)]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph(rng)).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(photograph(rng)).quantize(64).save(folder / "palette.png")
    one.resize((240, 180), Image.Resampling.BICUBIC).save(folder / "larger.jpg", quality=80)
    for shade in (10, 200):
        Image.new("RGB", (64, 64), (shade,) * 3).save(folder / f"flat {shade}.png")
    return folder


def found(folder: Path) -> tuple[list[str], Findings]:
    source, _ = open_source(str(folder))
    parallel = functools.partial(in_parallel, workers=0, threads=2)
    return [source.name(i) for i in range(len(source))], examine(source, parallel)


def test_each_trouble_is_found(hospital: Path) -> None:
    names, findings = found(hospital)
    unreadable = findings.unreadable()
    assert [names[index] for index in unreadable] == ["truncated.jpg"]
    assert "truncated" in unreadable[names.index("truncated.jpg")]
    odd = {kind: [names[index] for index in indices] for kind, indices in findings.odd().items()}
    assert odd == {
        "CMYK": ["cmyk.jpg"],
        "more than 8 bits": ["deep.png"],
        "several pages or frames": ["animated.webp"],
        "turned by EXIF": ["turned.jpg"],
        "tiny": ["tiny.png"],
        "transparency": [],
    }
    groups = [[names[index] for index in group] for group in findings.equal()]
    assert groups == [["copy.png", "healthy 03.png"]]
    groups = [[names[index] for index in group] for group in findings.alike()]
    assert groups == [["healthy 00.png", "larger.jpg"]]
    left_out = {names[index]: reason for index, reason in findings.excluded().items()}
    assert left_out.keys() == {"truncated.jpg", "healthy 03.png"}
    histogram = dict(findings.histogram())
    assert histogram["64 to 127"] == 24
    assert sum(histogram.values()) == len(names) - 1
    assert findings.decode_rate() > 0


def test_many_images_that_look_alike() -> None:
    """Each of fifty a little changed; unrelated ones stay apart."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(50):
        picture = photograph(rng, 64, 72)
        pictures += [picture, (picture * 0.9).astype(np.uint8)]
    source = MemorySource(pictures, [str(number) for number in range(100)])
    parallel = functools.partial(in_parallel, workers=0, threads=1)
    pairs = [[number, number + 1] for number in range(0, 100, 2)]
    assert examine(source, parallel).alike() == pairs


def test_two_roots_have_a_manifest_each(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a relative one means the same from elsewhere."""
    (tmp_path / "pictures").mkdir()
    for path in list(photographs.rglob("*.png"))[:3]:
        (tmp_path / "pictures" / path.name).write_bytes(path.read_bytes())
    result = run(tmp_path, f"--config.data.root=pictures,{photographs}", "--workdir=run")
    assert result.returncode == 0, result.stderr
    manifests = sorted((tmp_path / "run").glob("doctor*.json"))
    assert len(manifests) == 2
    roots = {json.loads(path.read_text())["root"] for path in manifests}
    assert roots == {str(tmp_path / "pictures"), str(photographs)}
    monkeypatch.chdir("/")
    assert {len(open_source(str(path))[0]) for path in manifests} == {3, 40}


def test_hashes_that_agree_in_one_quarter_alone_are_found() -> None:
    """Three bits apart, one in each of three quarters, whichever of the four agrees."""
    rng = np.random.default_rng(0)
    for quarter in range(4):
        looks = rng.integers(0, 2**63, 400, dtype=np.uint64)
        flipped = sum(1 << (16 * other + 15) for other in range(4) if other != quarter)
        looks[7] = looks[300] ^ np.uint64(flipped)
        assert _alike(looks, np.arange(400)) == [[7, 300]]


def test_images_that_cannot_be_read_are_no_copies() -> None:
    records = np.zeros(4, _RECORD)
    records["content"] = [0, 5, 0, 5]
    found = Findings(records, ["broken", "", "broken", ""])
    assert found.equal() == [[1, 3]]
    assert found.excluded() == {0: "broken", 2: "broken", 3: "the same as image 1"}


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "main.py"), "--doctor", *arguments]
    command.append(f"--config={ROOT / 'configs' / 'quickstart_paper.py'}")
    return warm.run(command, tmp_path, os.environ)


def test_training_takes_what_the_doctor_wrote(hospital: Path, tmp_path: Path) -> None:
    result = run(tmp_path, f"--config.data.root={hospital}", "--workdir=run")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "cannot be read: truncated.jpg: OSError: image file is truncated" in result.stdout
    assert "to train without what is wrong: --config.data.root=run/doctor.json" in result.stdout
    manifest = tmp_path / "run" / "doctor.json"
    written = json.loads(manifest.read_text())
    assert written["no_images"] == ["empty.jpg", "text.jpg"]
    assert written["copies"] == [["copy.png", "healthy 03.png"]]
    split = open_images([str(manifest)], held_out=HeldOut(0.02, 4, 9))
    assert split.held_out is not None
    used = {
        part.name(index) for part in (split.training, split.held_out) for index in range(len(part))
    }
    assert len(used) == written["images"] - 2
    assert not used & {"truncated.jpg", "healthy 03.png"}
    written["fingerprint"] = "0"
    manifest.write_text(json.dumps(written))
    with pytest.raises(InputError, match="have changed since; run --doctor again"):
        open_images([str(manifest)], held_out=HeldOut(0.0, 1, 1))
    manifest.write_text("{}")
    with pytest.raises(InputError, match="expected a file that --doctor wrote"):
        open_images([str(manifest)], held_out=HeldOut(0.0, 1, 1))


def test_all_that_is_wrong_is_said_and_nothing_is_written(hospital: Path, tmp_path: Path) -> None:
    result = run(
        tmp_path,
        f"--config.data.root={hospital},{tmp_path / 'absent'}",
        "--config.batch=15",
        "--output=report.json",
    )
    assert result.returncode == 2
    assert "exact copies, as healthy 03.png" in result.stdout
    assert result.stderr.splitlines() == [
        "2 problems with the input:",
        "  --config.batch: expected a multiple of 2, as the method takes so many images "
        "together, found 15",
        f"  --config.data.root: {tmp_path / 'absent'}: no such folder",
    ]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    wrong = run(tmp_path, "--config.data.root=doctor.json", "--output=file/doctor.json")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[1:] == [
        "  --output: file is no directory",
        "  --config.data.root: doctor.json: expected a place of images, found what --doctor wrote",
    ]
    result = run(tmp_path, f"--config.data.root={hospital}")
    assert result.returncode == 2
    assert result.stderr.splitlines()[1:] == ["  --workdir: expected a path"]
