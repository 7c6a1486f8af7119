"""Eight fake CPU devices, and small things that many tests share."""

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiler

# One compilation cache for all tests and the processes that they start, removed with the session.
if "PROTEUS_JAX_TEST_PROGRAMS" not in os.environ:
    programs = tempfile.mkdtemp(prefix="proteus-jax-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ |= {
        "PROTEUS_JAX_TEST_PROGRAMS": programs,
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
# Before jax is imported: its CPU backend reads these when it starts.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        compiler.FLAGS,
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from proteus_jax.config import Override, load
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.runtime.console import Console
from proteus_jax.training.schema import schema_of
from proteus_jax.weights.model_dir import ModelCard, save_model

ROOT = Path(__file__).parent.parent
TINY = ViTSpec(width=32, depth=2, heads=2, grid=4)
CLASSES = ("apple", "pear", "été & <b>")


def photograph(rng: np.random.Generator, height: int = 60, width: int = 80) -> np.ndarray:
    """Something with edges and colors, uint8 [H, W, 3]."""
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    resized = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def shuffled(params: Any, seed: int = 0) -> Any:
    """Every array moved away from where it starts: no gamma of 1, no bias of 0, no tiny token."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda array: (
            jnp.asarray(array)
            + 0.3 * rng.normal(size=array.shape).astype(np.float32) * (array.ndim < 3 or 0.3)
        ),
        params,
    )


def evaluation_config(protocol: str, fields: dict[str, Any]) -> EvalConfig:
    """A protocol's configuration with some fields, by their dotted names."""
    overrides = [Override(name, str(value)) for name, value in fields.items()]
    file = str(ROOT / "configs" / "eval" / f"{protocol}.py")
    configuration, problems = load(file, overrides, schema_of)
    assert not problems
    return configuration


class Heard(Console):
    """Keeps what it is to print and show."""

    def __init__(self):
        # Without the file that standard error goes to.
        self.lines: list[str] = []
        self.live: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)

    def log(self, text: str) -> None:
        pass

    def error(self, text: str) -> None:
        self.lines.append(text)

    def dismiss_watcher(self) -> None:
        """There is none."""

    def progress(self, text: str, *, last: bool = False) -> None:
        self.live.append(text)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No other test with worker processes at the same time: shared memory is the machine's."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / "alone", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images in a tree, of several formats, with spaces and accents in their names."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(1)
    for number in range(40):
        suffix = (".jpg", ".png", ".webp", ".bmp")[number % 4]
        place = folder / f"sub folder {number % 3}" / "été"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(rng)).save(place / f"image {number}{suffix}")
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT as a model directory."""
    directory = tmp_path_factory.mktemp("models") / "teacher"
    params = BackboneFunction(TINY).init(jax.random.key(1))
    save_model(directory, params, ModelCard(spec=TINY, license="none"))
    return directory


def write_classes(
    folder: Path, rng: np.random.Generator, each: int, classes: tuple[str, ...] = CLASSES
) -> Path:
    """Images of one color a class, with noise."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        color = np.eye(3)[label % 3] * 200
        for number in range(each):
            pixels = rng.normal(color, 60, (30, 40, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def labeled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, fourteen images each to train on, five to test on."""
    folder, rng = tmp_path_factory.mktemp("labeled"), np.random.default_rng(4)
    write_classes(folder / "train", rng, 14)
    write_classes(folder / "test", rng, 5)
    return folder
