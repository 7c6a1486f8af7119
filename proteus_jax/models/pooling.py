"""SigLIP's class token: an attention of one learned query over all patches, then a feed-forward
layer.

Source: google-research/big_vision models/vit.py (MAPHead).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from proteus_jax.models.config import ViTSpec
from proteus_jax.models.layers import LayerNorm, Mlp, Unscaled, linear


class PoolParts(NamedTuple):
    """The steps of an attention pool: the outputs of its heads side by side, float32, the token
    that they make, the hidden units of its feed-forward layer, and the class token.
    """

    heads: Float[Array, "b d"]
    pooled: Float[Array, "b d"]
    units: Float[Array, "b m"]
    cls: Float[Array, "b d"]


class AttentionPool(nnx.Module):
    """One token from many."""

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = spec.heads
        self.probe = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (1, 1, spec.width)))
        self.qkv = linear(spec.width, 3 * spec.width, dtype=dtype, rngs=rngs)
        self.proj = linear(spec.width, spec.width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(spec.width, spec.norm_epsilon, rngs=rngs)
        self.mlp = Mlp(spec, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Pools the tokens that the query attends to."""
        return self.parts(tokens).cls

    def parts(self, tokens: Float[Array, "b n d"]) -> PoolParts:
        """The steps of the same."""
        values = self._heads(self.qkv(tokens))[:, :, 2]
        mixed = jnp.einsum("bhn,bnhd->bhd", self.attention(tokens), values.astype(jnp.float32))
        heads = mixed.reshape(len(tokens), -1)
        pooled = self.proj(heads).astype(tokens.dtype)
        units = self.mlp.units(self.norm(pooled))
        cls = pooled + Unscaled()(self.mlp.fc2, units).astype(tokens.dtype)
        return PoolParts(heads, pooled, units, cls)

    def attention(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b h n"]:
        """How much the query attends to each token, float32."""
        query = self._heads(self.qkv(self.probe[...]))[0, 0, 0].astype(jnp.float32)
        keys = self._heads(self.qkv(tokens))[:, :, 1].astype(jnp.float32)
        scores = jnp.einsum("hd,bnhd->bhn", query, keys) * query.shape[-1] ** -0.5
        return jax.nn.softmax(scores)

    def _heads(self, qkv: Float[Array, "b n e"]) -> Float[Array, "b n 3 h d"]:
        batch, length, width = qkv.shape
        return qkv.reshape(batch, length, 3, self.heads, width // (3 * self.heads))
