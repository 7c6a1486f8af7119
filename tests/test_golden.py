"""The original PyTorch code's arrays; all where PROTEUS_JAX_REFERENCE names their folder."""

import os
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
from small import reference

HERE = Path(__file__).parent / "data" / "vit_dinov2_native.npz"


def assert_passes(checks: list[golden.Check], least: int) -> None:
    assert len(checks) >= least
    assert [check for check in checks if not check.passed] == []


def test_golden_file_of_the_repository() -> None:
    assert_passes(golden.check_file(HERE), 14)


@pytest.mark.parametrize("name", ["mlp", "mlp_rect", "reg4", "swiglu"])
def test_backbone(name: str) -> None:
    assert_passes(golden.check_file(reference("golden", f"vit_dinov2_{name}.npz")), 9)


def test_operations() -> None:
    assert_passes(golden.check_file(reference("golden", "augment_ops.npz")), 90)


def test_distillation() -> None:
    assert_passes(golden.check_file(reference("golden", "distill_dinov2.npz")), 120)


@pytest.mark.parametrize("side", [98, 224])
def test_trained_weights_on_photographs(side: int) -> None:
    pytest.importorskip("torch", reason="needs requirements-parity.txt")
    weights = reference("teachers", "dinov2_vits14.pth")
    path = reference("golden", f"dinov2_vits14_real_{side}.npz")
    assert_passes(golden.check_file(path, weights), 10)


@pytest.mark.parametrize("family", ["clip", "synclr"])
def test_other_families(family: str) -> None:
    checks = golden.check_file(reference("golden", f"vit_{family}.npz"))
    assert_passes(checks, {"clip": 3, "synclr": 6}[family])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"out/unheard_of": np.zeros(3, np.float32)}, "not known"),
        ({"out/cls": np.zeros((2, 64), np.float32)}, "FAIL"),
        ({"out/block9_cls": np.zeros((2, 64), np.float32)}, "not known"),
        ({"meta/heads": np.int64(2)}, "FAIL"),
    ],
)
def test_a_changed_file_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, complaint: str
) -> None:
    with np.load(HERE) as file:
        arrays = {name: file[name] for name in file.files} | change
    np.savez(tmp_path / "changed.npz", **arrays)
    assert golden.main([str(tmp_path / "changed.npz")]) == 1
    assert complaint in capsys.readouterr().out


def test_a_file_may_lack_arrays(tmp_path: Path) -> None:
    with np.load(HERE) as file:
        keep = [name for name in file.files if name.startswith(("w/", "meta/", "image"))]
        arrays = {name: file[name] for name in [*keep, "out/cls"]}
    np.savez(tmp_path / "less.npz", **arrays)
    assert len(golden.check_file(tmp_path / "less.npz")) == 1


def test_the_script_runs_by_itself(tmp_path: Path) -> None:
    """From any directory, with XLA's optimizations on, as a person would."""
    script = Path(golden.__file__)
    environment = os.environ | {"XLA_FLAGS": ""}
    for file, code in ((HERE, 0), (tmp_path / "absent.npz", 1)):
        command = [sys.executable, str(script), str(file)]
        assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == code
