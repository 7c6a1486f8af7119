"""SigLIP's class token: an attention of one learned query over all patches, then a feed-forward
layer.

Source: google-research/big_vision models/vit.py (MAPHead).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from proteus_jax.models.config import ViTSpec
from proteus_jax.models.layers import LayerNorm, Mlp, Unscaled, linear


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
        pooled = self.proj(self.mixed(tokens)).astype(tokens.dtype)
        fed = self.mlp(self.norm(pooled), Unscaled())
        return pooled + fed.astype(tokens.dtype)

    def mixed(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """The outputs of all heads side by side, which `proj` reads, float32."""
        values = self._heads(self.qkv(tokens))[:, :, 2]
        mixed = jnp.einsum("bhn,bnhd->bhd", self.attention(tokens), values.astype(jnp.float32))
        return mixed.reshape(len(tokens), -1)

    def attention(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b h n"]:
        """How much the query attends to each token, float32."""
        query = self._heads(self.qkv(self.probe[...]))[0, 0, 0].astype(jnp.float32)
        keys = self._heads(self.qkv(tokens))[:, :, 1].astype(jnp.float32)
        scores = jnp.einsum("hd,bnhd->bhn", query, keys) * query.shape[-1] ** -0.5
        return jax.nn.softmax(scores)

    def _heads(self, qkv: Float[Array, "b n e"]) -> Float[Array, "b n 3 h d"]:
        batch, length, width = qkv.shape
        return qkv.reshape(batch, length, 3, self.heads, width // (3 * self.heads))
