"""Cuts a smaller ViT out of a larger one along the principal components of its stream, and fits it
block by block to what the larger one computes on unlabeled images: a student before any training.

Related: SliceGPT (arXiv 2401.15024), Low-Rank Clone (arXiv 2505.12781). docs/fast.md explains it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from proteus_jax.models.blockwise import (
    FEED_FORWARD_INPUT,
    FEED_FORWARD_OUTPUT,
    BlockwiseFunction,
)
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.runtime import sharding
from proteus_jax.slicing import outer
from proteus_jax.slicing.basis import principal_basis
from proteus_jax.slicing.least_squares import (
    Linear,
    Sums,
    add_rows,
    no_sums,
    product,
    rows,
    solve,
    standardized,
)
from proteus_jax.slicing.selection import choose_groups

# The weight of what the last norm reads among what all norms read.
FINAL_WEIGHT = 4.0
# Heads and units are chosen by their moments on this many tokens for each hidden unit.
TOKENS_A_UNIT, LEAST_GROUPS = 8, 4
Stream = Float[Array, "n b t d"]


class BlockError(NamedTuple):
    """Of the energy of the source's stream after a block: the share that has no room in the width,
    and the share that the slice misses in all.
    """

    lost: float
    missed: float


class Slice(NamedTuple):
    """A sliced model: float32 host arrays, and its errors block by block."""

    params: Params
    errors: list[BlockError]


class _Grams(NamedTuple):
    """Second moments of what a block's two last Linears read."""

    n: Any
    heads: Any
    heads_sum: Any
    units: Any
    units_sum: Any


class Slicer:
    """Slices one model to any number of sizes, on the same images.

    The model is passed over block by block. Its stream on all images is kept on the devices,
    divided over them: 4 * width bytes for each token of each image, three times at most.
    """

    def __init__(
        self,
        params: Params,
        source: BackboneFunction,
        images: UInt8[Array, "n b h w 3"],
        normalize: Callable[[Array], Array],
        mesh: Mesh,
    ):
        """`params` are the source's on the devices, without LayerScale, its position table that of
        the images' grid; `images` are in n groups, each divided over the devices.
        """
        if source.spec.layer_scale:
            raise ValueError("expected params whose LayerScale is in the Linears before it")
        self.spec, self.source, self.mesh = source.spec, source, mesh
        self.params, self._images, self._normalize = params, images, normalize
        self._parts = BlockwiseFunction(source)
        self._whole = sharding.replicated(mesh)
        self._divided = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
        self._advance = self._jitted(self._teacher_block, streams=2)
        self._grams = self._jitted(self._gram_sums)
        self._covariance: np.ndarray | None = None

    def slice(self, student: ViTSpec, progress: Callable[[str], None] = lambda text: None) -> Slice:
        """Slices to a spec of `sizes.sliced_spec`. `progress` hears of each block."""
        if self._covariance is None:
            self._covariance = self._input_covariance(progress)
        basis = principal_basis(self._covariance, student.width)
        return _Fit(self, student, basis).run(progress)

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

    def grams(self, number: int, before: Stream, middle: Stream) -> _Grams:
        """Moments of what the heads and units of a block say, on as many images as they need."""
        _, images, tokens, _ = before.shape
        groups = max(LEAST_GROUPS, -(-TOKENS_A_UNIT * self.spec.hidden // (images * tokens)))
        seen = before[:groups], middle[:groups]
        return jax.device_get(self._grams(self.block(number), *seen))

    def block(self, number: int) -> Params:
        """One block's params, on the devices."""
        return jax.tree.map(lambda stacked: stacked[number], self.params["blocks"])

    def _input_covariance(self, progress: Callable[[str], None]) -> np.ndarray:
        """[d, d] of what all norms read, standardized."""
        epsilon = self.spec.norm_epsilon

        def summed(stream: Array) -> Array:
            def one(total: Array, tokens: Array) -> tuple[Array, None]:
                standard = standardized(tokens, epsilon)
                return total + product(standard, standard), None

            width = stream.shape[-1]
            total, _ = jax.lax.scan(one, jnp.zeros((width, width)), stream)
            return total / (stream.size // width)

        covariance = self._jitted(summed)
        stream, total = self.embedded(self._parts, self.params), 0.0
        for number in range(self.spec.depth):
            progress(f"looking at block {number + 1} of {self.spec.depth}")
            before = np.asarray(covariance(stream), np.float64)
            middle, stream = self.advance(number, stream)
            total = total + before + np.asarray(covariance(middle), np.float64)
        return total + FINAL_WEIGHT * np.asarray(covariance(stream), np.float64)

    def _jitted(self, function: Callable, streams: int = 0) -> Callable:
        """Compiled on the mesh, giving so many streams or a sum over all devices."""
        places = (self._divided,) * streams if streams else self._whole
        return jax.jit(sharding.traced_on(self.mesh, function), out_shardings=places)

    def _teacher_block(self, block: Params, stream: Array) -> tuple[Array, Array]:
        def one(tokens: Array) -> tuple[Array, Array]:
            middle = tokens + written(block["attn"]["proj"], self._parts.heads(block, tokens))
            last = last_linear(self.spec, block)
            return middle, middle + written(last, self._parts.units(block, middle))

        return jax.lax.map(one, stream)

    def _gram_sums(self, block: Params, before: Array, middle: Array) -> _Grams:
        def one(total: _Grams, each: tuple[Array, Array]) -> tuple[_Grams, None]:
            heads = rows(self._parts.heads(block, each[0]))
            units = rows(self._parts.units(block, each[1]))
            new = _Grams(
                jnp.asarray(len(heads), jnp.float32),
                product(heads, heads),
                heads.sum(axis=0),
                product(units, units),
                units.sum(axis=0),
            )
            return jax.tree.map(jnp.add, total, new), None

        width, hidden = self.spec.width, self.spec.hidden
        shapes = ((), (width, width), (width,), (hidden, hidden), (hidden,))
        zeros = _Grams(*(jnp.zeros(shape, jnp.float32) for shape in shapes))
        return jax.lax.scan(one, zeros, (before, middle))[0]


class _Fit:
    """One slice in the making: the blocks of the student, one after the other, each fitted to the
    source's stream from the student's own.
    """

    def __init__(self, slicer: Slicer, student: ViTSpec, basis: np.ndarray):
        self._slicer, self._student, self._basis = slicer, student, basis
        source = slicer.source
        plain = dataclasses.replace(student, layer_scale=False)
        self._function = BackboneFunction(plain, source.dtype, source.attention)
        self._parts = BlockwiseFunction(self._function)
        jitted = slicer._jitted
        self._input_sums = jitted(self._sums_of_inputs)
        self._head_sums = jitted(self._sums_of_heads)
        self._unit_sums = jitted(self._sums_of_units)
        self._write_heads = jitted(self._with_heads, streams=1)
        self._write_units = jitted(self._with_units, streams=1)
        self._energies = jitted(self._energies_of)
        self._size = jitted(self._size_of)

    def run(self, progress: Callable[[str], None]) -> Slice:
        """Fits all blocks."""
        slicer, depth = self._slicer, self._student.depth
        host = jax.device_get(slicer.params)
        target = slicer.embedded(slicer._parts, slicer.params)
        bias = host["norm_pre"]["bias"] if slicer.spec.pre_norm else np.float32(0)
        size = float(self._size(target, bias))
        params = outer.projected(host, slicer.spec, self._basis, size)
        empty = jax.tree.map(lambda each: np.zeros(each.shape, np.float32), self._function.shapes)
        stream = slicer.embedded(self._parts, {**empty, **params})
        blocks, errors, done = [], [], 0
        for number, last in enumerate(taken_blocks(slicer.spec.depth, depth)):
            progress(f"fitting block {number + 1} of {depth}")
            for passed in range(done, last):
                _, target = slicer.advance(passed, target)
            before, done = target, last + 1
            middle, target = slicer.advance(last, before)
            source = jax.tree.map(lambda stacked, last=last: stacked[last], host["blocks"])
            grams = slicer.grams(last, before, middle)
            block, stream = self._attention(source, grams, stream, before, middle)
            block, stream = self._feed_forward(source, grams, block, stream, middle, target)
            whole, inside, away = (float(each) for each in self._energies(stream, target))
            errors.append(BlockError(1 - inside / whole, (whole - inside + away) / whole))
            blocks.append(block)
        stacked = jax.tree.map(lambda *layers: np.stack(layers), *blocks)
        if self._student.layer_scale:
            ones = np.ones((depth, self._student.width), np.float32)
            stacked |= {"ls1": {"gamma": ones}, "ls2": {"gamma": ones.copy()}}
        return Slice({**params, "blocks": stacked}, errors)

    def _attention(
        self, source: Params, grams: _Grams, stream: Array, before: Array, middle: Array
    ) -> tuple[Params, Array]:
        """A block with its attention fitted, and the student's stream after it."""
        spec, student = self._slicer.spec, self._student
        size = spec.width // spec.heads
        kernel = source["attn"]["proj"]["kernel"] @ self._basis
        covariance = _centered(grams.heads, grams.heads_sum, grams.n)
        heads = choose_groups(covariance, kernel, size, student.heads)
        columns = (heads[:, None] * size + np.arange(size)).reshape(-1)
        of_qkv = np.concatenate([columns + part * spec.width for part in range(3)])
        seen = solve(self._input_sums(stream, before))
        norm, qkv = _read(source["norm1"], source["attn"]["qkv"], seen, of_qkv)
        if not student.key_bias:
            norm, qkv = _without_key_bias(norm, qkv)
        block = {
            "norm1": norm,
            "attn": {"qkv": qkv, "proj": _zeros(student.width, student.width)},
            "norm2": outer.unit_norm(student.width),
            "mlp": _empty_feed_forward(student),
        }
        block["attn"]["proj"] = solve(self._head_sums(block, stream, middle))._asdict()
        (stream,) = self._write_heads(block, stream)
        return block, stream

    def _feed_forward(
        self,
        source: Params,
        grams: _Grams,
        block: Params,
        stream: Array,
        middle: Array,
        after: Array,
    ) -> tuple[Params, Array]:
        """The block with its feed-forward layer fitted too, and the stream after it."""
        spec, student = self._slicer.spec, self._student
        first = FEED_FORWARD_INPUT[spec.feed_forward][1]
        last = FEED_FORWARD_OUTPUT[spec.feed_forward][1]
        covariance = _centered(grams.units, grams.units_sum, grams.n)
        kernel = source["mlp"][last]["kernel"] @ self._basis
        units = choose_groups(covariance, kernel, 1, student.hidden)
        columns = units
        if spec.feed_forward == "swiglu":
            columns = np.concatenate([units, units + spec.hidden])
        seen = solve(self._input_sums(stream, middle))
        norm, read = _read(source["norm2"], source["mlp"][first], seen, columns)
        feed_forward = {first: read, last: _zeros(student.hidden, student.width)}
        block = {**block, "norm2": norm, "mlp": feed_forward}
        feed_forward[last] = solve(self._unit_sums(block, stream, after))._asdict()
        (stream,) = self._write_units(block, stream)
        return block, stream

    def _inside(self, tokens: Array) -> Array:
        """The source's tokens in the student's stream."""
        return jnp.matmul(tokens, self._basis, precision=jax.lax.Precision.HIGHEST)

    def _size_of(self, target: Array, bias: Array) -> Array:
        """The root mean square of the source's stream without a bias, inside the student's."""
        squares = jax.lax.map(
            lambda tokens: jnp.mean(jnp.square(self._inside(tokens - bias))), target
        )
        return jnp.sqrt(squares.mean())

    def _sums_of_inputs(self, stream: Array, target: Array) -> Sums:
        epsilon = self._slicer.spec.norm_epsilon

        def one(total: Sums, each: tuple[Array, Array]) -> tuple[Sums, None]:
            own, theirs = (standardized(tokens, epsilon) for tokens in each)
            return add_rows(total, own, theirs), None

        zero = no_sums(stream.shape[-1], target.shape[-1])
        return jax.lax.scan(one, zero, (stream, target))[0]

    def _sums_of_heads(self, block: Params, stream: Array, target: Array) -> Sums:
        return self._sums(lambda tokens: self._parts.heads(block, tokens), stream, target)

    def _sums_of_units(self, block: Params, stream: Array, target: Array) -> Sums:
        return self._sums(lambda tokens: self._parts.units(block, tokens), stream, target)

    def _sums(self, reads: Callable[[Array], Array], stream: Array, target: Array) -> Sums:
        """Of what a last Linear reads, and what it has to write."""

        def one(total: Sums, each: tuple[Array, Array]) -> tuple[Sums, None]:
            tokens, goal = each
            return add_rows(total, reads(tokens), self._inside(goal) - tokens), None

        inputs = jax.eval_shape(reads, stream[0]).shape[-1]
        zero = no_sums(inputs, stream.shape[-1])
        return jax.lax.scan(one, zero, (stream, target))[0]

    def _with_heads(self, block: Params, stream: Array) -> tuple[Array]:
        def one(tokens: Array) -> Array:
            return tokens + written(block["attn"]["proj"], self._parts.heads(block, tokens))

        return (jax.lax.map(one, stream),)

    def _with_units(self, block: Params, stream: Array) -> tuple[Array]:
        last = last_linear(self._student, block)

        def one(tokens: Array) -> Array:
            return tokens + written(last, self._parts.units(block, tokens))

        return (jax.lax.map(one, stream),)

    def _energies_of(self, stream: Array, target: Array) -> Array:
        """Of the source's stream, of its part inside the student's, and of what that misses."""

        def one(total: Array, each: tuple[Array, Array]) -> tuple[Array, None]:
            tokens, goal = each
            inside = self._inside(goal)
            centered = goal - goal.mean(axis=-1, keepdims=True)
            parts = (centered, inside, tokens - inside)
            return total + jnp.stack([jnp.sum(jnp.square(part)) for part in parts]), None

        return jax.lax.scan(one, jnp.zeros(3), (stream, target))[0]


def taken_blocks(source: int, student: int) -> list[int]:
    """The source's blocks whose heads and units a student's blocks take: the last of each of its
    equal shares. What the others of a share do is fitted into that one.
    """
    return [round((number + 1) * source / student) - 1 for number in range(student)]


def written(linear: Params, values: Array) -> Array:
    """What a last Linear adds to the stream, float32."""
    kernel = linear["kernel"].astype(jnp.float32)
    product = jnp.matmul(values.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    return product + linear["bias"]


def last_linear(spec: ViTSpec, block: Params) -> Params:
    """The Linear through which a block's hidden units are written."""
    branch, name = FEED_FORWARD_OUTPUT[spec.feed_forward]
    return block[branch][name]


def _centered(gram: np.ndarray, total: np.ndarray, count: np.ndarray) -> np.ndarray:
    mean = np.asarray(total, np.float64) / count
    return np.asarray(gram, np.float64) / count - np.outer(mean, mean)


def _zeros(inputs: int, outputs: int) -> Params:
    return {
        "kernel": np.zeros((inputs, outputs), np.float32),
        "bias": np.zeros(outputs, np.float32),
    }


def _empty_feed_forward(spec: ViTSpec) -> Params:
    inputs = 2 * spec.hidden if spec.feed_forward == "swiglu" else spec.hidden
    return {
        FEED_FORWARD_INPUT[spec.feed_forward][1]: _zeros(spec.width, inputs),
        FEED_FORWARD_OUTPUT[spec.feed_forward][1]: _zeros(spec.hidden, spec.width),
    }


def _read(norm: Params, linear: Params, seen: Linear, columns: np.ndarray) -> tuple[Params, Params]:
    """A norm and the Linear after it for the student: some columns of the source's, their norm's
    scale and bias folded in, through the map from what the student's norm sees to what the source's
    does.
    """
    kernel = (norm["scale"][:, None] * linear["kernel"].astype(np.float32))[:, columns]
    bias = (norm["bias"] @ linear["kernel"].astype(np.float32) + linear["bias"])[columns]
    own = {
        "kernel": np.asarray(seen.kernel @ kernel, np.float32),
        "bias": np.asarray(bias + seen.bias @ kernel, np.float32),
    }
    return outer.unit_norm(len(seen.kernel)), own


def _without_key_bias(norm: Params, qkv: Params) -> tuple[Params, Params]:
    """The same map for a model that reads no bias of keys: the norm's bias makes that of the keys,
    and the others' are less by what it makes of them.
    """
    width = len(qkv["kernel"])
    keys = slice(width, 2 * width)
    kernel = qkv["kernel"][:, keys].astype(np.float64)
    wanted = qkv["bias"][keys]
    shift = np.linalg.lstsq(kernel.T, wanted, rcond=1e-3)[0].astype(np.float32)
    bias = qkv["bias"] - shift @ qkv["kernel"]
    bias[keys] = 0.0
    return {**norm, "bias": shift}, {"kernel": qkv["kernel"], "bias": bias}
