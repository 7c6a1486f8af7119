"""A ViT one block at a time, with what its two branches read before their last matmul: for methods
that change a model block by block.
"""

from flax import nnx
from jaxtyping import Array, Bool, Float

from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.models.layers import Block
from proteus_jax.models.pooling import PoolParts
from proteus_jax.models.rope import rotation
from proteus_jax.models.vit import Features

# The last Linear of each branch of a block, by the kind of its feed-forward layer: where it lies in
# the block's params.
ATTENTION_OUTPUT = ("attn", "proj")
FEED_FORWARD_OUTPUT = {"mlp": ("mlp", "fc2"), "swiglu": ("mlp", "w3")}
FEED_FORWARD_INPUT = {"mlp": ("mlp", "fc1"), "swiglu": ("mlp", "w12")}


class BlockwiseFunction:
    """The parts of a BackboneFunction's pass over square images of its own grid. `block` is one
    block's params, without the leading layer axis.
    """

    def __init__(self, backbone: BackboneFunction):
        spec = self.spec = backbone.spec
        self._backbone = backbone
        make = nnx.eval_shape(
            lambda: Block(
                spec, dtype=backbone.dtype, attention=backbone.attention, rngs=nnx.Rngs(0)
            )
        )
        self._graph = nnx.graphdef(make)
        self._rotation = None
        if spec.positions == "rotary":
            grid = spec.table_shape
            self._rotation = rotation(grid, spec.width // spec.heads, spec.prefix)

    def embed(
        self,
        params: Params,
        images: Float[Array, "b h w 3"],
        mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b t d"]:
        """The tokens that the first block reads, of normalized images."""
        return self._backbone.embed(params, images, mask)

    def heads(self, block: Params, tokens: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Computes the outputs of a block's heads, side by side, before `attn.proj`."""
        module = self._block(block)
        return module.attn.mixed(module.norm1(tokens), self._rotation)

    def units(self, block: Params, tokens: Float[Array, "b t d"]) -> Float[Array, "b t m"]:
        """Computes a block's hidden units from the stream after its attention."""
        module = self._block(block)
        return module.mlp.units(module.norm2(tokens))

    def features(self, params: Params, tokens: Float[Array, "b t d"]) -> Features:
        """Features from the tokens after the last block."""
        return self._backbone.features(params, tokens)

    def pool(self, params: Params, tokens: Float[Array, "b t d"]) -> PoolParts:
        """Computes the steps of an attention pool from the tokens after the last block."""
        return self._backbone.pool_parts(params, tokens)

    def _block(self, block: Params) -> Block:
        return nnx.merge(self._graph, nnx.State(block))
