"""The protocols that a configuration can name; a new one is a module and a line here."""

from proteus_jax.evaluation.protocols import (
    analysis,
    fine_grained,
    knn,
    linear,
    ridge,
    robustness,
)

PROTOCOLS = {
    each.name: each
    for each in (
        knn.PROTOCOL,
        ridge.PROTOCOL,
        linear.PROTOCOL,
        fine_grained.PROTOCOL,
        robustness.PROTOCOL,
        analysis.PROTOCOL,
    )
}
