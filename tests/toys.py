"""One of each kind that docs/extending.md adds, through public names alone; run as a program it is
`python main.py` with all of them.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from proteus_jax import configs
from proteus_jax.cli.app import main
from proteus_jax.data.dataset import open_source
from proteus_jax.data.sources.base import Source
from proteus_jax.data.sources.registry import SCHEMES
from proteus_jax.errors import InputError
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import class_token
from proteus_jax.evaluation.protocol import Context, Protocol
from proteus_jax.evaluation.protocols.registry import PROTOCOLS
from proteus_jax.methods import proteus
from proteus_jax.methods.base import Batch, NamedLosses
from proteus_jax.methods.proteus import Proteus
from proteus_jax.methods.registry import METHODS, MethodSpec
from proteus_jax.models.functional import Params, StudentFunction
from proteus_jax.models.normalization import IMAGENET
from proteus_jax.models.vit import Features
from proteus_jax.schema import ABOVE_ZERO, at_least
from proteus_jax.weights.convert import name_maps
from proteus_jax.weights.convert.families import FAMILIES, LAYOUTS, Family, Layout


@dataclasses.dataclass(frozen=True)
class Direction:
    """A method: the direction of the class token alone."""

    temperature: float
    group: int = 1
    masked_share: float = 0.0
    heads: frozenset[str] = frozenset({"token"})
    loss_names: tuple[str, ...] = ("direction_loss",)

    def draw(self, key: jax.Array, images: int, patches: int) -> None:
        """Nothing is random."""

    def problems(self, patches: int) -> list[str]:
        """Nothing can be wrong."""
        return []

    def fingerprint(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def loss(
        self,
        student: StudentFunction,
        params: Params,
        batch: Batch,
        targets: Mapping[str, Features],
    ) -> tuple[jax.Array, NamedLosses]:
        outputs = student(
            params, batch.pixels, None, None, batch.key if student.drop_path else None
        )
        cosines = [
            optax.cosine_similarity(outputs.by_teacher[name].token, target.cls, epsilon=1e-6)
            for name, target in targets.items()
        ]
        loss = jnp.mean(1.0 - jnp.stack(cosines)) / self.temperature
        return loss, {"direction_loss": loss}


class WithDirection(Proteus):
    """A loss beside the paper's three."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        return (*super().loss_names, "direction_loss")

    def loss(
        self,
        student: StudentFunction,
        params: Params,
        batch: Batch,
        targets: Mapping[str, Features],
    ) -> tuple[jax.Array, NamedLosses]:
        total, named = super().loss(student, params, batch, targets)
        more, own = Direction(1.0).loss(student, params, batch, targets)
        return total + more, named | own


def with_direction(fields: Mapping[str, Any], teachers: Mapping[str, Any]) -> WithDirection:
    return WithDirection(**proteus.settings(fields, teachers))


class Stripes(Source):
    """A source: images that are computed, of as many kinds as its name says."""

    def __init__(self, place: str):
        count = place.partition(":")[2]
        if not count.isdigit():
            raise InputError(f"{place}: expected a number of images after the colon")
        self._count = int(count)
        self.fingerprint = hashlib.sha256(place.encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"stripes {index}"

    def key(self, index: int) -> str:
        return f"{self.fingerprint} {index}"

    def read(self, index: int) -> np.ndarray:
        rows = np.arange(40)[:, None, None] * (index + 3) % 256
        return np.broadcast_to(rows, (40, 40, 3)).astype(np.uint8)


class Settings(NamedTuple):
    images: int


def open_first(config: EvalConfig) -> Source:
    return open_source(config.data.root)[0]


def measure(context: Context, source: Source) -> dict[str, Any]:
    chosen = np.arange(min(context.config.settings.images, len(source)))
    table = context.frozen.table(class_token, source, context.view, context.reading, chosen=chosen)
    mean = float(np.linalg.norm(table.values, axis=1).mean())
    context.say(f"  mean norm {mean:.3f}")
    return {"mean": mean, "images": len(table.numbers), "data": {"root": context.config.data.root}}


NORM = Protocol(
    name="norm",
    settings=Settings,
    rules={"images": at_least(1)},
    open=open_first,
    measure=measure,
    scores=lambda results: {"mean": results["mean"]},
    cells=lambda results: {"norm": results["mean"]},
)


# DINOv2's names, and one that carries nothing a backbone needs.
TOY_NAMES = dataclasses.replace(name_maps.DINOV2, ignored_keys="toy_marker")


def add() -> None:
    """Adds all of them."""
    METHODS["direction"] = MethodSpec(
        lambda fields, teachers: Direction(fields["temperature"]), {"temperature": ABOVE_ZERO}
    )
    METHODS["with_direction"] = MethodSpec(with_direction, proteus.RULES)
    SCHEMES["stripes"] = Stripes
    PROTOCOLS["norm"] = NORM
    configs.__path__.append(str(Path(__file__).parent / "toy_configs"))
    FAMILIES["toy"] = Family({"norm_epsilon": 1e-5}, IMAGENET, "a toy")
    LAYOUTS.insert(0, Layout(TOY_NAMES, ("toy",), lambda arrays: "toy_marker" in arrays))


if __name__ == "__main__":
    add()
    raise SystemExit(main())
