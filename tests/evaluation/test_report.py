"""The report: charts, what it is made of, and how a browser shows it."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import photograph

from proteus_jax.evaluation.reporting import figures, snapshots
from proteus_jax.evaluation.reporting.html_report import report, write_report
from proteus_jax.evaluation.reporting.svg_chart import COLORS, Series, chart
from proteus_jax.evaluation.teacher_agreement import NEIGHBORS, StudentTokens, TeacherTokens
from proteus_jax.training import summary

STRANGE = '<script>alert("x")</script> & "photos"'
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

LOSSES = ("loss", "token_loss", "feature_loss", "patch_loss")


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
    facts = {"teachers": {"teacher": {"source": STRANGE}}, "data": {"root": [STRANGE]}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    for step in range(9):
        tokens = StudentTokens(target.cls, target.patches, rng.normal(size=(9, 6)))
        guessed = target.patches[:8] + 1
        snapshots.draw_student(scene, "vit_tiny", step, tokens, guessed, tmp_path)
    return tmp_path


CONFIG = '{"teachers": {"teacher": {"source": "t"}}, "data": {"root": []}}'


def test_it_needs_nothing_else_and_escapes_what_it_is_told(workdir: Path) -> None:
    text = report(workdir, ["vit_tiny"], 3)
    page = Page(text)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "script" not in page.tags
    # views, teacher, six moments of each kind, and neighbors by either
    assert page.tags.count("img") == 2 + 6 + 6 + 2
    assert "step 0<" in text
    assert "step 8<" in text
    assert "66.0: 93%" in text
    assert "step 3 of 3" in text
    assert "MFU" in text


def small_scene(rng: np.random.Generator) -> snapshots.Scene:
    views = np.stack([np.full((28, 28, 3), 60 * number, np.uint8) for number in range(4)])
    sizes = ((4, 6), (4, 4, 6))
    target = TeacherTokens(*(rng.normal(size=size).astype(np.float32) for size in sizes))
    return snapshots.scene(views, target, 0.5, most=2)


def test_moments_stand_in_the_order_of_steps(tmp_path: Path, rng: np.random.Generator) -> None:
    """Also where one number has more digits than another; and of two students each has curves."""
    scene = small_scene(rng)
    snapshots.draw_teacher(scene, tmp_path)
    (tmp_path / "config.json").write_text(
        '{"teachers": {"teacher": {"source": "t"}}, "data": {"root": []}}'
    )
    rows = [{"step": step, "a/loss": 1.0, "b/loss": 2.0} for step in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = StudentTokens(scene.target.cls, scene.target.patches, rng.normal(size=(4, 6)))
    for step in (1000, 200, 30):
        snapshots.draw_student(scene, "a", step, tokens, None, tmp_path)
    text = report(tmp_path, ["a", "b"], 3)
    assert re.findall(r"<span>step (\d+)</span>", text) == ["30", "200", "1000"]
    assert text.count("<figcaption>losses</figcaption>") == 2
    assert "<td>1.000</td><td>1.000</td>" in text
    assert "<td>2.000</td><td>2.000</td>" in text


def test_neighbors_are_drawn_by_the_students_own_tokens(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, drawn = small_scene(rng), []
    sheet = figures.neighbor_sheet
    monkeypatch.setattr(
        figures, "neighbor_sheet", lambda *each: drawn.append(each[2]) or sheet(*each)
    )
    tokens = StudentTokens(scene.target.cls, scene.target.patches, rng.normal(size=(4, 3)))
    snapshots.draw_student(scene, "a", 1, tokens, None, tmp_path)
    snapshots.draw_teacher(scene, tmp_path)
    for found, own in zip(drawn, (tokens.own, scene.target.cls), strict=True):
        unit = own / np.linalg.norm(own, axis=1, keepdims=True)
        order = np.argsort(-(unit @ unit.T - 9 * np.eye(4)), axis=1)
        np.testing.assert_array_equal(found, order[:, :3])
    assert (drawn[0] != drawn[1]).any()


def test_beside_a_view_stand_its_own_neighbors() -> None:
    views = np.stack([np.full((28, 28, 3), 60 * number, np.uint8) for number in range(4)])
    found = np.array([[1, 2], [0, 3], [3, 1], [2, 0]])
    side, gap = figures.CELL // 2, figures.GAP
    sheet = np.asarray(figures.neighbor_sheet(views, [3, 1], found))
    for row, shown in enumerate(((3, 2, 0), (1, 0, 3))):
        for column, number in enumerate(shown):
            top, left = row * (side + gap), column * (side + gap)
            assert (sheet[top : top + side, left : left + side] == 60 * number).all()


def test_errors_are_drawn_where_patches_are_hidden() -> None:
    """The larger the warmer; what was seen is the view, darkened."""
    views = np.full((1, 28, 28, 3), 200, np.uint8)
    errors, hidden = np.array([[1.0, 0.0, 0.5, 1.0]]), np.array([[True, True, False, False]])
    sheet = np.asarray(figures.error_strip(views, errors, hidden)).astype(int)
    half = figures.CELL // 2
    large, small, seen = sheet[10, 10], sheet[10, half + 10], sheet[half + 10, 10]
    assert seen.tolist() == [100, 100, 100]
    assert large[0] > 200 > 100 > small[0]
    assert np.ptp(large) > 50


def test_the_background_is_black_whichever_way_a_component_points(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = np.zeros((6, 6), bool)
    inside[2:4, 1:5] = True
    edge = np.ones((6, 6), bool)
    edge[1:-1, 1:-1] = False
    tokens = [rng.normal(size=(36, 8)) + 20 * inside.reshape(-1, 1)]
    decompose = np.linalg.svd
    for sign in (1, -1):

        def turned(*arguments: Any, sign: int = sign, **named: Any) -> Any:
            u, s, v = decompose(*arguments, **named)
            return u, s, sign * v

        monkeypatch.setattr(np.linalg, "svd", turned)
        (colors,) = figures.foreground_colors(tokens, [edge.ravel()])
        assert (colors[~inside.ravel()] == 0).all()
        assert (colors[inside.ravel()].max(axis=1) > 0).all()


def test_a_chart_of_many_lines_has_a_color_for_each() -> None:
    shown = chart([Series(f"s{number}", [(0, 1.0), (1, number)]) for number in range(12)])
    used = {int(number) for number in re.findall(r"var\(--c(\d+)\)", shown)}
    assert used == set(range(COLORS))


def test_a_run_that_measures_nothing_has_one_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"teachers": {"teacher": {"source": "t"}}, "data": {"root": []}}'
    )
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
    lines = [re.split(r"  +", line.strip()) for line in summary._score_lines(rows, "", LOSSES[1:])]
    assert lines == [
        ["first step", "last 10"],
        ["token loss", "99.000", "64.500"],
        ["feature loss", "2.000", "71.000"],
        ["patch loss", "7.000", "7.000"],
        ["on held-out views", "before", "after"],
        ["centered cosine, class token", "0.100", "0.700"],
        [f"share of {NEIGHBORS} nearest neighbors", "0.250", "0.500"],
        ["linear CKA, class token", "0.500", "0.750"],
        [
            "nearest neighbors: student 60.0 (balanced 40.0), average 61.5, teacher 80.0: 75% "
            "(before 20.0)"
        ],
        ["ridge probe: student 45.0, teacher 50.0: 90% (before 10.0)"],
    ]
    # Images with classes that came later were not measured before.
    later = [{k: v for k, v in row.items() if row["step"] or "knn" not in k} for row in rows]
    assert any("(before not measured)" in line for line in summary._score_lines(later, "", ()))
    # Of a long run every hundredth step has a row, the last ten each one.
    sparse = [row for row in rows if row["step"] in (1, 15, 30) or row["step"] > 30]
    assert list(summary._score_lines(sparse, "", ("token_loss",)))[1].split() == [
        *("token", "loss", "99.000", "64.500"),
    ]
    # Of two students each has its own rows.
    named = [
        {"step": row["step"]} | {f"a/{key}": value for key, value in row.items()}
        for row in rows[1:3]
    ]
    assert len(list(summary._score_lines(named, "a/", LOSSES[1:]))) == 4
    assert list(summary._score_lines(named, "b/", LOSSES[1:])) == []
