"""The part of a configuration that says who teaches and how: teachers by name, and the method."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from proteus_jax.models.normalization import STATISTICS, Normalization

# The name of the teacher whose images the students see, and whose metrics have no prefix.
PRIMARY = "teacher"
# The statistics that a teacher was trained with.
NATIVE = "native"


class TeacherConfig(NamedTuple):
    """One teacher: `source` is a known name, a directory or an address.

    `normalization` names the channel statistics of its images, `image_size` their side in pixels,
    None where it is the crop's. With `standardize` its tokens are brought to mean 0 and deviation
    1. `loss_weights` are factors by loss, None where the method's own factor holds.
    """

    source: str
    normalization: str
    image_size: int | None
    standardize: bool
    loss_weights: Mapping[str, float | None]

    def statistics(self, native: Normalization) -> Normalization:
        """Chooses the statistics of its images; `native` are those that it was trained with."""
        return native if self.normalization == NATIVE else STATISTICS[self.normalization]


class MethodConfig(NamedTuple):
    """A method's name in proteus_jax.methods.registry, and the fields that it declares there."""

    name: str
    fields: Mapping[str, Any]
