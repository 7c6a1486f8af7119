"""The three objectives of Proteus (arXiv 2407.10366, section 3), each a plain mean of squared
errors in float32.

No centering, scaling or temperature anywhere: both sides are tokens after their own final
LayerNorm, the student's through a head.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from proteus_jax.models.student import HeadOutputs
from proteus_jax.models.vit import Features


class LossWeights(NamedTuple):
    """Factors of the three losses in their sum; the paper's are all 1."""

    token: float = 1.0
    feature: float = 1.0
    patch: float = 1.0


class Losses(NamedTuple):
    """The weighted sum, and the three losses before their weights; float32 scalars."""

    loss: Float[Array, ""]
    token_loss: Float[Array, ""]
    feature_loss: Float[Array, ""]
    patch_loss: Float[Array, ""]


def _squared_error(
    prediction: Float[Array, "*s t"], target: Float[Array, "*s t"]
) -> Float[Array, "*s"]:
    """Mean over channels of the squared error of each token, float32."""
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.square(difference), axis=-1)


def token_loss(token: Float[Array, "b t"], target: Float[Array, "b t"]) -> Float[Array, ""]:
    """Class token against the teacher's."""
    return jnp.mean(_squared_error(token, target))


def feature_loss(
    token: Float[Array, "b t"], feature: Float[Array, "b n t"], target: Features
) -> Float[Array, ""]:
    """All tokens against the teacher's; the class row is the token head's, so it counts here a
    second time.
    """
    rows = jnp.concatenate(
        [_squared_error(token, target.cls)[:, None], _squared_error(feature, target.patches)],
        axis=1,
    )
    return jnp.mean(rows)


def patch_loss(
    patch: Float[Array, "m n t"], target: Float[Array, "m n t"], mask: Bool[Array, "m n"]
) -> Float[Array, ""]:
    """Masked patches only, against what the teacher says of them unmasked."""
    return jnp.sum(_squared_error(patch, target) * mask) / jnp.sum(mask)


def distillation_losses(
    outputs: HeadOutputs,
    target: Features,
    masked_target: Float[Array, "m n t"] | None,
    mask: Bool[Array, "m n"] | None,
    weights: LossWeights,
) -> Losses:
    """The objectives of a batch for one teacher. Without a masked pass the patch loss is 0 and must
    have the weight 0.
    """
    token = token_loss(outputs.token, target.cls)
    feature = feature_loss(outputs.token, outputs.feature, target)
    if outputs.patch is None or masked_target is None or mask is None:
        patch = jnp.zeros(())
    else:
        patch = patch_loss(outputs.patch, masked_target, mask)
    loss = weights.token * token + weights.feature * feature + weights.patch * patch
    return Losses(loss, token, feature, patch)
