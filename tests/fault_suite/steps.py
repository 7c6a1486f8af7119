"""Losses that are not finite, and their steps made again."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from fault_suite.account import Fault
from fault_suite.bench import RICH, Bench, arrays
from proteus_jax.checkpoint.checksums import write_checksums
from proteus_jax.training import nan_replay


def faults(bench: Bench, *, quick: bool) -> list[Fault]:
    """A diverging run with its dump; the dump's own faults."""
    first = Fault("a diverging run stops and is replayed", lambda: _diverges(bench))
    if quick:
        return [first]
    return [
        first,
        Fault("several students, an average, parts of a batch", lambda: _several(bench)),
        Fault("nothing masked, an odd batch", lambda: _unmasked(bench)),
        Fault("dumps that are none", lambda: _no_dumps(bench)),
    ]


def _diverged(bench: Bench, name: str, *more: str) -> tuple[Path, Path]:
    """A run whose learning rate throws it off once the rate has risen."""
    workdir = bench.root / name
    words = (
        "--config.learning_rate=1e25",
        "--config.optimizer.warmup_steps=20",
        "--config.max_skipped=3",
    )
    result = bench.run(bench.command(workdir, *words, *more))
    assert result.returncode == 3, result.stdout + result.stderr
    assert "its update is skipped (1 in a row). Its images here: " in result.stdout
    found = re.search(r"python main.py --replay (.*)", result.stderr)
    assert found, result.stderr
    return workdir, Path(found.group(1))


def _replayed(bench: Bench, workdir: Path, kept: Path) -> str:
    shutil.rmtree(workdir / "checkpoints")
    command = bench.command(workdir)[:2]
    result = bench.run([*command, f"--replay={kept}"])
    assert result.returncode == 3, result.stdout + result.stderr
    assert "a loss or gradient is not finite, as in the run" in result.stderr
    values = re.findall(r"^(\S+) +(\S+) +(\S+)$", result.stdout, re.MULTILINE)
    losses = [(before, after) for name, before, after in values if "loss" in name]
    assert len(losses) >= 4
    assert all(before == after for before, after in losses), losses
    return result.stdout


def _diverges(bench: Bench) -> None:
    workdir, kept = _diverged(bench, "diverged")
    newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
    # Nothing that is not finite ever came into the state.
    for name, array in arrays(workdir, newest).items():
        assert np.isfinite(array.astype(np.float64)).all(), name
    printed = _replayed(bench, workdir, kept)
    assert "0 arrays of parameters are not finite" in printed
    # Not its images' folder, nor its workdir.
    moved = bench.root / "moved dump"
    shutil.copytree(kept, moved)
    shutil.rmtree(workdir)
    result = bench.run([*bench.command(workdir)[:2], "--replay", str(moved)])
    assert result.returncode == 3, result.stderr
    for path in (moved / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    result = bench.run([*bench.command(workdir)[:2], "--replay", str(moved)])
    assert result.returncode == 2, result.stderr
    assert "is no dump of a step: state/" in result.stderr


def _several(bench: Bench) -> None:
    printed = _replayed(bench, *_diverged(bench, "several", *RICH))
    assert "vit_tiny_2blocks/loss" in printed


def _unmasked(bench: Bench) -> None:
    more = ("--config.method.loss_weights.patch=0", "--config.batch=3")
    _replayed(bench, *_diverged(bench, "unmasked", *more))


class _Payload:
    """What runs where an array of objects is loaded."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self._mark),)


def _no_dumps(bench: Bench) -> None:
    folder, main = bench.root / "no dump", bench.command(bench.root)[:2]
    folder.mkdir()

    def refused() -> str:
        result = bench.run([*main, f"--replay={folder}"])
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        assert "is no dump of a step" in result.stderr, result.stderr
        return result.stderr

    assert "no seal.json" in refused()
    for content in ("", "[]", "{}", '{"names": [], "metrics": {}, "configuration": {}}'):
        (folder / "dump.json").write_text(content)
        np.savez(folder / "batch.npz", images=np.zeros((4, 28, 28, 3), np.uint8))
        write_checksums(folder, nan_replay.SEALED_AS)
        refused()
    _, whole = _diverged(bench, "diverged, changed")
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    about = json.loads((folder / "dump.json").read_text())
    spoilt = (
        {"names": [1, 2]},
        {"images_an_epoch": 0},
        {"metrics": {"loss": "x"}},
        {"configuration": about["configuration"] | {"batch": 6}},
        {"configuration": about["configuration"] | {"teachers": {"x": {}}}},
        {"configuration": about["configuration"] | {"data": {}}},
    )
    for change in spoilt:
        (folder / "dump.json").write_text(json.dumps(about | change))
        write_checksums(folder, nan_replay.SEALED_AS)
        refused()
    # Not sealed anew: what is in it is not looked at.
    (folder / "dump.json").write_text(json.dumps(about))
    assert "dump.json: expected" in refused()
    mark = bench.root / "ran"
    np.savez(folder / "batch.npz", images=np.array([_Payload(mark)], dtype=object))
    write_checksums(folder, nan_replay.SEALED_AS)
    refused()
    assert not mark.exists()
    result = bench.run([*main, f"--replay={folder}", "--config.seed=1", "--workdir=x"])
    assert result.returncode == 2
    assert "--workdir: not with --replay" in result.stderr
    assert "--config.seed: not with --replay" in result.stderr
