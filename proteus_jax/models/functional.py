"""The models as pure functions of a nested dict of arrays: from here outwards nobody knows NNX.

`init` makes a dict of float32 arrays, `shapes` describes it, the other methods read it. Blocks are
stacked: every array under "blocks" has a leading layer axis. Why plain dicts:
docs/decisions/0001-plain-arrays.md.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from proteus_jax.models.specs import ViTSpec
from proteus_jax.models.student import Predictions, Student
from proteus_jax.models.vit import Features, VisionTransformer

Params = dict[str, Any]


class _Functional:
    """An NNX module taken apart into its graph and a dict of arrays."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make
        self._graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        self.shapes: Params = nnx.to_pure_dict(state)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters, as the reference initialises them."""
        return nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key))))

    def _module(self, params: Params) -> Any:
        return nnx.merge(self._graph, nnx.State(params))


class BackboneFunction(_Functional):
    """A ViT: (params, normalised images [B, H, W, 3]) -> Features. Matmuls run in `dtype`."""

    def __init__(self, spec: ViTSpec, dtype: DTypeLike = jnp.float32):
        self.spec, self.dtype = spec, jnp.dtype(dtype)
        super().__init__(lambda rngs: VisionTransformer(spec, dtype=dtype, rngs=rngs))

    def __call__(
        self, params: Params, images: jax.Array, mask: jax.Array | None = None
    ) -> Features:
        """See VisionTransformer.__call__."""
        return self._module(params)(images, mask)

    def intermediates(
        self,
        params: Params,
        images: jax.Array,
        blocks: Sequence[int],
        mask: jax.Array | None = None,
        *,
        normalise: bool = True,
    ) -> tuple[Features, ...]:
        """See VisionTransformer.intermediates."""
        return self._module(params).intermediates(images, blocks, mask, normalise=normalise)

    def block_tokens(
        self,
        params: Params,
        images: jax.Array,
        blocks: Sequence[int],
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """See VisionTransformer.block_tokens."""
        return self._module(params).block_tokens(images, blocks, mask)

    def class_attention(self, params: Params, images: jax.Array) -> jax.Array:
        """See VisionTransformer.class_attention."""
        return self._module(params).class_attention(images)


class StudentFunction(_Functional):
    """A student with its heads; params have "backbone" and "heads", by teacher and then "token",
    "feature" and "patch".
    """

    def __init__(
        self,
        spec: ViTSpec,
        teacher_widths: Mapping[str, int],
        dtype: DTypeLike = jnp.float32,
        drop_path: float = 0.0,
        remat: str = "off",
    ):
        self.spec, self.dtype = spec, jnp.dtype(dtype)
        self.drop_path = drop_path
        self.remat = remat
        super().__init__(lambda rngs: Student(spec, teacher_widths, dtype=dtype, rngs=rngs))

    def __call__(
        self,
        params: Params,
        images: jax.Array,
        masked_images: jax.Array | None = None,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Predictions:
        """See Student.__call__; blocks are dropped only where a `key` is given, that is in
        training.
        """
        drop_path = 0.0 if key is None else self.drop_path
        return self._module(params)(
            images, masked_images, mask, drop_path=drop_path, key=key, remat=self.remat
        )
