"""The student in training: a ViT and, for each teacher, three heads that speak its language.

Source: arXiv 2407.10366 and the authors' pretrain/models_proteus_dinov2.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from proteus_jax.models.config import ViTSpec
from proteus_jax.models.layers import LayerNorm, torch_uniform
from proteus_jax.models.vit import Features, VisionTransformer

# The heads keep PyTorch's LayerNorm default, unlike the backbone's 1e-6.
HEAD_NORM_EPSILON = 1e-5


class HeadOutputs(NamedTuple):
    """A student's outputs for a batch in one teacher's space; `patch` is None without a masked
    pass.
    """

    token: Float[Array, "b t"]
    feature: Float[Array, "b n t"]
    patch: Float[Array, "m n t"] | None


class StudentOutput(NamedTuple):
    """The student's own features of a batch, and its answers to each teacher by name."""

    features: Features
    by_teacher: dict[str, HeadOutputs]


class Head(nnx.Module):
    """LayerNorm and a Linear with PyTorch's default initialization; trained, then thrown away."""

    def __init__(self, width: int, teacher_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = torch_uniform(width)
        self.norm = LayerNorm(width, HEAD_NORM_EPSILON, rngs=rngs)
        self.linear = nnx.Linear(
            width, teacher_width, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs
        )

    def __call__(self, tokens: Float[Array, "*b d"]) -> Float[Array, "*b t"]:
        """Tokens in the teacher's space."""
        return self.linear(self.norm(tokens))


class Heads(nnx.Module):
    """Token head, feature head and patch head for one teacher."""

    def __init__(self, width: int, teacher_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.token = Head(width, teacher_width, dtype=dtype, rngs=rngs)
        self.feature = Head(width, teacher_width, dtype=dtype, rngs=rngs)
        self.patch = Head(width, teacher_width, dtype=dtype, rngs=rngs)

    def __call__(self, features: Features, masked: Features | None) -> HeadOutputs:
        """Answers from the features of the unmasked pass and, where there is one, the masked."""
        patch = None if masked is None else self.patch(masked.patches)
        return HeadOutputs(self.token(features.cls), self.feature(features.patches), patch)


# What a teacher cannot be called: its heads are kept under its name.
TAKEN = frozenset(dir(nnx.Dict))


class Student(nnx.Module):
    """Backbone, and heads by the name of their teacher."""

    def __init__(
        self,
        spec: ViTSpec,
        teacher_widths: Mapping[str, int],
        *,
        dtype: DTypeLike = jnp.float32,
        attention: str = "xla",
        rngs: nnx.Rngs,
    ):
        self.backbone = VisionTransformer(spec, dtype=dtype, attention=attention, rngs=rngs)
        self.heads = nnx.Dict(
            {
                name: Heads(spec.width, width, dtype=dtype, rngs=rngs)
                for name, width in teacher_widths.items()
            }
        )

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        masked_images: Float[Array, "m h w 3"] | None = None,
        mask: Bool[Array, "m n"] | None = None,
        *,
        drop_path: float = 0.0,
        key: PRNGKeyArray | None = None,
        remat: str = "off",
    ) -> StudentOutput:
        """Unmasked predictions for `images`, masked ones for `masked_images` under `mask`."""
        training = {"drop_path": drop_path, "key": key, "remat": remat, "training": True}
        masked: Features | None = None
        if masked_images is None or mask is None:
            features = self.backbone(images, **training)
        else:
            features, masked = self._both_passes(images, masked_images, mask, training)
        outputs = {name: heads(features, masked) for name, heads in self.heads.items()}
        return StudentOutput(features, outputs)

    def _both_passes(
        self,
        images: jax.Array,
        masked_images: jax.Array,
        mask: jax.Array,
        training: dict[str, Any],
    ) -> tuple[Features, Features]:
        """One run of the backbone over both sets: compiled once, and fuller matmuls than two runs.

        Rows are laid out as (image, image, masked image) where half is masked, so that a batch
        split over devices stays where it is.
        """
        count = len(masked_images)
        if count == 0 or len(images) % count:
            raise ValueError(
                f"{len(images)} images do not divide into groups for {count} masked ones"
            )
        share = len(images) // count

        def interleave(plain: jax.Array, masked: jax.Array) -> jax.Array:
            groups = plain.reshape(count, share, *plain.shape[1:])
            rows = jnp.concatenate([groups, masked[:, None]], axis=1)
            return rows.reshape(count * (share + 1), *plain.shape[1:])

        rows = interleave(images, masked_images)
        row_mask = interleave(jnp.zeros((len(images), mask.shape[1]), bool), mask)
        everything = self.backbone(rows, row_mask, **training)

        def unmasked(tokens: jax.Array) -> jax.Array:
            groups = tokens.reshape(count, share + 1, *tokens.shape[1:])
            return groups[:, :share].reshape(len(images), *tokens.shape[1:])

        def masked(tokens: jax.Array) -> jax.Array:
            return tokens.reshape(count, share + 1, *tokens.shape[1:])[:, share]

        return Features(*map(unmasked, everything)), Features(*map(masked, everything))
