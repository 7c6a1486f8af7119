"""Attention as einsums that XLA compiles, on any platform.

Like FlashAttention (arXiv 2205.14135) the forward pass returns the logarithm of each query's
normalizer, and the backward pass computes the weights from it again: a block saves [b, h, t]
numbers where it would save [b, h, t, t].
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def forward(
    qkv: Float[Array, "b t 3 h d"],
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    """Attends: returns the weighted values, in the dtype of `qkv`, and the logarithms of the
    normalizers, float32.
    """
    return _on_any_platform(_mix, qkv)


def backward(
    qkv: Float[Array, "b t 3 h d"],
    mixed: Float[Array, "b t h d"],
    log_normalizer: Float[Array, "b h t"],
    gradient: Float[Array, "b t h d"],
) -> Float[Array, "b t 3 h d"]:
    """The gradient of `qkv`, from what `forward` returned and the gradient of `mixed`."""
    # The softmax's own gradient, summed over keys, is that of the output times the output.
    common = jnp.sum(mixed.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    return _on_any_platform(_unmix, qkv, log_normalizer, gradient, jnp.swapaxes(common, 1, 2))


def _on_any_platform(function: Callable, *arrays: jax.Array) -> Any:
    """The whole batch at once on accelerators; on a CPU one sample after the other, whose scores
    fit into its cache.
    """

    def one_by_one(*arrays: jax.Array) -> Any:
        batch = len(arrays[0])
        # One on each device of a sharded batch: a group is a row of every device's share.
        together = math.gcd(batch, jax.device_count())
        groups = [
            array.reshape(together, batch // together, *array.shape[1:]).swapaxes(0, 1)
            for array in arrays
        ]
        mapped = jax.lax.map(lambda group: function(*group), groups)
        return jax.tree.map(
            lambda array: array.swapaxes(0, 1).reshape(batch, *array.shape[2:]), mapped
        )

    return jax.lax.platform_dependent(*arrays, cpu=one_by_one, default=function)


def _scores(key: jax.Array, query: jax.Array) -> Float[Array, "b h k q"]:
    """Float32. Keys come before queries: the softmax then runs over an axis that is not the
    innermost, where a CPU takes many queries at a time.
    """
    return jnp.einsum("bhdk,bhdq->bhkq", key, query, preferred_element_type=jnp.float32)


def _mix(qkv: jax.Array) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    query = query * query.shape[-1] ** -0.5
    scores = _scores(_channels_first(key), _channels_first(query))
    largest = jnp.max(scores, axis=2)
    exponentials = jnp.exp(scores - largest[:, :, None])
    normalizer = jnp.sum(exponentials, axis=2)
    mixed = jnp.einsum(
        "bhkq,bhkd->bhqd",
        exponentials.astype(value.dtype),
        _heads_first(value),
        preferred_element_type=jnp.float32,
    )
    mixed = (mixed / normalizer[..., None]).astype(value.dtype)
    return _heads_first(mixed), largest + jnp.log(normalizer)


def _unmix(
    qkv: jax.Array, log_normalizer: jax.Array, gradient: jax.Array, common: jax.Array
) -> Float[Array, "b t 3 h d"]:
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    scale = query.shape[-1] ** -0.5
    query = query * scale
    scores = _scores(_channels_first(key), _channels_first(query))
    weights = jnp.exp(scores - log_normalizer[:, :, None])
    of_weights = _scores(_channels_first(value), _channels_first(gradient))
    of_scores = weights * (of_weights - common[:, :, None])
    of_scores = of_scores.astype(query.dtype)
    of_value = jnp.einsum("bhkq,bhqd->bhkd", weights.astype(gradient.dtype), _heads_first(gradient))
    of_key = jnp.einsum("bhkq,bhqd->bhkd", of_scores, _heads_first(query))
    of_query = jnp.einsum(
        "bhkq,bhkd->bhqd", of_scores, _heads_first(key), preferred_element_type=jnp.float32
    )
    of_query = (of_query * scale).astype(query.dtype)
    return jnp.stack([_heads_first(of) for of in (of_query, of_key, of_value)], axis=2)


def _heads_first(tokens: Float[Array, "b t h d"]) -> Float[Array, "b h t d"]:
    """Swaps the axes of tokens and heads; its own inverse."""
    return jnp.swapaxes(tokens, 1, 2)


def _channels_first(tokens: Float[Array, "b t h d"]) -> Float[Array, "b h d t"]:
    return jnp.transpose(tokens, (0, 2, 3, 1))
