"""The models, losses and update again, as plainly as they can be written: no scan, no custom
gradient, no stacked batch, one image layout after the other.

Tests compare the package with these. Nothing here imports the package's own arithmetic.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def layer_norm(tokens: jax.Array, params: Tree, epsilon: float) -> jax.Array:
    mean = tokens.mean(axis=-1, keepdims=True)
    variance = ((tokens - mean) ** 2).mean(axis=-1, keepdims=True)
    return (tokens - mean) / jnp.sqrt(variance + epsilon) * params["scale"] + params["bias"]


def linear(tokens: jax.Array, params: Tree) -> jax.Array:
    return tokens @ params["kernel"] + params.get("bias", 0.0)


def activation(name: str, values: jax.Array) -> jax.Array:
    if name == "quick_gelu":
        return values / (1 + jnp.exp(-1.702 * values))
    if name == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)
        return 0.5 * values * (1 + jnp.tanh(inner))
    return values * 0.5 * (1 + jax.scipy.special.erf(values / math.sqrt(2)))


def feed_forward(spec: Any, tokens: jax.Array, params: Tree) -> jax.Array:
    if spec.feed_forward == "swiglu":
        gate, value = jnp.split(linear(tokens, params["w12"]), 2, axis=-1)
        return linear(gate / (1 + jnp.exp(-gate)) * value, params["w3"])
    return linear(activation(spec.activation, linear(tokens, params["fc1"])), params["fc2"])


def softmax_attention(qkv: jax.Array) -> jax.Array:
    """[b, t, 3, h, d] -> [b, t, h, d], by jax.nn.softmax."""
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(qkv.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)


def rotate(vector: jax.Array, row: float, column: float) -> jax.Array:
    """DINOv3: pairs (i, i + d/2) of a head's channels turned, the first quarter of the frequencies
    by the row and the second by the column; both go from -1 to 1.
    """
    half = vector.shape[-1] // 2
    count = half // 2
    angles = [
        2 * math.pi * place / 100 ** (index / count)
        for place in (row, column)
        for index in range(count)
    ]
    cosine, sine = jnp.cos(jnp.array(angles)), jnp.sin(jnp.array(angles))
    first, second = vector[..., :half], vector[..., half:]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def rotated(spec: Any, qkv: jax.Array, grid: tuple[int, int]) -> jax.Array:
    columns = [qkv[:, :, 2]]
    for part in (1, 0):
        tokens = [qkv[:, index, part] for index in range(spec.prefix)]
        for number in range(grid[0] * grid[1]):
            row, column = divmod(number, grid[1])
            places = ((2 * row + 1) / grid[0] - 1, (2 * column + 1) / grid[1] - 1)
            tokens.append(rotate(qkv[:, spec.prefix + number, part], *places))
        columns.insert(0, jnp.stack(tokens, axis=1))
    return jnp.stack(columns, axis=2)


def projected(spec: Any, tokens: jax.Array, params: Tree, grid: tuple[int, int]) -> jax.Array:
    """Queries, keys and values [b, t, 3, h, d] of a block."""
    batch, length, width = tokens.shape
    layer = dict(params["attn"]["qkv"])
    if not spec.key_bias:
        layer["bias"] = layer["bias"].at[width : 2 * width].set(0.0)
    qkv = linear(layer_norm(tokens, params["norm1"], spec.norm_epsilon), layer)
    qkv = qkv.reshape(batch, length, 3, spec.heads, width // spec.heads)
    return rotated(spec, qkv, grid) if spec.positions == "rotary" else qkv


def block(spec: Any, tokens: jax.Array, params: Tree, grid: tuple[int, int]) -> jax.Array:
    qkv = projected(spec, tokens, params, grid)
    attended = linear(softmax_attention(qkv).reshape(tokens.shape), params["attn"]["proj"])
    tokens = tokens + attended * (params["ls1"]["gamma"] if spec.layer_scale else 1.0)
    fed = feed_forward(spec, layer_norm(tokens, params["norm2"], spec.norm_epsilon), params["mlp"])
    return tokens + fed * (params["ls2"]["gamma"] if spec.layer_scale else 1.0)


def embed(spec: Any, params: Tree, images: jax.Array, mask: Any = None) -> jax.Array:
    """Tokens before the first block, for images of the table's own grid."""
    batch, side = len(images), spec.patch_size
    rows, columns = images.shape[1] // side, images.shape[2] // side
    patches = jnp.stack(
        [
            images[:, y * side : (y + 1) * side, x * side : (x + 1) * side].reshape(batch, -1)
            for y in range(rows)
            for x in range(columns)
        ],
        axis=1,
    )
    patches = linear(patches, params["patch_embed"]["proj"])
    if mask is not None:
        patches = jnp.where(mask[..., None], params["mask_token"][0], patches)
    cls = jnp.zeros((batch, 0, spec.width))
    if spec.class_token:
        cls = jnp.broadcast_to(params["cls_token"].reshape(1, 1, -1), (batch, 1, spec.width))
    if spec.positions == "table":
        table = params["pos_embed"]
        if spec.class_token and spec.class_position:
            cls, table = cls + table[:, :1], table[:, 1:]
        patches = patches + table
    registers = jnp.zeros((batch, 0, spec.width))
    if spec.registers:
        registers = jnp.tile(params["register_tokens"], (batch, 1, 1))
    tokens = jnp.concatenate([cls, registers, patches], axis=1)
    return layer_norm(tokens, params["norm_pre"], spec.norm_epsilon) if spec.pre_norm else tokens


def pool(spec: Any, params: Tree, patches: jax.Array) -> jax.Array:
    """SigLIP: one learned query attends to all patches, then a feed-forward layer is added."""
    batch, count, width = patches.shape
    everything = jnp.concatenate([jnp.tile(params["probe"], (batch, 1, 1)), patches], axis=1)
    rows = linear(everything, params["qkv"])
    heads = rows.reshape(batch, count + 1, 3, spec.heads, width // spec.heads)
    scores = jnp.einsum("bhd,bnhd->bhn", heads[:, 0, 0], heads[:, 1:, 1])
    weights = jax.nn.softmax(scores / math.sqrt(width // spec.heads), axis=-1)
    mixed = jnp.einsum("bhn,bnhd->bhd", weights, heads[:, 1:, 2]).reshape(batch, width)
    pooled = linear(mixed, params["proj"])
    normalized = layer_norm(pooled, params["norm"], spec.norm_epsilon)
    return pooled + feed_forward(spec, normalized, params["mlp"])


def vit(spec: Any, params: Tree, images: jax.Array, mask: Any = None) -> tuple[Any, ...]:
    """(class token, patches, registers) of normalized images of the table's own grid."""
    grid = (images.shape[1] // spec.patch_size, images.shape[2] // spec.patch_size)
    tokens = embed(spec, params, images, mask)
    for number in range(spec.depth):
        one = jax.tree.map(lambda stacked, number=number: stacked[number], params["blocks"])
        tokens = block(spec, tokens, one, grid)
    if spec.final_norm == "tokens":
        tokens = layer_norm(tokens, params["norm"], spec.norm_epsilon)
    registers = tokens[:, int(spec.class_token) : spec.prefix]
    patches = tokens[:, spec.prefix :]
    if spec.pooling == "token":
        cls = tokens[:, 0]
    elif spec.pooling == "mean":
        cls = patches.mean(axis=1)
    else:
        cls = pool(spec, params["pool"], patches)
    if spec.final_norm == "class":
        cls = layer_norm(cls, params["norm"], spec.norm_epsilon)
    return cls, patches, registers


def head(tokens: jax.Array, params: Tree) -> jax.Array:
    return linear(layer_norm(tokens, params["norm"], 1e-5), params["linear"])


def losses(
    spec: Any, params: Tree, images: jax.Array, targets: dict[str, tuple[Any, Any]], mask: Any
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """Token, feature and patch loss (arXiv 2407.10366, equations 1 to 3) of each teacher, whose
    class tokens and patches are in `targets`; `mask` is of every second image.
    """
    cls, patches, _ = vit(spec, params["backbone"], images)
    _, masked, _ = vit(spec, params["backbone"], images[::2], mask)
    found = {}
    for name, target in targets.items():
        heads = params["heads"][name]
        token = head(cls, heads["token"])
        feature = jnp.concatenate([token[:, None], head(patches, heads["feature"])], axis=1)
        wanted = jnp.concatenate([target[0][:, None], target[1]], axis=1)
        missed = (head(masked, heads["patch"]) - target[1][::2]) ** 2 * mask[..., None]
        found[name] = (
            jnp.mean((token - target[0]) ** 2),
            jnp.mean((feature - wanted) ** 2),
            jnp.sum(missed) / (jnp.sum(mask) * missed.shape[-1]),
        )
    return found


def adamw(
    value: np.ndarray, gradients: list[np.ndarray], rate: list[float], decay: float
) -> np.ndarray:
    """PyTorch's AdamW (betas 0.9 and 0.999, eps 1e-8) over several gradients, in float64."""
    value = value.astype(np.float64)
    first, second = np.zeros_like(value), np.zeros_like(value)
    for step, (gradient, size) in enumerate(zip(gradients, rate, strict=True), 1):
        value = value * (1 - size * decay)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.astype(np.float64) ** 2
        corrected = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        value = value - size * first / (1 - 0.9**step) / corrected
    return value
