"""The command line: its help, its names, and the package where it is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import proteus_jax
from proteus_jax import config
from proteus_jax.cli import app, usage
from proteus_jax.cli.commands import CONFIGURED, OTHERS
from proteus_jax.errors import InputError

NAMED = {"train": "quickstart", "evaluate": "eval/linear", "plan": "base", "doctor": "base"}


@pytest.mark.parametrize("command", NAMED)
def test_the_help_has_every_field(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With its value in the configuration that is named, and a line of meaning."""
    assert app.main([command, f"--config={NAMED[command]}", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fields = config.fields_of(NAMED[command])
    shown = [line.partition("=")[0] for line in lines if line.startswith("--config.")]
    assert sorted(shown) == sorted(f"--config.{field}" for field in fields)
    for number, line in enumerate(lines):
        if line.startswith("--config."):
            assert lines[number + 1].startswith("    ")
            assert lines[number + 1].strip()
    if command == "train":
        assert "--config.batch=16" in lines
        assert "    Random seed of the run" in lines


def test_every_field_has_a_comment_of_its_own() -> None:
    for base in ("base", "eval/base"):
        meanings = usage.field_meanings(base)
        assert set(meanings) == set(config.fields_of(base))
        assert all(0 < len(meaning) < 120 for meaning in meanings.values())


@pytest.mark.parametrize("command", OTHERS)
def test_other_commands_have_help_too(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        app.main([command, "--help"])
    assert f"proteus {command}" in capsys.readouterr().out


def test_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--help"]) == app.main(["--version"]) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"{proteus_jax.__version__}\n")
    for command in CONFIGURED | OTHERS:
        assert f"\n  proteus {command} " in text


def test_the_help_of_a_configuration_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Fields that no base describes are shown; a wrong name is an error in words."""
    own = ROOT / "tests" / "toy_configs" / "direction.py"
    assert app.main(["train", f"--config={own}", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--config.method.temperature=0.5" in lines
    assert app.main(["train", "--config=vitb15", "--help"]) == 2
    assert "no such file: vitb15" in capsys.readouterr().err


def test_a_configuration_has_a_name() -> None:
    assert config.find_file("eval/knn").samefile(ROOT / "configs" / "eval" / "knn.py")
    with pytest.raises(InputError, match=r"no such file: vitb15, nor a configuration of that name"):
        config.find_file("vitb15")
    with pytest.raises(InputError, match="did you mean eval/knn"):
        config.find_file("eval/knm")


@pytest.mark.parametrize(
    ("command", "name", "complaint"),
    [
        ("train", "eval/knn", "eval/knn is a configuration for evaluate"),
        ("evaluate", "vitb14", "vitb14 is a configuration for train, plan and doctor"),
    ],
)
def test_a_configuration_for_another_command(
    command: str, name: str, complaint: str, tmp_path: Path
) -> None:
    result = _proteus(command, f"--config={name}", "--config.model=m", "--workdir=w", at=tmp_path)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_command_stands_for_its_flag(tmp_path: Path) -> None:
    """A plan from anywhere, of a configuration by its name."""
    topology = "--topology=h100:8"
    one = _proteus("plan", "--config=vitti14", topology, at=tmp_path)
    other = _proteus("--plan", "--config=vitti14", topology, at=tmp_path)
    assert one.returncode == other.returncode == 0, one.stderr
    measured = "host images a second measured"
    lines, others = (
        [line for line in each.stdout.splitlines() if not line.startswith(measured)]
        for each in (one, other)
    )
    assert lines == others


def _proteus(*arguments: str, at: Path) -> subprocess.CompletedProcess[str]:
    code = "from proteus_jax.cli.app import script; script()"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=at,
        env=environ,
        capture_output=True,
        text=True,
    )
