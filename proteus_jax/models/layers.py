"""The layers of a ViT block. Parameters float32 (or as loaded), matmuls in `dtype`, LayerNorm and
softmax float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from proteus_jax.models.attention import attention, kept
from proteus_jax.models.specs import ViTSpec

# The reference asks for a normal of deviation 0.02 cut at -2 and 2: a hundred deviations, so no cut
# at all.
LINEAR_INIT = nnx.initializers.normal(0.02)


def torch_uniform(fan_in: int) -> Callable:
    """PyTorch's default initialisation of a Linear or Conv2d, of weight and of bias:
    U(-1/sqrt(fan_in), +).
    """
    limit = fan_in**-0.5

    def init(
        key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, **_
    ) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def linear(inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """A Linear with the backbone's initialisation."""
    return nnx.Linear(inputs, outputs, kernel_init=LINEAR_INIT, dtype=dtype, rngs=rngs)


def layer_norm(width: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm in float32; the fast variance E[x^2] - E[x]^2 would cost digits that parity
    needs.
    """
    return nnx.LayerNorm(
        width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )


class LayerScale(nnx.Module):
    """A learned factor a channel, 1 at the start as in the reference's student, of what a Linear
    says.
    """

    def __init__(self, width: int):
        self.gamma = nnx.Param(jnp.ones(width))

    def __call__(self, linear: nnx.Linear, tokens: Float[Array, "*b i"]) -> Float[Array, "*b d"]:
        """The Linear's output times the factors, as one matmul.

        The factors go to the weights, which are fewer than the tokens; and no output has to be kept
        for the gradient of a factor.
        """
        assert linear.bias is not None
        kernel = (linear.kernel * self.gamma).astype(linear.dtype)
        bias = (linear.bias * self.gamma).astype(linear.dtype)
        return tokens.astype(linear.dtype) @ kernel + bias


class Attention(nnx.Module):
    """Multi-head self-attention with one qkv projection."""

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = spec.heads
        self.qkv = linear(spec.width, 3 * spec.width, dtype=dtype, rngs=rngs)
        self.proj = linear(spec.width, spec.width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b t d"], scale: LayerScale) -> Float[Array, "b t d"]:
        batch, length, width = tokens.shape
        qkv = kept(self.qkv(tokens)).reshape(batch, length, 3, self.heads, width // self.heads)
        return scale(self.proj, attention(qkv).reshape(batch, length, width))


def gelu(values: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """The exact GELU by erf, as PyTorch computes it: in float32, whatever goes in and out.

    jax.nn.gelu goes through erfc, which is exact further out in the negative tail, where the result
    is nothing beside the stream, and takes four times as long on a CPU.
    """
    wide = values.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 2**-0.5))).astype(values.dtype)


class Mlp(nnx.Module):
    """Two Linears around the exact (erf) GELU."""

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = linear(spec.width, spec.hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(spec.hidden, spec.width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b t d"], scale: LayerScale) -> Float[Array, "b t d"]:
        return scale(self.fc2, gelu(kept(self.fc1(tokens))))


class SwiGLU(nnx.Module):
    """DINOv2-g's feed-forward layer: silu(first half of w12) times its second half, then w3."""

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.w12 = linear(spec.width, 2 * spec.hidden, dtype=dtype, rngs=rngs)
        self.w3 = linear(spec.hidden, spec.width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b t d"], scale: LayerScale) -> Float[Array, "b t d"]:
        gate, value = jnp.split(kept(self.w12(tokens)).astype(jnp.float32), 2, axis=-1)
        return scale(self.w3, jax.nn.silu(gate) * value)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each scaled and, in training, dropped a sample at a
    time.
    """

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = layer_norm(spec.width, spec.norm_epsilon, rngs=rngs)
        self.attn = Attention(spec, dtype=dtype, rngs=rngs)
        self.ls1 = LayerScale(spec.width)
        self.norm2 = layer_norm(spec.width, spec.norm_epsilon, rngs=rngs)
        feed_forward = SwiGLU if spec.feed_forward == "swiglu" else Mlp
        self.mlp = feed_forward(spec, dtype=dtype, rngs=rngs)
        self.ls2 = LayerScale(spec.width)

    def __call__(
        self, tokens: Float[Array, "b t d"], keep: Float[Array, "2 b 1 1"] | None = None
    ) -> Float[Array, "b t d"]:
        """`keep` multiplies the two branches of each sample: 0, or 1 / (1 - rate)."""
        attended = self.attn(self.norm1(tokens), self.ls1)
        # The stream keeps its own dtype: float32 for float32 parameters, whatever the matmuls use.
        attended = attended if keep is None else attended * keep[0]
        tokens = kept(tokens + attended.astype(tokens.dtype))
        fed = self.mlp(self.norm2(tokens), self.ls2)
        return tokens + (fed if keep is None else fed * keep[1]).astype(tokens.dtype)
