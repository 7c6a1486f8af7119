"""A slice in the making: each block fitted to the source's stream, from the student's own."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from proteus_jax.models.blockwise import (
    FEED_FORWARD_INPUT,
    FEED_FORWARD_OUTPUT,
    BlockwiseFunction,
)
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.runtime import sharding
from proteus_jax.slicing import outer
from proteus_jax.slicing.folding import columns_of, read, unit_norm, without_key_bias
from proteus_jax.slicing.least_squares import (
    Sums,
    add_rows,
    covariance,
    no_sums,
    solve,
    standardized,
)
from proteus_jax.slicing.pool import sliced_pool
from proteus_jax.slicing.selection import choose_groups
from proteus_jax.slicing.source import Grams, SourceModel, last_linear, written


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


class Fit:
    """One slice in the making: the blocks of the student, one after the other, each fitted to the
    source's stream from the student's own.
    """

    def __init__(self, source: SourceModel, student: ViTSpec, basis: np.ndarray):
        self._source, self._student, self._basis = source, student, basis
        plain = dataclasses.replace(student, layer_scale=False)
        self._function = BackboneFunction(plain, source.function.dtype, source.function.attention)
        self._parts = BlockwiseFunction(self._function)
        jitted = source.jitted
        self._input_sums = jitted(self._sums_of_inputs)
        self._head_sums = jitted(self._sums_of_heads)
        self._unit_sums = jitted(self._sums_of_units)
        self._write_heads = jitted(self._with_heads, streams=1)
        self._write_units = jitted(self._with_units, streams=1)
        self._energies = jitted(self._energies_of)
        self._size = jitted(self._size_of)

    def run(self, progress: Callable[[str], None]) -> Slice:
        """Fits all blocks."""
        model, depth = self._source, self._student.depth
        host = sharding.gather(model.params, model.mesh)
        target = model.embedded(model.parts, model.params)
        bias = host["norm_pre"]["bias"] if model.spec.pre_norm else np.float32(0)
        size = float(self._size(target, bias))
        params = outer.projected(host, model.spec, self._basis, size)
        empty = jax.tree.map(lambda each: np.zeros(each.shape, np.float32), self._function.shapes)
        stream = model.embedded(self._parts, {**empty, **params})
        blocks, errors, done = [], [], 0
        for number, last in enumerate(taken_blocks(model.spec.depth, depth)):
            progress(f"fitting block {number + 1} of {depth}")
            for passed in range(done, last):
                _, target = model.advance(passed, target)
            before, done = target, last + 1
            middle, target = model.advance(last, before)
            source = jax.tree.map(lambda stacked, last=last: stacked[last], host["blocks"])
            grams = model.grams(last, before, middle)
            block, stream = self._attention(source, grams, stream, before, middle)
            block, stream = self._feed_forward(source, grams, block, stream, middle, target)
            whole, inside, away = map(float, jax.device_get(self._energies(stream, target)))
            errors.append(BlockError(1 - inside / whole, (whole - inside + away) / whole))
            blocks.append(block)
        stacked = jax.tree.map(lambda *layers: np.stack(layers), *blocks)
        if self._student.layer_scale:
            ones = np.ones((depth, self._student.width), np.float32)
            stacked |= {"ls1": {"gamma": ones}, "ls2": {"gamma": ones.copy()}}
        params["blocks"] = stacked
        if model.spec.pooling == "attention":
            seen = solve(self._input_sums(stream, target))
            sums = jax.device_get(model.pool_sums(target))
            params["pool"] = sliced_pool(host, model.spec, self._student, seen, sums)
        return Slice(params, errors)

    def _attention(
        self, source: Params, grams: Grams, stream: Array, before: Array, middle: Array
    ) -> tuple[Params, Array]:
        """A block with its attention fitted, and the student's stream after it."""
        spec, student = self._source.spec, self._student
        size = spec.width // spec.heads
        kernel = source["attn"]["proj"]["kernel"] @ self._basis
        moments = covariance(grams.heads, grams.heads_sum, grams.n)
        heads = choose_groups(moments, kernel, size, student.heads)
        of_qkv = columns_of(heads, size, spec.width, parts=3)
        seen = solve(self._input_sums(stream, before))
        norm, qkv = read(source["norm1"], source["attn"]["qkv"], seen, of_qkv)
        if not student.key_bias:
            norm, qkv = without_key_bias(norm, qkv)
        block = {
            "norm1": norm,
            "attn": {"qkv": qkv, "proj": _zeros(student.width, student.width)},
            "norm2": unit_norm(student.width),
            "mlp": _empty_feed_forward(student),
        }
        block["attn"]["proj"] = solve(self._head_sums(block, stream, middle))._asdict()
        (stream,) = self._write_heads(block, stream)
        return block, stream

    def _feed_forward(
        self,
        source: Params,
        grams: Grams,
        block: Params,
        stream: Array,
        middle: Array,
        after: Array,
    ) -> tuple[Params, Array]:
        """The block with its feed-forward layer fitted too, and the stream after it."""
        spec, student = self._source.spec, self._student
        first = FEED_FORWARD_INPUT[spec.feed_forward][1]
        last = FEED_FORWARD_OUTPUT[spec.feed_forward][1]
        moments = covariance(grams.units, grams.units_sum, grams.n)
        kernel = source["mlp"][last]["kernel"] @ self._basis
        units = choose_groups(moments, kernel, 1, student.hidden)
        columns = columns_of(units, 1, spec.hidden, 2 if spec.feed_forward == "swiglu" else 1)
        seen = solve(self._input_sums(stream, middle))
        norm, own = read(source["norm2"], source["mlp"][first], seen, columns)
        feed_forward = {first: own, last: _zeros(student.hidden, student.width)}
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
        epsilon = self._source.spec.norm_epsilon

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
