"""The vision transformer, its blocks stacked under one scan: DINOv2's by default, and what the
other teachers have instead where a spec says so.

Source: facebookresearch/dinov2 models/vision_transformer.py, as used by arXiv 2407.10366; the
authors' pretrain/models_synclr.py and models_clip.py.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from proteus_jax.models.config import ViTSpec
from proteus_jax.models.layers import LINEAR_INIT, Block, LayerNorm, torch_uniform
from proteus_jax.models.pooling import AttentionPool, PoolParts
from proteus_jax.models.pos_embed import resize_position_table
from proteus_jax.models.remat import REMAT
from proteus_jax.models.rope import Rotation, rotation


class Features(NamedTuple):
    """Tokens after the final LayerNorm (before it where a caller asked for that).

    `cls` is the class token, or what stands for it in a model that pools its patches. CLIP's
    LayerNorm sees the class token alone: its patches come as they are.
    """

    cls: Float[Array, "b d"]
    patches: Float[Array, "b n d"]
    registers: Float[Array, "b r d"]


class PatchEmbed(nnx.Module):
    """The patch convolution as one matmul: a patch is a row of patch * patch * 3 values."""

    def __init__(self, spec: ViTSpec, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.patch_size = spec.patch_size
        fan_in = 3 * spec.patch_size**2
        init = torch_uniform(fan_in)
        self.proj = nnx.Linear(
            fan_in,
            spec.width,
            kernel_init=init,
            bias_init=init,
            use_bias=spec.patch_bias,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        """One token a patch, row by row."""
        batch, height, width, _ = images.shape
        patch = self.patch_size
        rows, columns = height // patch, width // patch
        patches = images.reshape(batch, rows, patch, columns, patch, 3).swapaxes(2, 3)
        return self.proj(patches.reshape(batch, rows * columns, patch * patch * 3))


def _stacked_blocks(spec: ViTSpec, *, dtype: DTypeLike, attention: str, rngs: nnx.Rngs) -> Block:
    """A Block whose every parameter has a leading layer axis."""

    def make(key: PRNGKeyArray) -> Block:
        return Block(spec, dtype=dtype, attention=attention, rngs=nnx.Rngs(key))

    keys = jax.random.split(rngs.params(), spec.depth)
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0))))
    return nnx.merge(graph, jax.vmap(lambda key: nnx.state(make(key)))(keys))


class VisionTransformer(nnx.Module):
    """Class token, registers and patches through pre-norm blocks and a final LayerNorm."""

    def __init__(
        self,
        spec: ViTSpec,
        *,
        dtype: DTypeLike = jnp.float32,
        attention: str = "xla",
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        tiny = nnx.initializers.normal(1e-6)
        self.patch_embed = PatchEmbed(spec, dtype=dtype, rngs=rngs)
        if spec.class_token:
            # CLIP's is a vector, which weight decay does not reach.
            shape = (spec.width,) if spec.pre_norm else (1, 1, spec.width)
            self.cls_token = nnx.Param(tiny(rngs.params(), shape))
        if spec.positions == "table":
            length = spec.table_prefix + math.prod(spec.table_shape)
            self.pos_embed = nnx.Param(LINEAR_INIT(rngs.params(), (1, length, spec.width)))
        mask_token = jnp.zeros((1, spec.width))
        if spec.mask_deviation:
            draw = nnx.initializers.normal(spec.mask_deviation)
            mask_token = draw(rngs.params(), mask_token.shape)
        self.mask_token = nnx.Param(mask_token)
        if spec.registers:
            self.register_tokens = nnx.Param(tiny(rngs.params(), (1, spec.registers, spec.width)))
        if spec.pre_norm:
            self.norm_pre = LayerNorm(spec.width, spec.norm_epsilon, rngs=rngs)
        self.blocks = _stacked_blocks(spec, dtype=dtype, attention=attention, rngs=rngs)
        self.norm = LayerNorm(spec.width, spec.norm_epsilon, rngs=rngs)
        if spec.pooling == "attention":
            self.pool = AttentionPool(spec, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        mask: Bool[Array, "b n"] | None = None,
        *,
        drop_path: float = 0.0,
        key: PRNGKeyArray | None = None,
        remat: str = "off",
        training: bool = False,
    ) -> Features:
        """Features of normalized images, the patches under `mask` replaced by the mask token.

        `drop_path` is the rate of the last block, growing linearly from 0 at the first; it needs a
        `key`. `remat` says what the backward pass makes again, see REMAT; `training` that there
        will be one, which chooses what is compiled, not what it computes. ValueError where a side
        is no multiple of the patch size.
        """
        tokens = self.embed(images, mask)
        keep = self._keep(drop_path, key, images.shape[0])
        rotation = self._rotation(images)
        tokens, _ = self._run_blocks(tokens, (), keep, remat, rotation, training=training)
        return self.features(tokens, normalize=True)

    def intermediates(
        self,
        images: Float[Array, "b h w 3"],
        blocks: Sequence[int],
        mask: Bool[Array, "b n"] | None = None,
        *,
        normalize: bool = True,
    ) -> tuple[Features, ...]:
        """The outputs of the given blocks (0 is the first), each through the final LayerNorm unless
        told not to.
        """
        outputs = self.block_tokens(images, blocks, mask)
        return tuple(self.features(outputs[i], normalize=normalize) for i in range(len(blocks)))

    def block_tokens(
        self,
        images: Float[Array, "b h w 3"],
        blocks: Sequence[int],
        mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "l b t d"]:
        """All tokens after each of the given blocks, as the block leaves them."""
        tokens, rotation = self.embed(images, mask), self._rotation(images)
        once = tuple(dict.fromkeys(blocks))
        outputs = self._run_blocks(tokens, once, None, "off", rotation)[1]
        repeated = len(once) < len(blocks)
        return outputs[jnp.array([once.index(block) for block in blocks])] if repeated else outputs

    def class_attention(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b heads n"]:
        """How much each head of the class token attends to each patch in the last block, float32.

        What goes to the class token itself and to registers is missing from the sum of 1. Without
        a class token: what the pool's query attends to, or, where patches are only averaged, the
        same for each.
        """
        spec, tokens, rotation = self.spec, self.embed(images, None), self._rotation(images)
        if not spec.class_token:
            tokens, _ = self._run_blocks(tokens, (), None, "off", rotation)
            patches = self.features(tokens, normalize=True).patches
            if spec.pooling == "attention":
                return self.pool.attention(patches)
            batch, count, _ = patches.shape
            return jnp.full((batch, spec.heads, count), 1.0 / count)
        if spec.depth > 1:
            _, (tokens,) = self._run_blocks(tokens, (spec.depth - 2,), None, "off", rotation)
        graph, stacked = nnx.split(self.blocks)
        last = nnx.merge(graph, jax.tree.map(lambda layers: layers[-1], stacked))
        qkv = last.attn.projected(last.norm1(tokens), rotation).astype(jnp.float32)
        scores = jnp.einsum("bhd,bthd->bht", qkv[:, 0, 0], qkv[:, :, 1])
        weights = jax.nn.softmax(scores * (spec.width // spec.heads) ** -0.5)
        return weights[..., spec.prefix :]

    def embed(self, images: jax.Array, mask: jax.Array | None) -> Float[Array, "b t d"]:
        """The tokens that the first block reads."""
        spec = self.spec
        batch, height, width, _ = images.shape
        if height % spec.patch_size or width % spec.patch_size:
            raise ValueError(
                f"image sides must be multiples of the patch size {spec.patch_size}, found "
                f"{height} x {width}"
            )
        grid = (height // spec.patch_size, width // spec.patch_size)
        stream = jnp.float32
        patches = self.patch_embed(images).astype(stream)
        if mask is not None:
            patches = jnp.where(mask[..., None], self.mask_token[None], patches)
        before: list[jax.Array] = []
        if spec.class_token:
            token = self.cls_token[...].astype(stream)
            before.append(jnp.broadcast_to(token, (batch, 1, spec.width)))
        if spec.positions == "table":
            table = resize_position_table(self.pos_embed[...], spec, grid)
            first = spec.table_prefix
            patches = patches + table[:, first:]
            before = [token + table[:, :first] if first else token for token in before]
        if spec.registers:
            # Registers have no position: they enter after the table is added.
            registers = (batch, spec.registers, spec.width)
            tokens = self.register_tokens[...].astype(stream)
            before.append(jnp.broadcast_to(tokens, registers))
        tokens = jnp.concatenate([*before, patches], axis=1)
        return self.norm_pre(tokens) if spec.pre_norm else tokens

    def _rotation(self, images: jax.Array) -> Rotation | None:
        spec = self.spec
        if spec.positions != "rotary":
            return None
        rows, columns = (side // spec.patch_size for side in images.shape[1:3])
        return rotation((rows, columns), spec.width // spec.heads, spec.prefix)

    def _keep(
        self, rate: float, key: PRNGKeyArray | None, batch: int
    ) -> Float[Array, "l 2 b 1 1"] | None:
        if rate == 0.0:
            return None
        if key is None:
            raise ValueError("drop_path needs a key")
        kept = 1.0 - jnp.linspace(0.0, rate, self.spec.depth).reshape(-1, 1, 1, 1, 1)
        drawn = jax.random.bernoulli(key, kept, (self.spec.depth, 2, batch, 1, 1))
        return drawn / kept

    def _run_blocks(
        self,
        tokens: jax.Array,
        wanted: tuple[int, ...],
        keep: jax.Array | None,
        remat: str,
        rotation: Rotation | None,
        *,
        training: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens after the last block, and [len(wanted), b, t, d] those after each wanted block."""
        depth = self.spec.depth
        outside = [block for block in wanted if not 0 <= block < depth]
        if outside:
            raise ValueError(f"there are blocks 0 to {depth - 1}, asked for {outside}")
        graph, stacked = nnx.split(self.blocks)
        # Each block writes its output to its slot; those not asked for share the last one, cut off
        # below. So memory grows with the number of blocks asked for, not with the depth.
        slots = [wanted.index(block) if block in wanted else len(wanted) for block in range(depth)]
        outputs = jnp.zeros((len(wanted) + 1 if wanted else 0, *tokens.shape), tokens.dtype)

        def body(carry, layer):
            tokens, outputs = carry
            block, slot, kept = layer
            tokens = nnx.merge(graph, block)(tokens, kept, rotation, training=training)
            if wanted:
                outputs = jax.lax.dynamic_update_index_in_dim(outputs, tokens, slot, 0)
            return (tokens, outputs), None

        layers = (stacked, jnp.asarray(slots), keep)
        # Under a scan nothing can be merged with the forward pass: no barrier against it is needed.
        rematted = jax.checkpoint(body, prevent_cse=False, policy=REMAT[remat])
        (tokens, outputs), _ = jax.lax.scan(rematted, (tokens, outputs), layers)
        return tokens, outputs[: len(wanted)]

    def pool_parts(self, tokens: jax.Array) -> PoolParts:
        """The steps of an attention pool, of the tokens after the last block."""
        return self.pool.parts(self.features(tokens, normalize=True).patches)

    def features(self, tokens: jax.Array, *, normalize: bool) -> Features:
        """Features from the tokens after a block."""
        spec = self.spec
        if normalize and spec.final_norm == "tokens":
            tokens = self.norm(tokens)
        registers = tokens[:, int(spec.class_token) : spec.prefix]
        patches = tokens[:, spec.prefix :]
        if spec.pooling == "token":
            cls = tokens[:, 0]
        elif spec.pooling == "mean":
            cls = jnp.mean(patches.astype(jnp.float32), axis=1).astype(tokens.dtype)
        else:
            cls = self.pool(patches)
        if normalize and spec.final_norm == "class":
            cls = self.norm(cls)
        return Features(cls, patches, registers)
