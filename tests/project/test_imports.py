"""The architecture: modules import downwards, and each outside library has one door."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# From the ground up: a module may import what stands before it, or in its own package. Packages
# that stand together do not know each other.
LAYERS = [
    ("errors",),
    ("models", "schema"),
    ("config",),
    ("methods", "runtime"),
    ("checkpoint", "data", "slicing", "weights"),
    ("feature_extractor",),
    ("loading",),
    ("engine",),
    ("evaluation",),
    ("training",),
    ("cli",),
]
# Where an outside library may be named.
DOORS = {
    "flax": ("models.",),
    "orbax": ("checkpoint.checkpointer",),
    "etils": ("checkpoint.store", "checkpoint.checksums"),
    "grain": ("data.",),
    "tensorflow_datasets": ("data.",),
    "PIL": (
        "data.pillow_images",
        "data.transforms.center_crop",
        "data.transforms.native_size",
        "evaluation.reporting.figures",
        "evaluation.reporting.snapshots",
    ),
    "cv2": ("data.",),
    "simplejpeg": ("data.decode",),
    "pyarrow": ("runtime.remote_fs", "data.sources.parquet", "evaluation.feature_files"),
    "tensorboardX": ("runtime.metric_writer",),
    "fsspec": ("runtime.workdir",),
    "huggingface_hub": ("weights.hub",),
    "clu": ("runtime.metric_writer",),
    "torch": ("weights.convert.",),
    "transformers": ("weights.convert.",),
    "onnx": ("weights.convert.",),
    "ml_collections": ("config",),
}
# What runs on a bare accelerator image.
CORE = (
    "models.",
    "methods.",
    "training.random_erasing",
    "training.train_state",
    "training.train_step",
    "training.optimizer",
    "runtime.sharding",
    "training.builder",
    "models.flops",
)
CORE_LIBRARIES = {"jax", "flax", "optax", "jaxtyping", "numpy", "proteus_jax"}

PACKAGE = ROOT / "proteus_jax"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    found = set()
    for name in imports(path):
        parts = name.split(".")[1:] if name.startswith("proteus_jax.") else []
        while parts and ".".join(parts) not in MODULES:
            parts.pop()
        if parts:
            found.add(".".join(parts))
    return found


def layer(module: str) -> int:
    found = [
        level
        for level, names in enumerate(LAYERS)
        if any(module == name or module.startswith(f"{name}.") for name in names)
    ]
    assert len(found) == 1, f"{module} stands in {len(found)} layers"
    return found[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module: str) -> None:
    for other in own_modules(MODULES[module]):
        same = other.split(".")[0] == module.split(".")[0]
        assert same or layer(other) < layer(module), f"{module} imports {other}"


def test_no_circles() -> None:
    graph = {module: own_modules(path) for module, path in MODULES.items()}
    while graph:
        ready = [module for module, below in graph.items() if not below & graph.keys()]
        assert ready, f"a circle among {sorted(graph)}"
        for module in ready:
            del graph[module]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_doors(module: str) -> None:
    for name in imports(MODULES[module]):
        library = name.split(".")[0]
        doors = DOORS.get(library)
        assert doors is None or any(f"{module}".startswith(door) for door in doors), (
            f"{module} imports {library}"
        )
        if module.startswith("data."):
            assert library != "jax"
        if module.startswith(CORE):
            assert library in CORE_LIBRARIES or library in sys.stdlib_module_names


def test_importing_the_package_is_light() -> None:
    code = "import sys, proteus_jax; sys.exit(any(n in sys.modules for n in ('jax', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_training_needs_neither_tensorflow_nor_torch() -> None:
    code = (
        "import sys; sys.modules['tensorflow'] = sys.modules['torch'] = None; "
        "import proteus_jax.cli.train, proteus_jax.cli.convert"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
