"""The configuration of an evaluation, as a frozen record; configs/eval/base.py says what each field
means.
"""

import dataclasses
from typing import Any, NamedTuple

from proteus_jax.data.dataset import Reading


class EvalDataConfig(NamedTuple):
    """The images, and how they are read."""

    root: str
    resize: int
    crop: int
    workers: int | None
    threads: int
    range: str
    alpha: str
    image_column: str
    label_column: str

    @property
    def reading(self) -> Reading:
        """How images are found and become pixels."""
        return Reading.of(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The fields of an evaluation; `as_json` holds all of them as config.json does.

    `settings` is the protocol's own record, of the fields under its name.
    """

    as_json: dict[str, Any]
    protocol: str
    settings: Any
    model: str
    seed: int
    batch: int
    precision: str
    data: EvalDataConfig
