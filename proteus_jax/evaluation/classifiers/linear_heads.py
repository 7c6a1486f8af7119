"""Many linear heads on the tokens of a frozen backbone, trained at once: by SGD of momentum 0.9
without weight decay, the rate a cosine to 0 over all steps; rates are those for a batch of 256.

Source: facebookresearch/dinov2 eval/linear.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from proteus_jax.models.functional import BackboneFunction, Params

MOMENTUM, REFERENCE_BATCH, DEVIATION = 0.9, 256, 0.01


class Tokens(NamedTuple):
    """Class tokens [b, blocks, d] of the last blocks, the last one last, and the mean [b, d] of its
    patch tokens, all after the final LayerNorm.
    """

    cls: jax.Array
    mean: jax.Array


class Kind(NamedTuple):
    """The tokens that a head sees."""

    blocks: int
    pooled: bool

    def of(self, tokens: Tokens) -> jax.Array:
        """The head's input [b, f]."""
        last = tokens.cls[:, -self.blocks :]
        flat = last.reshape(len(last), -1)
        return jnp.concatenate([flat, tokens.mean], axis=1) if self.pooled else flat

    def name(self, rate: float) -> str:
        """A head's key in results.json."""
        return f"blocks_{self.blocks}_avgpool_{str(self.pooled).lower()}_lr_{rate:g}"


class Probe(NamedTuple):
    """The heads of a probe: for each kind, one for each learning rate."""

    kinds: tuple[Kind, ...]
    rates: tuple[float, ...]
    classes: int
    steps: int
    batch: int

    @property
    def names(self) -> list[str]:
        """Names of all heads, in the order of `predictions`."""
        return [kind.name(rate) for kind in self.kinds for rate in self.rates]

    def init(self, width: int, seed: int) -> Params:
        """Weights [f, rates, classes] of N(0, 0.01), biases of 0, and momenta, for each kind."""
        keys = jax.random.split(jax.random.key(seed), len(self.kinds))
        heads = []
        for key, kind in zip(keys, self.kinds, strict=True):
            shape = (width * (kind.blocks + kind.pooled), len(self.rates), self.classes)
            weight = DEVIATION * jax.random.normal(key, shape)
            heads.append({"weight": weight, "bias": jnp.zeros(shape[1:])})
        return {"heads": heads, "momenta": jax.tree.map(jnp.zeros_like, heads)}

    def logits(self, heads: list[Params], tokens: Tokens) -> jax.Array:
        """[b, heads, classes], float32."""

        def of_kind(kind: Kind, head: Params) -> jax.Array:
            weight = head["weight"]
            flat = jnp.matmul(
                kind.of(tokens),
                weight.reshape(len(weight), -1),
                precision=jax.lax.Precision.HIGHEST,
            )
            return flat.reshape(-1, *weight.shape[1:]) + head["bias"]

        return jnp.concatenate([of_kind(*each) for each in zip(self.kinds, heads, strict=True)], 1)

    def update(
        self, state: Params, tokens: Tokens, labels: jax.Array, step: jax.Array
    ) -> tuple[Params, jax.Array]:
        """One step of SGD; also the mean loss of the heads. Labels are int [b]."""

        def loss(heads: list[Params]) -> jax.Array:
            scores = jax.nn.log_softmax(self.logits(heads, tokens))
            right = jnp.take_along_axis(scores, labels[:, None, None], axis=2)
            return -jnp.sum(jnp.mean(right, axis=0))

        total, gradients = jax.value_and_grad(loss)(state["heads"])
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * step / self.steps))
        rate = jnp.asarray(self.rates) * self.batch / REFERENCE_BATCH * cosine
        momenta = jax.tree.map(lambda m, g: MOMENTUM * m + g, state["momenta"], gradients)
        heads = jax.tree.map(lambda p, m: p - rate[:, None] * m, state["heads"], momenta)
        return {"heads": heads, "momenta": momenta}, total / len(self.names)


def last_tokens(
    backbone: BackboneFunction, params: Params, images: jax.Array, *, blocks: int
) -> Tokens:
    """The tokens of normalized images that the heads see."""
    depth = backbone.spec.depth
    outputs = backbone.intermediates(params, images, range(depth - blocks, depth))
    cls = jnp.stack([features.cls for features in outputs], axis=1)
    mean = outputs[-1].patches.mean(axis=1)
    return Tokens(cls.astype(jnp.float32), mean.astype(jnp.float32))
