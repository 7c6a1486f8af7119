"""Logistic regression for many regularizers at once, by L-BFGS with warm starts.

The objective is scikit-learn's and cuML's: C times the sum of the cross entropies, plus half the
squared weights, the biases free. C is 1 / decay.
"""

import contextlib
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Values of C that are fitted together; the next ones start from the last of them.
TOGETHER = 9
MEMORY, LINE_SEARCH_STEPS = 10, 50


class Fit(NamedTuple):
    """Weights [L, D, K] and biases [L, K] for each of L decays, and the largest derivative that is
    left of each fit, by the mean of the cross entropies.
    """

    weights: np.ndarray
    biases: np.ndarray
    slope: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """[L, N, K] of features [N, D]."""
        return np.matmul(features, self.weights) + self.biases[:, None]


def fit(
    features: np.ndarray,
    targets: np.ndarray,
    decays: np.ndarray,
    *,
    dtype: Any = np.float64,
    tolerance: float = 1e-7,
    most: int = 1000,
) -> Fit:
    """Fits standardized features [N, D]. Targets are classes [N], for one softmax, or 0 and 1 [N,
    K], for K classifiers of their own.

    Each fit goes on until no derivative is larger than `tolerance`, at most `most` steps.
    """
    several = targets.ndim == 2
    classes = targets.shape[1] if several else int(targets.max()) + 1
    order = np.argsort(-decays, kind="stable")
    with _precision(dtype):
        x = jnp.asarray(features, dtype)
        y = jnp.asarray(targets, dtype if several else jnp.int32)
        start = {
            "weights": jnp.zeros((features.shape[1], classes), dtype),
            "biases": jnp.zeros(classes, dtype),
        }
        parts = []
        for first in range(0, len(order), TOGETHER):
            chosen = decays[order[first : first + TOGETHER]]
            # One shape for all groups: the last decay again where some are missing.
            padded = np.concatenate([chosen, np.repeat(chosen[-1:], TOGETHER - len(chosen))])
            scaled = jnp.asarray(padded / len(features), dtype)
            solutions = jax.device_get(_descend(x, y, scaled, start, tolerance, most))
            parts.append(jax.tree.map(operator.itemgetter(slice(len(chosen))), solutions))
            start = jax.tree.map(lambda a: jnp.asarray(a[-1], dtype), solutions[0])
    back = np.argsort(order)
    return Fit(
        np.concatenate([params["weights"] for params, _ in parts])[back],
        np.concatenate([params["biases"] for params, _ in parts])[back],
        np.concatenate([slope for _, slope in parts])[back],
    )


def objective(
    params: dict[str, jax.Array], features: jax.Array, targets: jax.Array, decay: Any
) -> jax.Array:
    """The mean cross entropy and `decay` times half the squared weights; decay is 1 / (C N)."""
    scores = jnp.matmul(features, params["weights"], precision=jax.lax.Precision.HIGHEST)
    scores = scores + params["biases"]
    if targets.ndim == 2:
        loss = jnp.sum(optax.sigmoid_binary_cross_entropy(scores, targets)) / len(features)
    else:
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, targets))
    return loss + 0.5 * decay * jnp.sum(params["weights"] ** 2)


@functools.partial(jax.jit, static_argnames="most")
def _descend(
    features: jax.Array,
    targets: jax.Array,
    decays: jax.Array,
    start: dict[str, jax.Array],
    tolerance: Any,
    most: int,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """All fits side by side; one that has arrived stays where it is."""
    solver = optax.lbfgs(
        memory_size=MEMORY,
        linesearch=optax.scale_by_zoom_linesearch(
            max_linesearch_steps=LINE_SEARCH_STEPS, initial_guess_strategy="one"
        ),
    )

    def value_of(decay: jax.Array):
        return lambda params: objective(params, features, targets, decay)

    def slope_of(gradient: Any) -> jax.Array:
        return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]))

    def begin(decay: jax.Array):
        value, gradient = jax.value_and_grad(value_of(decay))(start)
        return start, solver.init(start), value, gradient

    def step(params, state, value, gradient, decay):
        function = value_of(decay)
        updates, state = solver.update(
            gradient, state, params, value=value, grad=gradient, value_fn=function
        )
        params = optax.apply_updates(params, updates)
        value, gradient = jax.value_and_grad(function)(params)
        return params, state, value, gradient

    def active(carry):
        return jax.vmap(slope_of)(carry[3]) > tolerance

    def body(loop):
        carry, count, stuck = loop
        moved = jax.vmap(step)(*carry, decays)  # pyright: ignore[reportCallIssue]
        # A step that makes nothing smaller is the end of what this precision can do.
        goes = active(carry) & ~stuck
        stuck = stuck | (goes & ~(moved[2] < carry[2]))

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where((goes & ~stuck).reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return jax.tree.map(keep, moved, carry), count + 1, stuck

    def goes_on(loop):
        carry, count, stuck = loop
        return (count < most) & jnp.any(active(carry) & ~stuck)

    first = (jax.vmap(begin)(decays), 0, jnp.zeros(len(decays), bool))
    carry, _, _ = jax.lax.while_loop(goes_on, body, first)
    return carry[0], jax.vmap(slope_of)(carry[3])


def _precision(dtype: Any) -> contextlib.AbstractContextManager:
    return jax.enable_x64(np.dtype(dtype) == np.float64)
