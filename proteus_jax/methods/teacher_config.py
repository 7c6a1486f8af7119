"""The teachers of a configuration: the first, in fields of its own, and any more."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from proteus_jax.methods.losses import LossWeights
from proteus_jax.models.normalization import STATISTICS, Normalization

# The first teacher's name among its heads, whoever it is.
PRIMARY = "teacher"
NATIVE = "own"


class TeacherConfig(NamedTuple):
    """One teacher as a configuration has it: `source` is a known name or a directory."""

    source: str
    weights: LossWeights
    normalisation: str = NATIVE
    crop: int | None = None
    standardise: bool = False

    def statistics(self, own: Normalization) -> Normalization:
        """Statistics of the images that the teacher is given; `own` are those that it was trained
        with.
        """
        return own if self.normalisation == NATIVE else STATISTICS[self.normalisation]


def teacher_configs(config: Any) -> dict[str, TeacherConfig]:
    """The teachers by name, the first teacher first."""
    teachers = {
        PRIMARY: TeacherConfig(
            config.teacher,
            LossWeights(config.loss.token, config.loss.feature, config.loss.patch),
            config.teacher_normalisation,
            config.teacher_crop,
            config.standardise,
        )
    }
    more: Mapping[str, Any] = config.more_teachers
    for name in more:
        one = more[name]
        weights = LossWeights(one.loss.token, one.loss.feature, one.loss.patch)
        teachers[name] = TeacherConfig(
            one.teacher, weights, one.normalisation, one.crop, one.standardise
        )
    return teachers


def masks(config: Any) -> bool:
    """True where any teacher's patches are predicted under a mask."""
    return any(teacher.weights.patch > 0 for teacher in teacher_configs(config).values())


def image_side(config: Any) -> int:
    """The largest that a model wants: the crops that are made."""
    return max(config.data.crop, *(each.crop or 0 for each in teacher_configs(config).values()))
