"""What docs/extending.md adds: one of each kind, from outside of the package."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from commands import command, environment
from conftest import ROOT, TINY
from safetensors.numpy import save_file
from small import of_spec

from proteus_jax import configs
from proteus_jax.data.sources.registry import SCHEMES
from proteus_jax.evaluation.protocols.registry import PROTOCOLS
from proteus_jax.methods.registry import METHODS
from proteus_jax.runtime.metric_writer import read_metrics
from proteus_jax.weights.convert.families import FAMILIES, LAYOUTS
from proteus_jax.weights.convert.import_weights import import_weights
from proteus_jax.weights.convert.name_maps import DINOV2
from proteus_jax.weights.model_dir import load_card

STRIPES = (
    *("--config.data.root=stripes:40", "--config.eval.root=stripes:6"),
    *("--config.eval.protocols=norm", "--config.steps=3", "--config.eval_every=2"),
)


def with_toys(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line with all toys added."""
    program = [sys.executable, str(ROOT / "tests" / "toys.py")]
    environ = environment(folder) | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*program, *arguments], cwd=folder, env=environ, capture_output=True, text=True
    )


def run_arguments(folder: Path, teacher: Path, name: str, *more: str) -> list[str]:
    file = ROOT / "tests" / "toy_configs" / f"{name}.py"
    rest = command(folder / "run", folder, teacher, *STRIPES, *more)[3:]
    return [f"--config={file if file.exists() else name}", *rest]


def test_a_method_a_source_and_a_protocol(tiny_teacher: Path, tmp_path: Path) -> None:
    """A run by a method of its own, on a source of its own, measured by a protocol of its own; the
    same protocol measures its student afterwards.
    """
    odd = run_arguments(tmp_path, tiny_teacher, "direction", "--config.batch=8")
    result = with_toys(tmp_path, *odd)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(read_metrics(tmp_path / "run"))
    assert {"loss", "direction_loss", "norm_mean", "teacher_norm_mean"} <= rows[-1].keys()
    assert "token_loss" not in rows[-1]
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["direction_loss"])
    # Its field is checked by its rule, and is a part of what the run is.
    wrong = with_toys(tmp_path, *odd, "--config.method.temperature=-1")
    assert "--config.method.temperature: expected above 0, found -1.0" in wrong.stderr
    other = with_toys(tmp_path, *odd, "--config.method.temperature=1", "--config.steps=4")
    assert other.returncode == 2
    assert "method.temperature: the checkpoint has 0.5, this run has 1.0" in other.stderr
    assert "method.temperature: 0.5 until now" not in other.stderr
    arguments = (
        *("evaluate", "--config=eval/norm", f"--config.model={tmp_path / 'run' / 'student'}"),
        *("--config.data.root=stripes:6", f"--workdir={tmp_path / 'norm'}"),
        *("--config.data.crop=28", "--config.data.resize=32"),
    )
    measured = with_toys(tmp_path, *arguments)
    assert measured.returncode == 0, measured.stderr
    results = json.loads((tmp_path / "norm" / "results.json").read_text())
    assert results["images"] == 5
    assert results["mean"] == pytest.approx(rows[-1]["norm_mean"], rel=1e-5)
    table = with_toys(tmp_path, "table", str(tmp_path / "norm"), "--alone")
    assert table.stdout.startswith("| model | norm |\n")


def test_a_loss_beside_the_papers(tiny_teacher: Path, tmp_path: Path) -> None:
    arguments = run_arguments(
        tmp_path, tiny_teacher, "quickstart_paper", "--config.method.name=with_direction"
    )
    result = with_toys(tmp_path, *arguments, "--config.eval.root=", "--config.batch=8")
    assert result.returncode == 0, result.stdout + result.stderr
    row = list(read_metrics(tmp_path / "run"))[-1]
    parts = ("token_loss", "feature_loss", "patch_loss", "direction_loss")
    assert row["loss"] == pytest.approx(sum(row[part] for part in parts), rel=1e-5)


@pytest.fixture
def added() -> Iterator[None]:
    """The registries with the toys in them, and as they were afterwards."""
    registries: list[dict[str, Any]] = [METHODS, SCHEMES, PROTOCOLS, FAMILIES]
    before = [dict(each) for each in registries]
    layouts, paths = list(LAYOUTS), list(configs.__path__)
    toys.add()
    yield
    for each, was in zip(registries, before, strict=True):
        each.clear()
        each.update(was)
    LAYOUTS[:], configs.__path__[:] = layouts, paths


def test_a_family_of_teachers(added: None, tmp_path: Path) -> None:
    """Recognized by its names, with what no array says, and read back in the other direction."""
    arrays = of_spec(TINY)
    theirs = DINOV2.from_canonical(arrays)
    save_file(theirs | {"toy_marker": np.zeros(1, np.float32)}, tmp_path / "toy.safetensors")
    card = import_weights(tmp_path / "toy.safetensors", tmp_path / "model", heads=TINY.heads)
    assert (card.family, card.spec.norm_epsilon) == ("toy", 1e-5)
    assert load_card(tmp_path / "model") == card
