"""Multi-head attention: its implementations, and which of them a platform uses.

All have one signature, qkv [B, T, 3, H, D] -> [B, T, H, D] in the dtype of qkv, compute scores and
softmax in float32, and keep no scores for the backward pass (docs/decisions/0019-attention.md).

    xla     einsums that XLA compiles: any platform and dtype
    pallas  a kernel for TPUs; elsewhere it is interpreted, which is for tests
    cudnn   NVIDIA's fused kernel, in float16 or bfloat16
"""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from proteus_jax.models import attention_pallas, attention_xla
from proteus_jax.models.remat import kept

IMPLEMENTATIONS = ("xla", "pallas", "cudnn")
# What a platform has; the first is what `auto` means there.
_ON_PLATFORM = {"cpu": ("xla",), "tpu": ("pallas", "xla"), "gpu": ("cudnn", "xla")}


def attention(
    qkv: Float[Array, "b t 3 h d"], implementation: str = "xla"
) -> Float[Array, "b t h d"]:
    """softmax(query key^T / sqrt(D)) value, in the dtype of `qkv`."""
    if implementation == "cudnn":
        return _by_cudnn(qkv)
    return _attention(qkv, implementation)


def _by_cudnn(qkv: Float[Array, "b t 3 h d"]) -> Float[Array, "b t h d"]:
    """Attention by cuDNN. Where the number of tokens is odd, as a class token makes it, one more is
    added and masked.

    cuDNN wants an even number only with a bias; JAX (0.10.2) takes the one that is not there for
    one, and refuses the gradient.
    """
    batch, tokens = qkv.shape[:2]
    lengths = None
    if tokens % 2:
        qkv = jnp.pad(qkv, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
        lengths = jnp.full(batch, tokens, jnp.int32)
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return mixed[:, :tokens]


class Choice(NamedTuple):
    """An implementation; `remark` says why it is not the one that `auto` would take, where cuDNN
    refuses, and is empty otherwise.
    """

    implementation: str
    remark: str = ""


def choose(name: str, platform: str, dtype: DTypeLike, dim: int) -> Choice:
    """Chooses an implementation: `name`, one of IMPLEMENTATIONS or "auto", on "cpu", "gpu" or "tpu"
    for heads of `dim` channels. ValueError where the platform does not have it, or not for these.
    """
    kind = jnp.dtype(dtype)
    # cuDNN's kernel computes in 16 bits alone.
    possible = [each for each in _ON_PLATFORM[platform] if each != "cudnn" or kind.itemsize == 2]
    if name not in ("auto", *possible):
        known = " or ".join(["auto", *possible])
        raise ValueError(f"expected {known} on a {platform} in {kind}, found {name}")
    chosen = possible[0] if name == "auto" else name
    reason = _cudnn_refuses(kind.name, dim) if chosen == "cudnn" else ""
    if reason and name == "cudnn":
        raise ValueError(f"expected auto or xla here, found cudnn: {reason}")
    return Choice("xla", f"attention is xla: {reason}") if reason else Choice(chosen)


@functools.cache
def _cudnn_refuses(dtype: str, dim: int) -> str:
    """Why cuDNN does not do it, as a few heads tried both ways show; empty where it does, and where
    no GPU is here to ask.
    """
    if jax.default_backend() != "gpu":
        return ""

    def squared(qkv: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attention(qkv, "cudnn").astype(jnp.float32)))

    try:
        # As many tokens as a ViT has of a picture: a class token makes them odd.
        jax.block_until_ready(jax.jit(jax.grad(squared))(jnp.ones((1, 257, 3, 2, dim), dtype)))
    except Exception as error:  # cuDNN, its wrapper and the compiler have kinds of their own.
        return f"cuDNN's kernel cannot be had ({str(error).strip().partition(chr(10))[0][:200]})"
    return ""


class _Saved(NamedTuple):
    """The arrays that the forward pass saves for the backward pass."""

    qkv: Float[Array, "b t 3 h d"]
    mixed: Float[Array, "b t h d"]
    log_normalizer: Float[Array, "b h t"]


_MODULES: dict[str, ModuleType] = {"xla": attention_xla, "pallas": attention_pallas}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention(qkv: jax.Array, implementation: str) -> jax.Array:
    return _forward(qkv, implementation)[0]


def _forward(qkv: jax.Array, implementation: str) -> tuple[jax.Array, _Saved]:
    mixed, log_normalizer = _MODULES[implementation].forward(qkv)
    # Saved without its axis of heads, which a TPU would pad to twice the size.
    saved = kept(mixed.reshape(*mixed.shape[:2], -1)).reshape(mixed.shape)
    return saved, _Saved(qkv, saved, kept(log_normalizer))


def _backward(implementation: str, saved: _Saved, gradient: jax.Array) -> tuple[jax.Array]:
    return (_MODULES[implementation].backward(*saved, gradient),)


_attention.defvjp(_forward, _backward)
