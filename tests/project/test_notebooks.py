"""The notebooks run from the first cell to the last, on small models and images."""

import json
import os
from pathlib import Path
from typing import Any

import compiler
import pytest
from commands import command, finish
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs requirements-dev.txt")
nbclient = pytest.importorskip("nbclient", reason="needs requirements-dev.txt")
pytestmark = pytest.mark.slow
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photographs: Path, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    # Deep enough for the blocks that a linear probe sees.
    small = ("--config.steps=2", "--config.student=vit_tiny_4blocks")
    done = finish(command(folder / "run", photographs, tiny_teacher, *small), folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def replaced(name: str, run: Path, teacher: Path, photographs: Path, labeled: Path) -> dict:
    """Values for a notebook's parameters."""
    small = ["--config.data.resize=32", "--config.data.crop=28", "--config.batch=16"]
    student = {"STUDENT": str(run / "student"), "SETTINGS": small}
    return {
        "01_quickstart": {
            "MODEL": str(teacher),
            "IMAGES": [str(path) for path in sorted(photographs.rglob("*.png"))[:3]],
            "SIZE": 56,
        },
        "02_linear_evaluation": student
        | {"DATA": str(labeled), "WORKDIR": str(run.parent / "evaluations")},
        "03_student_and_teacher": student
        | {
            "TEACHER": str(teacher),
            "IMAGES": str(photographs),
            "WORKDIR": str(run.parent / "analysis"),
            "SIZE": 56,
        },
        "04_own_images": {
            "PHOTOS": str(photographs),
            "WORKDIR": str(run.parent / "mine"),
            "SETTINGS": [
                f"--config.teacher={teacher}",
                "--config.init.method=random",
                "--config.steps=2",
                "--config.batch=4",
                "--config.data.crop=28",
            ],
        },
    }[name]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(
    path: Path,
    run: Path,
    tiny_teacher: Path,
    photographs: Path,
    labeled_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XLA_FLAGS", compiler.FLAGS)
    monkeypatch.setenv("PROTEUS_JAX_CACHE", str(photographs.parent / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook: Any = nbformat.read(path, as_version=4)
    values = replaced(path.stem, run, tiny_teacher, photographs, labeled_folder)
    (at,) = [
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    ]
    assert all(f"{name} = " in notebook.cells[at].source for name in values)
    text = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(text))
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    shown = json.dumps(notebook)
    assert "image/png" in shown or "Published" in shown or "text/html" in shown
    assert os.environ["PIP_NO_INDEX"] == "1"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
