"""The report: charts, what it is made of, and how a browser shows it."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from conftest import photograph

from proteus_jax import messages
from proteus_jax.evaluation import snapshots
from proteus_jax.evaluation.agreement import NEIGHBOURS, StudentTokens, TeacherTokens
from proteus_jax.evaluation.chart import Series, chart
from proteus_jax.evaluation.report import report, write_report

STRANGE = '<script>alert("x")</script> & "photos"'
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page(html.parser.HTMLParser):
    """Tags in balance, and every address that a page names."""

    EMPTY: ClassVar = {"meta", "img", "line", "circle", "polyline", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def workdir(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A run's directory after two measurements."""
    views = np.stack([photograph(rng, 28, 28) for _ in range(9)])
    target = TeacherTokens(*(rng.normal(size=s).astype(np.float32) for s in ((9, 6), (9, 4, 6))))
    scene = snapshots.scene(views, target, 0.5, most=16)
    snapshots.draw_teacher(scene, tmp_path)
    rows = [{"step": 0, "agreement_class": 0.0, "knn_top1": 20.0, "teacher_knn_top1": 66.0}]
    for step in (1, 2, 3):
        row = {"step": step, "loss": 3.0 / step, "token_loss": 1.0, "feature_loss": 1.0}
        rows.append(row | {"patch_loss": 1.0, "learning_rate": 1e-3, "images_per_second": 9.0})
    rows[-1] |= {"agreement_class": 0.5, "knn_top1": 61.2, "teacher_knn_top1": 66.0, "mfu": 0.4}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"teacher": STRANGE, "data": {"root": [STRANGE]}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    for step in range(9):
        tokens = StudentTokens(target.cls, target.patches, rng.normal(size=(9, 6)))
        guessed = target.patches[:8] + 1
        snapshots.draw_student(scene, "vit_tiny", step, tokens, guessed, tmp_path)
    return tmp_path


def test_it_needs_nothing_else_and_escapes_what_it_is_told(workdir: Path) -> None:
    text = report(workdir, ["vit_tiny"], 3)
    page = Page(text)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "script" not in page.tags
    # views, teacher, six moments of each kind, and neighbours by either
    assert page.tags.count("img") == 2 + 6 + 6 + 2
    assert "step 0<" in text
    assert "step 8<" in text
    assert "66.0: 93%" in text
    assert "step 3 of 3" in text
    assert "MFU" in text


def test_a_run_that_measures_nothing_has_one_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"teacher": "t", "data": {"root": []}}')
    write_report(tmp_path, ["a", "b"], 7)
    assert "step 0 of 7" in (tmp_path / "report.html").read_text()
    Page((tmp_path / "report.html").read_text())


def test_charts_show_every_value_within_their_axes(rng: np.random.Generator) -> None:
    values = rng.normal(size=5000) * 1e-4 + 7
    shown = chart([Series("a<b", list(enumerate(values))), Series("one", [(10, 7.0)])])
    Page(f"<div>{shown}</div>")
    assert "a&lt;b" in shown
    (path,) = re.findall(r'points="([^"]+)"', shown)
    points = np.array([[float(part) for part in pair.split(",")] for pair in path.split()])
    assert len(points) == 300
    assert points[:, 0].min() >= 52
    assert points[:, 0].max() <= 410
    assert points[:, 1].min() >= 8
    assert points[:, 1].max() <= 204
    # The mean of the values is where the axis says.
    marks = re.findall(r'x="46" y="([\d.]+)" text-anchor="end">([-\d.e+]+)<', shown)
    (y0, v0), *_, (y1, v1) = [(float(y) - 4, float(v)) for y, v in marks]
    middle = v0 + (points[:, 1].mean() - y0) / (y1 - y0) * (v1 - v0)
    assert middle == pytest.approx(values.mean(), abs=2e-4)
    constant = chart([Series("c", [(0, 0.0), (1, 0.0)])])
    assert "nan" not in constant


def test_a_browser_shows_it_on_a_phone_and_in_the_dark(workdir: Path) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    text = report(workdir, ["vit_tiny"], 3)
    probe = """<script>window.onload = () => { const images = [...document.images];
      document.body.innerHTML = 'found ' + JSON.stringify({
        width: innerWidth, needed: document.documentElement.scrollWidth,
        broken: images.filter(image => !image.naturalWidth).length, images: images.length,
        back: getComputedStyle(document.body).backgroundColor}) + ' end'; }</script>"""
    page = workdir / "probe.html"
    page.write_text(text.replace("</body>", probe + "</body>"))
    found = {}
    for scheme, dark in (("light", 1), ("dark", 0)):
        done = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--window-size=390,800",
                f"--blink-settings=preferredColorScheme={dark}",
                f"--user-data-dir={workdir / 'profile'}",
                "--dump-dom",
                f"file://{page}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        (said,) = re.findall(r"found (.*) end", done.stdout) or [done.stderr]
        found[scheme] = json.loads(said)
        assert found[scheme]["broken"] == 0
        assert found[scheme]["images"] == 16
        assert found[scheme]["needed"] <= found[scheme]["width"] <= 520
    assert found["light"]["back"] == "rgb(255, 255, 255)"
    assert found["dark"]["back"] != found["light"]["back"]


def test_what_is_said_at_the_end() -> None:
    """The first step beside the mean of the last ten; before beside after; student and teacher."""
    rows: list[dict] = [{"step": 0, "agreement_class": 0.1, "cka": 0.5, "knn_top1": 20.0}]
    rows[0] |= {"neighbour_overlap": 0.25, "teacher_knn_top1": 80.0, "ridge_top1": 10.0}
    rows[0] |= {"teacher_ridge_top1": 50.0}
    for step in range(1, 41):
        row = {"step": step, "loss": 1.0, "token_loss": 100.0 - step, "feature_loss": 2.0 * step}
        rows.append(row | {"patch_loss": 7.0})
    rows[-1] |= {"agreement_class": 0.7, "cka": 0.75, "neighbour_overlap": 0.5, "knn_top1": 60.0}
    rows[-1] |= {"teacher_knn_top1": 80.0, "knn_balanced_top1": 40.0, "ridge_top1": 45.0}
    rows[-1] |= {"teacher_ridge_top1": 50.0, "ema_knn_top1": 61.5}
    lines = [re.split(r"  +", line.strip()) for line in messages._learnt(rows, "")]
    assert lines == [
        ["first step", "last 10"],
        ["token loss", "99.000", "64.500"],
        ["feature loss", "2.000", "71.000"],
        ["patch loss", "7.000", "7.000"],
        ["on held-out views", "before", "after"],
        ["centred cosine, class token", "0.100", "0.700"],
        [f"share of {NEIGHBOURS} nearest neighbours", "0.250", "0.500"],
        ["linear CKA, class token", "0.500", "0.750"],
        [
            "nearest neighbours: student 60.0 (balanced 40.0), average 61.5, teacher 80.0: 75% "
            "(before 20.0)"
        ],
        ["ridge probe: student 45.0, teacher 50.0: 90% (before 10.0)"],
    ]
    # Of two students each has its own rows.
    named = [{f"a/{key}": value for key, value in row.items()} for row in rows[1:3]]
    assert len(list(messages._learnt(named, "a/"))) == 4
    assert list(messages._learnt(named, "b/")) == []
