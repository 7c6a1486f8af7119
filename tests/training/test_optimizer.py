"""Muon and factors of the rates, written out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from proteus_jax.training.optimizer import PARTS, adamw, muon, with_rates

# The coefficients of Jordan's polynomial.
A, B, C = 3.4445, -4.775, 2.0315


def student(rng: np.random.Generator) -> Any:
    """Params with one array of each kind, blocks stacked."""

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "backbone": {
            "pos_embed": drawn(1, 5, 4),
            "patch_embed": {"proj": {"kernel": drawn(12, 4)}},
            "blocks": {"attn": {"qkv": {"kernel": drawn(3, 4, 12), "bias": drawn(3, 12)}}},
            "norm": {"scale": drawn(4)},
        },
        "heads": {"teacher": {"token": {"linear": {"kernel": drawn(4, 6)}}}},
    }


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps of one matrix, in float64."""
    wide = matrix / (np.linalg.norm(matrix) + 1e-8)
    turned = wide.shape[0] > wide.shape[1]
    wide = wide.T if turned else wide
    for _ in range(5):
        gram = wide @ wide.T
        wide = A * wide + (B * gram + C * gram @ gram) @ wide
    return wide.T if turned else wide


def test_muon_written_out(rng: np.random.Generator) -> None:
    """Two updates of the blocks' kernels; AdamW's of everything else, at its own rate."""
    rate, decay = 0.02, 0.05
    params: Any = student(rng)
    optimizer, other = muon(rate, 1e-3, decay), adamw(1e-3, decay)
    state, plain = optimizer.init(params), other.init(params)
    kernel = np.asarray(params["backbone"]["blocks"]["attn"]["qkv"]["kernel"], np.float64)
    mean = np.zeros_like(kernel)
    theirs: Any = params
    for step in range(1, 3):
        gradients = jax.tree.map(
            lambda array: jnp.asarray(rng.normal(size=array.shape), jnp.float32), params
        )
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        updates, plain = other.update(gradients, plain, theirs)
        theirs = optax.apply_updates(theirs, updates)
        own = np.asarray(gradients["backbone"]["blocks"]["attn"]["qkv"]["kernel"], np.float64)
        mean = 0.95 * mean + 0.05 * own
        ahead = 0.95 * mean / (1 - 0.95 ** (step + 1)) + 0.05 * own / (1 - 0.95**step)
        update = np.stack([orthogonalized(each) for each in ahead])
        kernel -= rate * (0.2 * np.sqrt(12) * update + decay * kernel)
    found = params["backbone"]["blocks"]["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(found, kernel, rtol=1e-3, atol=2e-4)
    for tree in (params, theirs):
        tree["backbone"]["blocks"]["attn"]["qkv"].pop("kernel")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, theirs)


@pytest.mark.parametrize("part", PARTS)
def test_a_factor_reaches_one_part(rng: np.random.Generator, part: str) -> None:
    params = student(rng)
    plain = adamw(1e-2)
    factors = dict.fromkeys(PARTS, 1.0) | {part: 0.25}
    scaled = with_rates(plain, factors)
    assert with_rates(plain, dict.fromkeys(PARTS, 1.0)) is plain
    expected, _ = plain.update(params, plain.init(params), params)
    found, _ = scaled.update(params, scaled.init(params), params)
    ratios = jax.tree.map(lambda a, b: float(jnp.mean(a / b)), found, expected)
    backbone = ratios["backbone"]
    assert {
        "embedding": [backbone["pos_embed"], backbone["patch_embed"]["proj"]["kernel"]],
        "blocks": [*backbone["blocks"]["attn"]["qkv"].values(), backbone["norm"]["scale"]],
        "heads": [ratios["heads"]["teacher"]["token"]["linear"]["kernel"]],
    }[part] == pytest.approx([0.25] * {"embedding": 2, "blocks": 3, "heads": 1}[part])
    assert sum(value != pytest.approx(1.0) for value in jax.tree.leaves(ratios)) == {
        "embedding": 2, "blocks": 3, "heads": 1,
    }[part]  # fmt: skip
