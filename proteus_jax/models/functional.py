"""The models as pure functions of a nested dict of arrays: from here outwards nobody knows NNX.

`init` makes a dict of float32 arrays, `shapes` describes it, the other methods read it. Blocks are
stacked: every array under "blocks" has a leading layer axis. Why plain dicts:
docs/decisions/0001-plain-arrays.md.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from proteus_jax.models.attention import choose
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.pooling import PoolParts
from proteus_jax.models.student import Student, StudentOutput
from proteus_jax.models.vit import Features, VisionTransformer

Params = dict[str, Any]


def in_precision(params: Params, dtype: DTypeLike) -> Params:
    """Params with the weights of matmuls in `dtype`. What is added, multiplied or normalized with
    keeps its own: it is little, and its rounding would add to that of the matmuls.
    """

    def cast(path: tuple[Any, ...], array: Any) -> Any:
        return array.astype(dtype) if path[-1].key == "kernel" else array

    return jax.tree_util.tree_map_with_path(cast, params)


def stored_shapes(backbone: "BackboneFunction") -> Params:
    """The shapes and dtypes of a backbone's params in its own precision."""
    return jax.eval_shape(lambda params: in_precision(params, backbone.dtype), backbone.shapes)


def without_layer_scale(params: Params) -> Params:
    """A backbone's params for the same spec with `layer_scale` false: the factors are multiplied
    into the Linear before them, as LayerScale does it at each call, and then rounded once.
    """
    blocks = dict(params["blocks"])
    for scale, branch, last in (("ls1", "attn", ("proj",)), ("ls2", "mlp", ("fc2", "w3"))):
        if scale not in blocks:
            continue
        factors = np.asarray(blocks.pop(scale)["gamma"], np.float32)
        branches = dict(blocks[branch])
        for name in set(last) & branches.keys():
            linear = branches[name]
            branches[name] = {
                "kernel": np.asarray(linear["kernel"]) * factors[:, None],
                "bias": np.asarray(linear["bias"]) * factors,
            }
        blocks[branch] = branches
    return {**params, "blocks": blocks}


class _Functional:
    """An NNX module taken apart into its graph and a dict of arrays."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make
        self._graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        self.shapes: Params = nnx.to_pure_dict(state)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters, as the reference initializes them."""
        return nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key))))

    def _module(self, params: Params) -> Any:
        return nnx.merge(self._graph, nnx.State(params))


class BackboneFunction(_Functional):
    """A ViT: (params, normalized images [B, H, W, 3]) -> Features. Matmuls run in `dtype`,
    attention is one of attention.IMPLEMENTATIONS.
    """

    def __init__(self, spec: ViTSpec, dtype: DTypeLike = jnp.float32, attention: str = "xla"):
        self.spec, self.dtype, self.attention = spec, jnp.dtype(dtype), attention
        super().__init__(
            lambda rngs: VisionTransformer(spec, dtype=dtype, attention=attention, rngs=rngs)
        )

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
        normalize: bool = True,
    ) -> tuple[Features, ...]:
        """See VisionTransformer.intermediates."""
        return self._module(params).intermediates(images, blocks, mask, normalize=normalize)

    def block_tokens(
        self,
        params: Params,
        images: jax.Array,
        blocks: Sequence[int],
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """See VisionTransformer.block_tokens."""
        return self._module(params).block_tokens(images, blocks, mask)

    def embed(self, params: Params, images: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """See VisionTransformer.embed."""
        return self._module(params).embed(images, mask)

    def features(self, params: Params, tokens: jax.Array) -> Features:
        """Features from the tokens after the last block."""
        return self._module(params).features(tokens, normalize=True)

    def pool_parts(self, params: Params, tokens: jax.Array) -> PoolParts:
        """See VisionTransformer.pool_parts."""
        return self._module(params).pool_parts(tokens)

    def class_attention(self, params: Params, images: jax.Array) -> jax.Array:
        """See VisionTransformer.class_attention."""
        return self._module(params).class_attention(images)


def fastest_attention(spec: ViTSpec, dtype: DTypeLike) -> str:
    """The implementation for the devices that are here, with a warning where it is not their
    first.
    """
    choice = choose("auto", jax.default_backend(), dtype, spec.width // spec.heads)
    if choice.remark:
        warnings.warn(choice.remark, stacklevel=3)
    return choice.implementation


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
        attention: str = "xla",
    ):
        self.spec, self.dtype, self.attention = spec, jnp.dtype(dtype), attention
        self.drop_path = drop_path
        self.remat = remat
        super().__init__(
            lambda rngs: Student(spec, teacher_widths, dtype=dtype, attention=attention, rngs=rngs)
        )

    @functools.cached_property
    def backbone(self) -> BackboneFunction:
        """The student without its heads; its params are those under "backbone"."""
        return BackboneFunction(self.spec, self.dtype, self.attention)

    def __call__(
        self,
        params: Params,
        images: jax.Array,
        masked_images: jax.Array | None = None,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> StudentOutput:
        """See Student.__call__; blocks are dropped only where a `key` is given, that is in
        training.
        """
        drop_path = 0.0 if key is None else self.drop_path
        return self._module(params)(
            images, masked_images, mask, drop_path=drop_path, key=key, remat=self.remat
        )
