"""The model that is sliced, passed over block by block."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from proteus_jax.models.blockwise import (
    FEED_FORWARD_OUTPUT,
    BlockwiseFunction,
)
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.runtime import sharding
from proteus_jax.slicing.least_squares import (
    product,
    rows,
    standardized,
)
from proteus_jax.slicing.pool import PoolSums, sums_of

# The weight of what the last norm reads among what all norms read.
FINAL_WEIGHT = 4.0
# Heads and units are chosen by their moments on this many tokens for each hidden unit.
TOKENS_A_UNIT, LEAST_GROUPS = 8, 4
Stream = Float[Array, "n b t d"]


class Grams(NamedTuple):
    """Second moments of what a block's two last Linears read."""

    n: Any
    heads: Any
    heads_sum: Any
    units: Any
    units_sum: Any


class SourceModel:
    """The model that is sliced, on the devices, with the images that it is sliced on.

    It is passed over block by block. Its stream on all images is kept on the devices, divided over
    them: 4 * width bytes for each token of each image, three times at most.
    """

    def __init__(
        self,
        params: Params,
        function: BackboneFunction,
        images: UInt8[Array, "n b h w 3"],
        normalize: Callable[[Array], Array],
        mesh: Mesh,
    ):
        """`params` are the source's on the devices, without LayerScale, its position table that of
        the images' grid; `images` are in n groups, each divided over the devices.
        """
        if function.spec.layer_scale:
            raise ValueError("expected params whose LayerScale is in the Linears before it")
        self.spec, self.function, self.mesh = function.spec, function, mesh
        self.params, self._images, self._normalize = params, images, normalize
        self.parts = BlockwiseFunction(function)
        self._whole = sharding.replicated(mesh)
        self._divided = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
        self._advance = self.jitted(self._teacher_block, streams=2)
        self._grams = self.jitted(self._gram_sums)

    def embedded(self, parts: BlockwiseFunction, params: Params) -> Stream:
        """The stream that a model's first block reads, of all images."""

        def embed(params: Params, images: Array) -> Array:
            def one(group: Array) -> Array:
                return parts.embed(params, self._normalize(group)).astype(jnp.float32)

            return jax.lax.map(one, images)

        return jax.jit(sharding.traced_on(self.mesh, embed), out_shardings=self._divided)(
            params, self._images
        )

    def advance(self, number: int, stream: Stream) -> tuple[Stream, Stream]:
        """The source's stream in the middle of a block, and after it."""
        return self._advance(self.block(number), stream)

    def grams(self, number: int, before: Stream, middle: Stream) -> Grams:
        """Moments of what the heads and units of a block say, on as many images as they need."""
        _, images, tokens, _ = before.shape
        groups = max(LEAST_GROUPS, -(-TOKENS_A_UNIT * self.spec.hidden // (images * tokens)))
        seen = before[:groups], middle[:groups]
        return jax.device_get(self._grams(self.block(number), *seen))

    def pool_sums(self, stream: Stream) -> PoolSums:
        """Moments of what the source's attention pool computes, of its last stream."""

        def summed(params: Params, stream: Array) -> PoolSums:
            def one(tokens: Array) -> PoolSums:
                return sums_of(self.parts.pool(params, tokens), self.spec.norm_epsilon)

            return jax.tree.map(lambda parts: parts.sum(axis=0), jax.lax.map(one, stream))

        return self.jitted(summed)(self.params, stream)

    def block(self, number: int) -> Params:
        """One block's params, on the devices."""
        return jax.tree.map(lambda stacked: stacked[number], self.params["blocks"])

    def input_covariance(self, progress: Callable[[str], None]) -> np.ndarray:
        """[d, d] of what all norms read, standardized."""
        epsilon = self.spec.norm_epsilon

        def summed(stream: Array) -> Array:
            def one(total: Array, tokens: Array) -> tuple[Array, None]:
                standard = standardized(tokens, epsilon)
                return total + product(standard, standard), None

            width = stream.shape[-1]
            total, _ = jax.lax.scan(one, jnp.zeros((width, width)), stream)
            return total / (stream.size // width)

        covariance = self.jitted(summed)
        stream, total = self.embedded(self.parts, self.params), 0.0
        for number in range(self.spec.depth):
            progress(f"looking at block {number + 1} of {self.spec.depth}")
            before = np.asarray(covariance(stream), np.float64)
            middle, stream = self.advance(number, stream)
            total = total + before + np.asarray(covariance(middle), np.float64)
        return total + FINAL_WEIGHT * np.asarray(covariance(stream), np.float64)

    def jitted(self, function: Callable, streams: int = 0) -> Callable:
        """Compiled on the mesh, giving so many streams or a sum over all devices."""
        places = (self._divided,) * streams if streams else self._whole
        return jax.jit(sharding.traced_on(self.mesh, function), out_shardings=places)

    def _teacher_block(self, block: Params, stream: Array) -> tuple[Array, Array]:
        def one(tokens: Array) -> tuple[Array, Array]:
            middle = tokens + written(block["attn"]["proj"], self.parts.heads(block, tokens))
            last = last_linear(self.spec, block)
            return middle, middle + written(last, self.parts.units(block, middle))

        return jax.lax.map(one, stream)

    def _gram_sums(self, block: Params, before: Array, middle: Array) -> Grams:
        def one(total: Grams, each: tuple[Array, Array]) -> tuple[Grams, None]:
            heads = rows(self.parts.heads(block, each[0]))
            units = rows(self.parts.units(block, each[1]))
            new = Grams(
                jnp.asarray(len(heads), jnp.float32),
                product(heads, heads),
                heads.sum(axis=0),
                product(units, units),
                units.sum(axis=0),
            )
            return jax.tree.map(jnp.add, total, new), None

        width, hidden = self.spec.width, self.spec.hidden
        shapes = ((), (width, width), (width,), (hidden, hidden), (hidden,))
        zeros = Grams(*(jnp.zeros(shape, jnp.float32) for shape in shapes))
        return jax.lax.scan(one, zeros, (before, middle))[0]


def written(linear: Params, values: Array) -> Array:
    """Returns what a last Linear adds to the stream, float32."""
    kernel = linear["kernel"].astype(jnp.float32)
    product = jnp.matmul(values.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    return product + linear["bias"]


def last_linear(spec: ViTSpec, block: Params) -> Params:
    """The Linear through which a block's hidden units are written."""
    branch, name = FEED_FORWARD_OUTPUT[spec.feed_forward]
    return block[branch][name]
