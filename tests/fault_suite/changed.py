"""Runs that are gone on with otherwise than they began."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import photograph
from PIL import Image

import proteus_jax
from fault_suite.account import Fault
from fault_suite.bench import STEPS, Bench, assert_same, rows, until
from proteus_jax.training.optimizer import warmup_cosine

# What is changed, and what the refusal says of it.
REFUSED = {
    "--config.seed=1": "seed: the checkpoint has 0, this run has 1 (refused)",
    "--config.batch=8": "batch: the checkpoint has 4, this run has 8 (refused)",
    "--config.data.crop=42": "crop: the checkpoint has 28, this run has 42 (refused)",
    "--config.student=vit_tiny_2blocks": "student: the checkpoint has",
    "--config.method.loss_weights.patch=0.5": "method.teacher.patch: the checkpoint has 1.0",
    "--config.ema_decay=0.9": "averaged: the checkpoint has false, this run has true (refused)",
    "--config.data.repeated_aug=2": "repeated_aug: the checkpoint has 1, this run has 2 (refused)",
    "--config.teachers.teacher.normalization=clip": "normalization: the checkpoint has",
    "--config.optimizer.mu_dtype=bfloat16": "mu_dtype: the checkpoint has",
}
ALLOWED = {
    "--config.log_every=2": "from here on, which changes no number of the training",
    "--config.data.threads=1": "from here on, which changes no number of the training",
    "--config.learning_rate=0.01": "--config.learning_rate: 0.001 until now, 0.01 from here on",
    "--config.method.mask_ratio=0.4": "--config.method.mask_ratio: 0.5 until now, 0.4 from here on",
}


def faults(bench: Bench, *, quick: bool) -> list[Fault]:
    """Differences that are refused, others that are not; longer and shorter runs; two at once."""
    few = 1 if quick else 100
    return [
        *(
            Fault(change, lambda change=change, words=words: _refused(bench, change, words))
            for change, words in list(REFUSED.items())[:few]
        ),
        *(
            Fault(change, lambda change=change, words=words: _allowed(bench, change, words))
            for change, words in list(ALLOWED.items())[:few]
        ),
        Fault("another image", lambda: _other_images(bench)),
        Fault("a longer run", lambda: _longer(bench)),
        *(
            []
            if quick
            else [
                Fault("another teacher", lambda: _other_teacher(bench)),
                Fault("a teacher that computes otherwise", lambda: _other_arithmetic(bench)),
                Fault("a shorter run", lambda: _shorter(bench)),
                Fault("two at once", lambda: _two_at_once(bench)),
                Fault("moved images and teacher", lambda: _moved(bench)),
            ]
        ),
    ]


def _half(bench: Bench, name: str) -> Path:
    """The undisturbed run, as far as step 12."""
    workdir = bench.copy(name)
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > STEPS // 2:
            shutil.rmtree(path)
    return workdir


def _refused(bench: Bench, change: str, words: str) -> None:
    workdir = _half(bench, f"refused {change[9:]}")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"}
    result = bench.run(bench.command(workdir, change, "--config.log_every=3"))
    assert result.returncode == 2, result.stdout + result.stderr
    assert f"--workdir holds another run, at step {STEPS // 2}: " in result.stderr
    assert words in result.stderr, result.stderr
    assert "--config.log_every: 1 until now, 3 from here on" in result.stderr
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"}
    assert before == {path: after[path] for path in before}


def _allowed(bench: Bench, change: str, words: str) -> None:
    workdir = _half(bench, f"allowed {change[9:]}")
    result = bench.run(bench.command(workdir, change))
    assert result.returncode == 0, result.stdout + result.stderr
    assert words in result.stdout, result.stdout
    assert f"resuming at step {STEPS // 2}" in result.stdout
    if "changes no number" in words:
        found = {row["step"]: row for row in rows(workdir)}
        assert all(found.get(row["step"], row) == row for row in rows(bench.undisturbed))


def _other_images(bench: Bench) -> None:
    images = bench.root / "other images"
    shutil.copytree(bench.images, images)
    Image.fromarray(photograph(np.random.default_rng(9), 40, 48)).save(images / "3.png")
    workdir = bench.copy("other images run")
    result = bench.run(bench.command(workdir, f"--config.data.root={images}"))
    assert result.returncode == 2
    assert "data: other images" in result.stderr


def _other_teacher(bench: Bench) -> None:
    teacher, workdir = bench.root / "other" / "teacher", bench.copy("other teacher run")
    bench.write_teacher(teacher, seed=2)
    result = bench.run(bench.command(workdir, f"--config.teacher={teacher}"))
    assert result.returncode == 2, result.stderr
    assert "teachers.teacher.weights: other weights than" in result.stderr


def _other_arithmetic(bench: Bench) -> None:
    """The same weights under another description."""
    teacher, workdir = bench.root / "other heads", bench.copy("other heads run")
    shutil.copytree(bench.teacher, teacher)
    card = (teacher / "config.json").read_text()
    (teacher / "config.json").write_text(card.replace('"heads": 2', '"heads": 4'))
    result = bench.run(bench.command(workdir, f"--config.teacher={teacher}"))
    assert result.returncode == 2, result.stdout + result.stderr
    assert "teachers.teacher.spec.heads: the checkpoint has 2, this run has 4" in result.stderr


def _longer(bench: Bench) -> None:
    """Extended at its end, and again by the same command killed in between: the same."""
    workdir, longer = bench.copy("longer"), STEPS + 8
    picture = (workdir / "metrics.jsonl").read_bytes()
    result = bench.run(bench.command(workdir, f"--config.steps={longer}"))
    assert result.returncode == 0, result.stdout + result.stderr
    words = f"--config.steps: {STEPS} until now, {longer} from here on; the learning rate follows"
    assert words in result.stdout
    assert (workdir / "metrics.jsonl").read_bytes().startswith(picture)
    schedule = warmup_cosine(1e-3, 10, longer)
    for row in rows(workdir)[STEPS + 1 :]:
        expected = np.asarray(schedule(row["step"] - 1)).item()
        assert row["learning_rate"] == pytest.approx(expected, rel=1e-5)
    assert proteus_jax.load(workdir / "student").card.source["steps"] == longer
    again = bench.copy("longer, in two")
    first = bench.run(
        bench.command(again, f"--config.steps={longer}", "--config.preemption_timeout_s=9")
    )
    assert first.returncode == 0
    for step in range(longer - 2, longer + 1, 2):
        shutil.rmtree(again / "checkpoints" / str(step))
    second = bench.run(bench.command(again, f"--config.steps={longer}"))
    assert second.returncode == 0, second.stderr
    assert_same(again, workdir, longer)


def _shorter(bench: Bench) -> None:
    """Than it has come already: it ends where it is."""
    workdir = bench.copy("shorter")
    result = bench.run(bench.command(workdir, "--config.steps=10"))
    assert result.returncode == 0, result.stderr
    assert proteus_jax.load(workdir / "student").card.source["steps"] == STEPS


def _two_at_once(bench: Bench) -> None:
    workdir = bench.root / "two at once"
    command = bench.command(workdir)
    first = bench.start([*command, "--config.steps=100000"])
    until(lambda: first.poll() is not None or (workdir / "metrics.jsonl").exists())
    second: subprocess.CompletedProcess = bench.run(command)
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert f"is in use by another run (process {first.pid} on " in second.stderr


def _moved(bench: Bench) -> None:
    """The same images and teacher elsewhere are the same."""
    for name in ("images", "teacher"):
        shutil.copytree(bench.root / name, bench.root / f"moved {name}")
    workdir = _half(bench, "moved run")
    more = [f"--config.data.root={bench.root / 'moved images'}"]
    more.append(f"--config.teacher={bench.root / 'moved teacher'}")
    result = bench.run(bench.command(workdir, *more))
    assert result.returncode == 0, result.stderr
    assert "--config.teachers.teacher.source: " in result.stdout
    assert rows(workdir) == rows(bench.undisturbed)
