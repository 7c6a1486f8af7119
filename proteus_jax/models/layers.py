"""The layers of a ViT block. Parameters float32 (or as loaded), matmuls in `dtype`, LayerNorm and
softmax float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from proteus_jax.models.attention import attention
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.remat import kept
from proteus_jax.models.rope import Rotation, turned

# The reference asks for a normal of deviation 0.02 cut at -2 and 2: a hundred deviations, so no cut
# at all.
LINEAR_INIT = nnx.initializers.normal(0.02)


def torch_uniform(fan_in: int) -> Callable:
    """PyTorch's default initialization of a Linear or Conv2d, of weight and of bias:
    U(-1/sqrt(fan_in), +).
    """
    limit = fan_in**-0.5

    def init(
        key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, **_
    ) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def linear(
    inputs: int,
    outputs: int,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    init: nnx.Initializer = LINEAR_INIT,
) -> nnx.Linear:
    """A Linear with the backbone's initialization."""
    return nnx.Linear(inputs, outputs, kernel_init=init, dtype=dtype, rngs=rngs)


class LayerNorm(nnx.Module):
    """LayerNorm in float32, whatever comes in.

    The variance is that of centered values: the fast one, E[x^2] - E[x]^2, would cost digits that
    parity needs. The gradient is written out, as it takes fewer passes over the tokens than the
    derivative of each step does, and saves the statistics, which are small.
    """

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(nnx.initializers.ones_init()(rngs.params(), (width,)))
        self.bias = nnx.Param(nnx.initializers.zeros_init()(rngs.params(), (width,)))

    def __call__(self, tokens: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return _normalized(tokens, self.scale[...], self.bias[...], self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalized(tokens: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    return _normalize(tokens, scale, bias, epsilon)[0]


def _normalize(
    tokens: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = tokens.astype(jnp.float32)
    mean = kept(jnp.mean(wide, axis=-1))
    centered = wide - mean[..., None]
    inverse = kept(jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1) + epsilon))
    normalized = centered * (inverse[..., None] * scale.astype(jnp.float32))
    return normalized + bias.astype(jnp.float32), (tokens, mean, inverse, scale, bias)


def _gradient_of_normalized(
    epsilon: float, saved: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens, mean, inverse, scale, bias = saved
    rows = tuple(range(gradient.ndim - 1))
    standard = (tokens.astype(jnp.float32) - mean[..., None]) * inverse[..., None]
    scaled = gradient * scale.astype(jnp.float32)
    common = jnp.mean(scaled, axis=-1, keepdims=True)
    along = jnp.mean(scaled * standard, axis=-1, keepdims=True)
    of_tokens = (scaled - common - standard * along) * inverse[..., None]
    return (
        of_tokens.astype(tokens.dtype),
        jnp.sum(gradient * standard, axis=rows).astype(scale.dtype),
        jnp.sum(gradient, axis=rows).astype(bias.dtype),
    )


_normalized.defvjp(_normalize, _gradient_of_normalized)


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


class Unscaled(nnx.Module):
    """Stands in the place of a LayerScale where a model has none."""

    def __call__(self, linear: nnx.Linear, tokens: Float[Array, "*b i"]) -> Float[Array, "*b d"]:
        """The Linear's output."""
        return linear(tokens)


Scale = LayerScale | Unscaled


class Attention(nnx.Module):
    """Multi-head self-attention with one qkv projection; `implementation` is one of
    attention.IMPLEMENTATIONS.
    """

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike, implementation: str, rngs: nnx.Rngs):
        self.heads, self.key_bias, self.implementation = spec.heads, spec.key_bias, implementation
        init = nnx.initializers.xavier_uniform() if spec.xavier_qkv else LINEAR_INIT
        self.qkv = linear(spec.width, 3 * spec.width, dtype=dtype, rngs=rngs, init=init)
        self.proj = linear(spec.width, spec.width, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "b t d"], scale: Scale, rotation: Rotation | None
    ) -> Float[Array, "b t d"]:
        return scale(self.proj, self.mixed(tokens, rotation))

    def mixed(self, tokens: Float[Array, "b t d"], rotation: Rotation | None) -> jax.Array:
        """The outputs of all heads side by side [b, t, d], which `proj` reads."""
        qkv = self.projected(tokens, rotation)
        return attention(qkv, self.implementation).reshape(tokens.shape)

    def projected(
        self, tokens: Float[Array, "b t d"], rotation: Rotation | None
    ) -> Float[Array, "b t 3 h c"]:
        """Queries, keys and values."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens) if self.key_bias else self._without_key_bias(tokens)
        qkv = kept(qkv).reshape(batch, length, 3, self.heads, width // self.heads)
        return qkv if rotation is None else turned(qkv, rotation)

    def _without_key_bias(self, tokens: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
        """The keys' third of the bias is never read, so it never learns."""
        assert self.qkv.bias is not None
        query, _, value = jnp.split(self.qkv.bias[...], 3)
        bias = jnp.concatenate([query, jnp.zeros_like(query), value])
        dtype = self.qkv.dtype
        return tokens.astype(dtype) @ self.qkv.kernel[...].astype(dtype) + bias.astype(dtype)


def gelu(values: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """The exact GELU by erf, as PyTorch computes it: in float32, whatever goes in and out.

    jax.nn.gelu goes through erfc, which is exact further out in the negative tail, where the result
    is nothing beside the stream, and takes four times as long on a CPU.
    """
    wide = values.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 2**-0.5))).astype(values.dtype)


def gelu_tanh(values: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """SigLIP's GELU, by a tanh; in float32."""
    return jax.nn.gelu(values.astype(jnp.float32), approximate=True).astype(values.dtype)


def quick_gelu(values: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """CLIP's x sigmoid(1.702 x); in float32."""
    wide = values.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(values.dtype)


_ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


class Mlp(nnx.Module):
    """Two Linears around the model's activation: the exact (erf) GELU, or another."""

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.activation = spec.activation
        self.fc1 = linear(spec.width, spec.hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(spec.hidden, spec.width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "*b d"], scale: Scale) -> Float[Array, "*b d"]:
        return scale(self.fc2, self.units(tokens))

    def units(self, tokens: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """The hidden units, which `fc2` reads."""
        return _ACTIVATIONS[self.activation](kept(self.fc1(tokens)))


class SwiGLU(nnx.Module):
    """DINOv2-g's feed-forward layer: silu(first half of w12) times its second half, then w3."""

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.w12 = linear(spec.width, 2 * spec.hidden, dtype=dtype, rngs=rngs)
        self.w3 = linear(spec.hidden, spec.width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b t d"], scale: Scale) -> Float[Array, "b t d"]:
        return scale(self.w3, self.units(tokens))

    def units(self, tokens: Float[Array, "b t d"]) -> Float[Array, "b t m"]:
        """The hidden units, float32, which `w3` reads."""
        gate, value = jnp.split(kept(self.w12(tokens)).astype(jnp.float32), 2, axis=-1)
        return jax.nn.silu(gate) * value


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each scaled and, in training, dropped a sample at a
    time.
    """

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike, attention: str, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(spec.width, spec.norm_epsilon, rngs=rngs)
        self.attn = Attention(spec, dtype=dtype, implementation=attention, rngs=rngs)
        self.ls1 = LayerScale(spec.width) if spec.layer_scale else Unscaled()
        self.norm2 = LayerNorm(spec.width, spec.norm_epsilon, rngs=rngs)
        feed_forward = SwiGLU if spec.feed_forward == "swiglu" else Mlp
        self.mlp = feed_forward(spec, dtype=dtype, rngs=rngs)
        self.ls2 = LayerScale(spec.width) if spec.layer_scale else Unscaled()

    def __call__(
        self,
        tokens: Float[Array, "b t d"],
        keep: Float[Array, "2 b 1 1"] | None = None,
        rotation: Rotation | None = None,
        *,
        training: bool = False,
    ) -> Float[Array, "b t d"]:
        """`keep` multiplies the two branches of each sample: 0, or 1 / (1 - rate)."""
        # What is added to the stream is saved rather than the stream: in bfloat16 it is half of it.
        attended = kept(self.attn(self.norm1(tokens), self.ls1, rotation))
        # The stream keeps its own dtype: float32 for float32 parameters, whatever the matmuls use.
        attended = attended if keep is None else attended * keep[0]
        tokens = tokens + attended.astype(tokens.dtype)
        fed = self.mlp(self.norm2(tokens), self.ls2)
        if not training and fed.dtype != tokens.dtype:
            # A TPU's compiler makes one program of both matmuls, and computes the first one again
            # for each part of the second's output: the wider the output, the more often.
            fed = jax.lax.optimization_barrier(fed)
        return tokens + (fed if keep is None else fed * keep[1]).astype(tokens.dtype)
