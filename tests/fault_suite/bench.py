"""Small runs of the real command line, and what two of them must have in common."""

import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import compiler
import jax
import numpy as np
import orbax.checkpoint as ocp
import warm
from conftest import ROOT, TINY, photograph
from PIL import Image

from proteus_jax.models.functional import BackboneFunction
from proteus_jax.runtime.metric_writer import read_metrics
from proteus_jax.weights.model_dir import ModelCard, save_model

STEPS, EVERY = 24, 2
# All that a state can hold, beside what the plain run has.
RICH = (
    "--config.student=vit_tiny_1blocks,vit_tiny_2blocks",
    *(
        "--config.teachers.teacher.standardize=true",
        "--config.ema_decay=0.9",
        "--config.drop_path=0.2",
    ),
    *("--config.grad_accum_steps=2", "--config.data.repeated_aug=2", "--config.data.workers=1"),
)
CLOCK = ("images_per_second", "images_per_second_per_device", "data_wait")
# Sets a limit on itself, then becomes another program.
_LIMITED = """
import os, resource, sys
name, value, *command = sys.argv[1:]
resource.setrlimit(getattr(resource, name), (int(value), resource.RLIM_INFINITY))
os.execv(command[0], command)
"""


class Limit(NamedTuple):
    """Of a process, by its name in the module `resource`."""

    name: str
    value: int


class Bench:
    """A folder with images, a teacher, and a run that nothing disturbs."""

    def __init__(self, root: Path):
        self.root = root
        self.images, self.teacher = root / "images", root / "teacher"
        self.images.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in range(24):
            Image.fromarray(photograph(rng, 40, 48)).save(self.images / f"{number}.png")
        self.write_teacher(self.teacher, seed=1)
        self.undisturbed = self._undisturbed("undisturbed")

    def _undisturbed(self, name: str, *more: str) -> Path:
        command = self.command(self.root / name, "--config.keep_checkpoints=100", *more)
        result = self.run(command)
        assert result.returncode == 0, result.stdout + result.stderr
        return self.root / name

    @functools.cached_property
    def rich(self) -> Path:
        """The other run that nothing disturbs."""
        return self._undisturbed("undisturbed, rich", *RICH)

    def write_teacher(self, folder: Path, *, seed: int) -> None:
        """A random ViT as a model directory."""
        params = BackboneFunction(TINY).init(jax.random.key(seed))
        save_model(folder, params, ModelCard(spec=TINY, license="none"))

    def environment(self, **more: str) -> dict[str, str]:
        """One device, this folder as home, and a cache of compiled programs of its own."""
        return os.environ | {
            "XLA_FLAGS": compiler.FLAGS,
            "JAX_PLATFORMS": "cpu",
            "HOME": str(self.root),
            "PROTEUS_JAX_CACHE": str(self.root / "cache"),
            **more,
        }

    def command(self, workdir: Path, *more: str) -> list[str]:
        """A run of a few steps that saves after every second one; later words win."""
        return [
            sys.executable,
            str(ROOT / "main.py"),
            f"--config={ROOT / 'configs' / 'quickstart_paper.py'}",
            f"--workdir={workdir}",
            f"--config.data.root={self.images}",
            f"--config.teacher={self.teacher}",
            "--config.student=vit_tiny_1blocks",
            "--config.eval.root=",
            f"--config.steps={STEPS}",
            "--config.batch=4",
            "--config.data.crop=28",
            "--config.data.held_out.share=0",
            f"--config.checkpoint_every={EVERY}",
            *more,
        ]

    def start(self, command: list[str], **more: str) -> subprocess.Popen:
        """The process, its output together in one text, a group of its own."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run_limited(self, command: list[str], limit: Limit) -> subprocess.CompletedProcess:
        """To its end, which the limit may bring about."""
        return self.run([sys.executable, "-c", _LIMITED, limit.name, str(limit.value), *command])

    def run(self, command: list[str], **more: str) -> subprocess.CompletedProcess:
        """To its end."""
        return warm.run(command, self.root, self.environment(**more), timeout=300)

    def goes_on_and_is_the_same(
        self, workdir: Path, *more: str, expected: Path | None = None
    ) -> str:
        """Runs to the end and compares with an undisturbed run; returns what was printed."""
        result = self.run(self.command(workdir, *more))
        assert result.returncode == 0, result.stdout + result.stderr
        assert_same(workdir, expected or self.undisturbed)
        return result.stdout

    def copy(self, name: str) -> Path:
        """The undisturbed run once more, to be spoilt."""
        target = self.root / name
        shutil.copytree(self.undisturbed, target)
        return target


def rows(workdir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key not in CLOCK}
        for row in read_metrics(workdir)
    ]


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Everything that a checkpoint holds, by name."""
    place = (workdir / "checkpoints" / str(step)).absolute()
    items = [name for name in ("params", "progress", "statistics") if (place / name).exists()]
    handler = ocp.CompositeCheckpointHandler(*items)
    wanted = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in items})
    with ocp.Checkpointer(handler) as reader:
        found = reader.restore(place, args=wanted)
    leaves = jax.tree_util.tree_flatten_with_path({name: found[name] for name in items})[0]
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}


def assert_same(workdir: Path, expected: Path, step: int = STEPS) -> None:
    """Parameters, optimizer, averages, statistics, exported students and metrics, bit for bit."""
    assert rows(workdir) == rows(expected)
    exported = sorted(path.relative_to(expected) for path in expected.glob("student*/**/*.safet*"))
    assert exported
    for weights in exported:
        assert (workdir / weights).read_bytes() == (expected / weights).read_bytes(), weights
    ours, theirs = arrays(workdir, step), arrays(expected, step)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].tobytes() == array.tobytes(), name


def until(condition: Any, seconds: float = 120.0) -> None:
    """Waits for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)
