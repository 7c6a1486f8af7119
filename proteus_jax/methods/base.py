"""The seam between the training step and what a student learns: a Method."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from proteus_jax.models.functional import Params, StudentFunction
from proteus_jax.models.vit import Features

# Losses by name, float32 scalars.
NamedLosses = dict[str, jax.Array]


class Batch(NamedTuple):
    """The images that a student learns from at once.

    `pixels` are normalized images of the student's size. `draws` are the arrays that the method
    drew for them. `key` is for stochastic depth.
    """

    pixels: Float[Array, "b h w 3"]
    draws: Any
    key: PRNGKeyArray


@runtime_checkable
class Method(Protocol):
    """A way for a student to learn from its teachers.

    The training step normalizes the images, asks the teachers for their features, takes the
    gradients of `loss` and updates the student. All else is the method's.
    """

    @property
    def group(self) -> int:
        """How many images belong together: batches, their parts and the shares of devices are
        multiples of it.
        """
        ...

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names of the losses, in the order in which they are logged; none is "loss", which is
        their sum.
        """
        ...

    @property
    def heads(self) -> frozenset[str]:
        """Which of the primary teacher's heads learn: any of "token", "feature" and "patch".
        Evaluation uses no others.
        """
        ...

    @property
    def masked_share(self) -> float:
        """The share of the images that goes through the student a second time, under a mask."""
        ...

    def problems(self, patches: int) -> list[str]:
        """Lists what is wrong with the fields for images of so many patches, in words that begin
        with the field's name below `config.method`.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Returns, as JSON values, what must not change when a run is resumed."""
        ...

    def draw(self, key: PRNGKeyArray, images: int, patches: int) -> Any:
        """Draws what is random of a batch of so many images of so many patches each.

        Returns a pytree of arrays, each with a number of rows for every group of images.
        """
        ...

    def loss(
        self,
        student: StudentFunction,
        params: Params,
        batch: Batch,
        targets: Mapping[str, Features],
    ) -> tuple[Float[Array, ""], NamedLosses]:
        """Computes what is minimized, and the losses that are logged with it, one for each of
        `loss_names`.

        `targets` are the features of each teacher, by its name, without a gradient.
        """
        ...
