"""Attention as a Pallas kernel for TPUs, forward and backward.

The kernel reads the qkv projection's own output, [B, T, 3 H D], a sample a grid step, so that
queries, keys and values are never copied apart, and scores never leave the chip's fast memory
(VMEM). The backward kernel computes the weights again from the logarithm of each query's
normalizer, as FlashAttention (arXiv 2205.14135) does, and writes the gradient in the projection's
layout. Away from a TPU the kernels are interpreted.

A sample that does not fit into VMEM is left to XLA (models/attention_xla.py): with ViT-L in
bfloat16 from 1,600 tokens on in training, from 2,784 on in a forward pass.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from proteus_jax.models import attention_xla

# Numbers in a row of a TPU's registers, and rows.
LANES, SUBLANES = 128, 8
# What a kernel may use of VMEM: a v5p has 64 MiB a core, v5e and v6e have 128.
VMEM = 60 * 2**20
# Queries whose scores are computed at a time, where there are more tokens than WHOLE.
QUERIES, WHOLE = 256, 512
# Arrays of scores that the compiler keeps at the same time.
SCORES = 6


def forward(
    qkv: Float[Array, "b t 3 h d"],
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """See attention_xla.forward."""
    batch, tokens, _, heads, dim = qkv.shape
    flat = qkv.reshape(batch, tokens, 3 * heads * dim)
    if not _fits(flat, wide=1, narrow=1):
        return attention_xla.forward(qkv)
    shapes = ((tokens, heads * dim), qkv.dtype), ((heads, tokens), jnp.float32)
    mixed, log_normalizer = _over_batch(_forward_kernel, heads, shapes, flat)
    return mixed.reshape(batch, tokens, heads, dim), log_normalizer


def backward(
    qkv: Float[Array, "b t 3 h d"],
    mixed: Float[Array, "b t h d"],
    log_normalizer: Float[Array, "b h t"],
    gradient: Float[Array, "b t h d"],
) -> Float[Array, "b t 3 h d"]:
    """See attention_xla.backward."""
    batch, tokens, _, heads, dim = qkv.shape
    flat, mixed_flat, gradient_flat = (
        array.reshape(batch, tokens, -1) for array in (qkv, mixed, gradient)
    )
    if not _fits(flat, wide=2, narrow=2):
        return attention_xla.backward(qkv, mixed, log_normalizer, gradient)
    shapes = (((tokens, 3 * heads * dim), qkv.dtype),)
    arrays = (flat, mixed_flat, log_normalizer, gradient_flat)
    return _over_batch(_backward_kernel, heads, shapes, *arrays)[0].reshape(qkv.shape)


def _fits(flat: jax.Array, *, wide: int, narrow: int) -> bool:
    """Returns True where VMEM holds a sample's arrays twice, as one is copied while the other is
    used, and some scores: so many arrays of the projection's width, and of a third of it.
    """
    _, tokens, width = flat.shape
    rows, columns = -(-tokens // 16) * 16, -(-tokens // LANES) * LANES
    arrays = 2 * rows * (wide * width + narrow * width // 3) * flat.dtype.itemsize
    scores = SCORES * (rows if tokens <= WHOLE else QUERIES) * columns * 4
    return arrays + scores <= VMEM


def _over_batch(
    kernel: Callable, heads: int, shapes: tuple[tuple[tuple[int, int], Any], ...], *arrays: Any
) -> Any:
    """The kernel on every sample of [B, ...] arrays, giving [B, ...] arrays of these shapes and
    dtypes. On the mesh of the surrounding `jax.sharding.use_abstract_mesh`, if any, each device
    takes its share of the batch.
    """

    def on_a_device(*arrays: jax.Array, interpret: bool) -> Any:
        def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
            return pl.BlockSpec((1, *shape), lambda sample: (sample, 0, 0))

        return pl.pallas_call(
            functools.partial(kernel, heads=heads),
            grid=(len(arrays[0]),),
            in_specs=[whole(array.shape[1:]) for array in arrays],
            out_specs=[whole(shape) for shape, _ in shapes],
            out_shape=[
                jax.ShapeDtypeStruct((len(arrays[0]), *shape), dtype) for shape, dtype in shapes
            ],
            # A v5p divides the samples between its two cores.
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=VMEM
            ),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )(*arrays)

    def on_any_platform(*arrays: jax.Array) -> Any:
        return jax.lax.platform_dependent(
            *arrays,
            tpu=functools.partial(on_a_device, interpret=False),
            default=functools.partial(on_a_device, interpret=True),
        )

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return on_any_platform(*arrays)
    # What does not divide, each device computes whole.
    divides = len(arrays[0]) % mesh.size == 0
    share = PartitionSpec(mesh.axis_names) if divides else PartitionSpec()
    return jax.shard_map(on_any_platform, in_specs=share, out_specs=share, check_vma=False)(*arrays)


def _product(left: jax.Array, right: jax.Array, over: tuple[int, int]) -> jax.Array:
    """The sum over one axis of each, float32."""
    return jax.lax.dot_general(
        left, right, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _rows(columns: list[jax.Array]) -> list[jax.Array]:
    """Columns [T, 1] as rows [1, T]: beside each other in lanes and turned together, which takes a
    fraction of what a reshape of each does.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    beside = jnp.broadcast_to(columns[0], (len(columns[0]), LANES))
    for number, column in enumerate(columns[1:], 1):
        beside = jnp.where(lane == number, column, beside)
    turned = jnp.transpose(beside)
    return [turned[number : number + 1] for number in range(len(columns))]


def _blocks(tokens: int) -> Iterator[slice]:
    """Queries that are taken together."""
    size = tokens if tokens <= WHOLE else QUERIES
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


class _Heads:
    """The place of the heads in a row of registers.

    Heads of 32 or 64 channels are taken several at a time, as many as fill the row: their channels
    need not be moved, and the others' are zeros in a product, which costs a row either way.
    """

    def __init__(self, heads: int, width: int):
        self.heads, self.width, self.dim = heads, width, width // heads
        self.together = max(1, LANES // self.dim)
        self.lanes = self.together * self.dim
        self.aligned = self.lanes % LANES == 0 and width % self.lanes == 0
        if not self.aligned:
            self.together, self.lanes = 1, self.dim

    def for_each_group(self, function: Callable[[Any], None]) -> None:
        """Calls with the number of each group of heads: in a loop of the program where their places
        are whole rows, in one of Python where the compiler has to see each place.
        """
        count = self.width // self.lanes
        if not self.aligned:
            for group in range(count):
                function(group)
            return

        def body(group: jax.Array, nothing: None) -> None:
            function(group)
            return nothing

        jax.lax.fori_loop(0, count, body, None)

    def place(self, group: Any, part: int = 0) -> Any:
        """The lanes of a group in queries (0), keys (1) or values (2)."""
        start = part * self.width + group * self.lanes
        if not self.aligned:
            return slice(start, start + self.lanes)
        return pl.ds(pl.multiple_of(start, LANES), self.lanes)

    def number(self, group: Any, head: int) -> Any:
        """The number of a head of a group among all."""
        return pl.ds(group * self.together + head, 1)

    def only(self, head: int, *arrays: jax.Array) -> list[jax.Array]:
        """The arrays [T, lanes] of a group with zeros where other heads' channels are."""
        if self.together == 1:
            return list(arrays)
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.lanes), 1)
        mine = lane // self.dim == head
        return [jnp.where(mine, array, jnp.zeros_like(array)) for array in arrays]


def _forward_kernel(qkv_ref: Any, mixed_ref: Any, log_normalizer_ref: Any, *, heads: int) -> None:
    _, tokens, width = mixed_ref.shape
    layout = _Heads(heads, width)
    scale = layout.dim**-0.5

    def group_of_heads(group: Any) -> None:
        key, value = (qkv_ref[0, :, layout.place(group, part)] for part in (1, 2))
        columns: list[list[jax.Array]] = [[] for _ in range(layout.together)]
        for queries in _blocks(tokens):
            query = qkv_ref[0, queries, layout.place(group)] * scale
            mixed = jnp.zeros(query.shape, jnp.float32)
            for head in range(layout.together):
                query_of_head, value_of_head = layout.only(head, query, value)
                scores = _product(query_of_head, key, (1, 1))
                largest = jnp.max(scores, axis=1, keepdims=True)
                exponentials = jnp.exp(scores - largest)
                normalizer = jnp.sum(exponentials, axis=1, keepdims=True)
                summed = _product(exponentials.astype(value.dtype), value_of_head, (1, 0))
                mixed = mixed + summed / normalizer
                columns[head].append(largest + jnp.log(normalizer))
            mixed_ref[0, queries, layout.place(group)] = mixed.astype(mixed_ref.dtype)
        for head, row in enumerate(_rows([jnp.concatenate(parts, axis=0) for parts in columns])):
            log_normalizer_ref[0, layout.number(group, head), :] = row

    layout.for_each_group(group_of_heads)


def _backward_kernel(
    qkv_ref: Any,
    mixed_ref: Any,
    log_normalizer_ref: Any,
    gradient_ref: Any,
    gradient_qkv_ref: Any,
    *,
    heads: int,
) -> None:
    _, tokens, width = mixed_ref.shape
    layout, dtype = _Heads(heads, width), qkv_ref.dtype
    scale = layout.dim**-0.5

    def group_of_heads(group: Any) -> None:
        key, value = (qkv_ref[0, :, layout.place(group, part)] for part in (1, 2))
        of_key = jnp.zeros(key.shape, jnp.float32)
        of_value = jnp.zeros(key.shape, jnp.float32)
        for queries in _blocks(tokens):
            query = qkv_ref[0, queries, layout.place(group)] * scale
            gradient = gradient_ref[0, queries, layout.place(group)]
            mixed = mixed_ref[0, queries, layout.place(group)].astype(jnp.float32)
            of_query = jnp.zeros(query.shape, jnp.float32)
            # The softmax's own gradient, summed over keys, is that of the output times the output.
            products = mixed * gradient.astype(jnp.float32)
            common = _rows(
                [
                    jnp.sum(layout.only(head, products)[0], axis=1, keepdims=True)
                    for head in range(layout.together)
                ]
            )
            for head in range(layout.together):
                query_of_head, key_of_head, gradient_of_head = layout.only(
                    head, query, key, gradient
                )
                # Keys before queries: what belongs to a query is then a row, as it is stored.
                scores = _product(key, query_of_head, (1, 1))
                row = log_normalizer_ref[0, layout.number(group, head), :]
                weights = jnp.exp(scores - row[:, queries])
                of_weights = _product(value, gradient_of_head, (1, 1))
                of_scores = (weights * (of_weights - common[head])).astype(dtype)
                of_value += _product(weights.astype(dtype), gradient_of_head, (1, 0))
                of_key += _product(of_scores, query_of_head, (1, 0))
                of_query += _product(of_scores, key_of_head, (0, 0))
            gradient_qkv_ref[0, queries, layout.place(group)] = (of_query * scale).astype(dtype)
        gradient_qkv_ref[0, :, layout.place(group, 1)] = of_key.astype(dtype)
        gradient_qkv_ref[0, :, layout.place(group, 2)] = of_value.astype(dtype)

    layout.for_each_group(group_of_heads)
