"""The benchmarks run, at tiny sizes; what they measure is of no interest here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def run(script: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_accelerator(tmp_path: Path) -> None:
    file = tmp_path / "table.md"
    arguments = ("--image=28", "--batch=2", "--largest=2", "--rounds=1", "--precision=float32")
    printed = run("accelerator.py", "--pairs", "T", *arguments, f"--output={file}")
    assert file.read_text() == printed
    for label in ("whole step", "teacher's forward pass", "student, masked half", "ours"):
        assert f"\n| {label} | " in printed


def test_step() -> None:
    pytest.importorskip("torch", reason="needs requirements-parity.txt")
    printed = run("step.py", "--image=28", "--batch=2", "--rounds=1")
    assert float(printed.splitlines()[-1].removeprefix("ratio: ")) > 0
