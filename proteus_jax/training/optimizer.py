"""AdamW and its schedule, to the constants of the reference (arXiv 2407.10366; timm 0.9.16), and
Muon.

The one deliberate difference: the rate moves every step, not every epoch (docs/differences.md).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from proteus_jax.models.functional import Params

# Unscaled by the batch size in the reference.
WARMUP_LEARNING_RATE = 1e-6
MINIMUM_LEARNING_RATE = 1e-5
LEARNING_RATE_BATCH = 512
MUON_MOMENTUM, NEWTON_SCHULZ_STEPS, MUON_RMS = 0.95, 5, 0.2
# The parts of a student that a factor of the learning rate is for.
PARTS = ("embedding", "blocks", "heads")


def scaled_learning_rate(batch: int, base: float = 5e-4) -> float:
    """Peak learning rate: `base` for each 512 images of the global batch."""
    return base * batch / LEARNING_RATE_BATCH


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear from 1e-6 to `peak`, then a cosine to 1e-5 over all of `total_steps`.

    As in timm without warm-up prefix: the cosine counts from step 0, so the warm-up covers its
    beginning.
    """

    def schedule(step: Any) -> jax.Array:
        progress = jnp.minimum(step / total_steps, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(math.pi * progress))
        decayed = MINIMUM_LEARNING_RATE + (peak - MINIMUM_LEARNING_RATE) * cosine
        if warmup_steps == 0:
            return decayed
        rising = WARMUP_LEARNING_RATE + (peak - WARMUP_LEARNING_RATE) * step / warmup_steps
        return jnp.where(step < warmup_steps, rising, decayed)

    return schedule


def decay_mask(params: Params) -> Params:
    """True for the arrays that weight decay reaches: all but vectors and biases of a single block.

    Stacking gives every block array one more axis, which does not make a bias a matrix. Tables and
    tokens (pos_embed, cls_token, mask_token, register_tokens) have more axes than one and are
    decayed, as in the reference.
    """

    def decayed(path: tuple[Any, ...], value: Any) -> bool:
        names = [entry.key for entry in path]
        return value.ndim - ("blocks" in names) > 1 and names[-1] != "bias"

    return jax.tree_util.tree_map_with_path(decayed, params)


def adamw(
    schedule: optax.ScalarOrSchedule,
    weight_decay: float = 0.05,
    first_moment: DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """PyTorch's AdamW: betas 0.9 and 0.999, eps 1e-8, decay times the learning rate on
    `decay_mask`. The mean of the gradients is kept in the dtype `first_moment`, that of their
    squares in float32.
    """
    return optax.adamw(
        schedule,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=weight_decay,
        mask=decay_mask,
        mu_dtype=first_moment,
    )


def is_hidden_matrix(path: tuple[Any, ...]) -> bool:
    """Tells whether an array is a kernel of a block, which Muon is for. Embeddings, heads, biases
    and norms are AdamW's.
    """
    names = [entry.key for entry in path]
    return "blocks" in names and names[-1] == "kernel"


def muon(
    schedule: optax.ScalarOrSchedule,
    adamw_schedule: optax.ScalarOrSchedule,
    weight_decay: float = 0.05,
    first_moment: DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) for the kernels of all blocks, each block's a matrix of its own,
    at the rate of `schedule`; AdamW for the rest at that of `adamw_schedule`.

    Nesterov's momentum of 0.95, five Newton-Schulz steps, and updates of a root mean square of 0.2
    whatever the shape of a matrix (arXiv 2502.16982), so that rates and decay are on AdamW's scale.
    """

    def axes(params: Any) -> Any:
        return jax.tree.map(
            lambda array: optax.contrib.MuonDimensionNumbers((array.ndim - 2,), (array.ndim - 1,)),
            params,
        )

    def labels(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "muon" if is_hidden_matrix(path) else "adamw", params
        )

    of_matrices = optax.contrib.muon(
        schedule,
        beta=MUON_MOMENTUM,
        ns_steps=NEWTON_SCHULZ_STEPS,
        weight_decay=weight_decay,
        mu_dtype=first_moment,
        consistent_rms=MUON_RMS,
        muon_weight_dimension_numbers=axes,
    )
    others = adamw(adamw_schedule, weight_decay, first_moment)
    return optax.partition({"muon": of_matrices, "adamw": others}, labels)


def part_of(path: tuple[Any, ...]) -> str:
    """The part of a student that an array belongs to; the last norm counts among the blocks."""
    names = [entry.key for entry in path]
    if "heads" in names:
        return "heads"
    return "blocks" if {"blocks", "norm"} & set(names) else "embedding"


def with_rates(
    optimizer: optax.GradientTransformation, factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """The optimizer with its updates, decay included, times a factor for each of PARTS."""
    if all(factors[part] == 1.0 for part in PARTS):
        return optimizer

    def scaled(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, update: update * factors[part_of(path)], updates
        )

    return optax.chain(optimizer, optax.stateless(scaled))
