"""Proteus: a student learns its teachers' class tokens, all their tokens, and, under a mask, their
patches.

Source: arXiv 2407.10366, section 3, and the authors' pretrain/models_proteus_dinov2.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from proteus_jax.methods.base import Batch, NamedLosses
from proteus_jax.methods.config import TeacherConfig
from proteus_jax.methods.losses import Losses, LossWeights, distillation_losses
from proteus_jax.methods.masking import random_masks
from proteus_jax.models.functional import Params, StudentFunction
from proteus_jax.models.vit import Features
from proteus_jax.schema import Rule, at_least, share

# The fields of `config.method`, beside its name.
RULES: dict[str, Rule] = {
    **{f"loss_weights.{name}": at_least(0) for name in LossWeights._fields},
    "mask_ratio": share(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proteus:
    """The paper's method; see proteus_jax.methods.base.Method.

    `loss_weights` are each teacher's, by its name, the primary teacher first; `mask_ratio` is the
    share of the patches that a mask hides.
    """

    loss_weights: Mapping[str, LossWeights]
    mask_ratio: float

    @property
    def masks(self) -> bool:
        """True where any teacher's patches are predicted under a mask."""
        return any(weights.patch > 0 for weights in self.loss_weights.values())

    @property
    def _primary(self) -> str:
        return next(iter(self.loss_weights))

    @property
    def group(self) -> int:
        """An image that is masked, and one that is not."""
        return 2 if self.masks else 1

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The three losses of each teacher; the primary teacher's without its name."""
        names = [name for name in Losses._fields if name != "loss"]
        return tuple(
            self._prefix(teacher) + name for teacher in self.loss_weights for name in names
        )

    @property
    def heads(self) -> frozenset[str]:
        """The heads whose losses count."""
        weights = self.loss_weights[self._primary]._asdict()
        return frozenset(name for name, weight in weights.items() if weight > 0)

    @property
    def masked_share(self) -> float:
        """Half of the images, where any patch is masked."""
        return 0.5 if self.masks else 0.0

    def problems(self, patches: int) -> list[str]:
        """A teacher whose losses all have the factor 0, and a mask that hides nothing."""
        problems = [
            "loss_weights: expected a factor above 0 for one of token, feature and patch of the "
            f"teacher {teacher!r}"
            for teacher, weights in self.loss_weights.items()
            if not any(weights)
        ]
        if self.masks and int(patches * self.mask_ratio) < 1:
            problems.append(
                f"mask_ratio: {self.mask_ratio} masks none of the {patches} patches of a crop"
            )
        return problems

    def fingerprint(self) -> dict[str, Any]:
        """The factors of the losses, by teacher and by name."""
        return {teacher: weights._asdict() for teacher, weights in self.loss_weights.items()}

    def _prefix(self, teacher: str) -> str:
        return "" if teacher == self._primary else f"{teacher}_"

    def draw(self, key: PRNGKeyArray, images: int, patches: int) -> Bool[Array, "m n"] | None:
        """Masks for every second image; None where nothing is masked."""
        if not self.masks:
            return None
        return random_masks(key, images // 2, patches, self.mask_ratio)

    def loss(
        self,
        student: StudentFunction,
        params: Params,
        batch: Batch,
        targets: Mapping[str, Features],
    ) -> tuple[Float[Array, ""], NamedLosses]:
        """The weighted sum over all teachers, and each teacher's losses before their weights."""
        key = batch.key if student.drop_path else None
        losses = student_losses(
            student, params, batch.pixels, targets, batch.draws, self.loss_weights, key=key
        )
        named = {
            self._prefix(teacher) + name: value
            for teacher, each in losses.items()
            for name, value in each._asdict().items()
            if name != "loss"
        }
        return sum((each.loss for each in losses.values()), jnp.zeros(())), named


def from_config(fields: Mapping[str, Any], teachers: Mapping[str, TeacherConfig]) -> Proteus:
    """Makes the method from `config.method` and the teachers."""
    return Proteus(**settings(fields, teachers))


def settings(fields: Mapping[str, Any], teachers: Mapping[str, TeacherConfig]) -> dict[str, Any]:
    """Reads what `Proteus` and its subclasses are made with; teachers' own factors come first."""
    shared = fields["loss_weights"]

    def weights_of(teacher: TeacherConfig) -> LossWeights:
        own = teacher.loss_weights
        factors = ((shared[name], own.get(name)) for name in LossWeights._fields)
        return LossWeights(*(one if other is None else other for one, other in factors))

    return {
        "loss_weights": {name: weights_of(teacher) for name, teacher in teachers.items()},
        "mask_ratio": fields["mask_ratio"],
    }


def student_losses(
    student: StudentFunction,
    params: Params,
    images: Float[Array, "b h w 3"],
    targets: Mapping[str, Features],
    mask: Bool[Array, "m n"] | None,
    weights: Mapping[str, LossWeights],
    *,
    masked_rows: slice = slice(None, None, 2),
    key: jax.Array | None = None,
) -> dict[str, Losses]:
    """The objectives of one student on one batch, by teacher; `masked_rows` are the half of the
    batch that `mask` covers.

    The masked pass runs those rows only. The reference runs the whole batch through it and uses
    half: without stochastic depth the losses and gradients are the same, at three quarters of the
    cost. Every second row rather than the first half, so that on many devices each has its share
    and nothing moves.
    """
    masked_images = None if mask is None else images[masked_rows]
    predictions = student(params, images, masked_images, mask, key)
    losses = {}
    for name, target in targets.items():
        # A teacher whose patches count for nothing is not asked for them.
        wanted = mask is not None and weights[name].patch > 0
        masked_target = target.patches[masked_rows] if wanted else None
        losses[name] = distillation_losses(
            predictions.by_teacher[name], target, masked_target, mask, weights[name]
        )
    return losses
