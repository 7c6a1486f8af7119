"""Architectures: one frozen row of sizes for each ViT.

Sizes of the named students are those of the paper (arXiv 2407.10366) and of DINOv2, whose ViT they
are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

FEED_FORWARDS = ("mlp", "swiglu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTSpec:
    """Everything that fixes a ViT's parameters and arithmetic.

    `grid` is the side of the stored position table in patches; images of other sizes use a resized
    table. `interpolate_offset` and `interpolate_antialias` say how DINOv2 resizes it: 0.1 without
    antialias for the plain models, no offset with antialias for those with registers.
    """

    width: int
    depth: int
    heads: int
    patch_size: int = 14
    grid: int = 16
    feed_forward: str = "mlp"
    registers: int = 0
    norm_epsilon: float = 1e-6
    interpolate_offset: float = 0.1
    interpolate_antialias: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch_size", "grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.registers < 0:
            raise ValueError(f"registers must not be negative, found {self.registers}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.feed_forward not in FEED_FORWARDS:
            raise ValueError(
                f"feed_forward must be one of {FEED_FORWARDS}, found {self.feed_forward!r}"
            )

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward layer; SwiGLU's is two thirds, rounded up to a multiple of
        8.
        """
        if self.feed_forward == "swiglu":
            return (int(4 * self.width * 2 / 3) + 7) // 8 * 8
        return 4 * self.width

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ViTSpec":
        """The inverse of `to_json`; ValueError names fields that are unknown, missing or of another
        type.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        required = ("width", "depth", "heads")
        wrong = [f"unknown field {name!r}" for name in fields if name not in defaults]
        wrong += [f"missing field {name!r}" for name in required if name not in fields]
        for name, value in fields.items():
            kind = int if name in required else type(defaults.get(name, value))
            # JSON writes 0.0 as 0 where it likes; a bool would pass for an int.
            fits = type(value) is kind or (kind is float and type(value) is int)
            if not fits:
                wrong.append(f"{name} should be {kind.__name__}, found {value!r}")
        if wrong:
            raise ValueError("not a ViT's sizes: " + "; ".join(wrong))
        return cls(**fields)


SPECS: dict[str, ViTSpec] = {
    "vit_tiny": ViTSpec(width=192, depth=12, heads=3),
    "vit_small": ViTSpec(width=384, depth=12, heads=6),
    "vit_base": ViTSpec(width=768, depth=12, heads=12),
    "vit_large": ViTSpec(width=1024, depth=24, heads=16),
    "vit_giant2": ViTSpec(width=1536, depth=40, heads=24),
}
