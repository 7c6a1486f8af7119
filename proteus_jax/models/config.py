"""Architectures: one frozen row of sizes and choices for each ViT.

Sizes of the named students are those of the paper (arXiv 2407.10366); their choices are DINOv2's,
or those of SynCLR and CLIP where a name ends so.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

FEED_FORWARDS = ("mlp", "swiglu")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
POSITIONS = ("table", "rotary")
# Where the class token of the features comes from: a token of its own, the mean of the patches, or
# an attention over them with a learned query.
POOLINGS = ("token", "mean", "attention")
# What the last LayerNorm sees: every token, or the class token alone.
FINAL_NORMS = ("tokens", "class")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTSpec:
    """Everything that fixes a ViT's parameters and arithmetic.

    `grid` is the side of the stored position table in patches; images of other sizes use a resized
    table. `interpolate_offset` and `interpolate_antialias` say how DINOv2 resizes it: 0.1 without
    antialias for the plain models, no offset with antialias for those with registers.

    The defaults are DINOv2's; what else there is came with the other teachers. `inner` is the width
    inside the feed-forward layer where it is not the usual one. `pre_norm` is CLIP's LayerNorm
    before the blocks, `patch_bias` and `key_bias` whether those biases exist, `class_token` and
    `class_position` whether there is such a token and an entry for it in the table. With rotary
    positions there is no table, and `grid` is that of the model's own image size.
    """

    width: int
    depth: int
    heads: int
    patch_size: int = 14
    grid: int = 16
    # Columns of a table that is no square, of `grid` rows; 0 for as many as rows.
    grid_columns: int = 0
    feed_forward: str = "mlp"
    registers: int = 0
    norm_epsilon: float = 1e-6
    interpolate_offset: float = 0.1
    interpolate_antialias: bool = False
    inner: int = 0
    activation: str = "gelu"
    layer_scale: bool = True
    pre_norm: bool = False
    patch_bias: bool = True
    key_bias: bool = True
    class_token: bool = True
    class_position: bool = True
    positions: str = "table"
    pooling: str = "token"
    final_norm: str = "tokens"
    # The deviation that a new mask token is drawn with, and whether a new qkv is Xavier's uniform.
    mask_deviation: float = 0.0
    xavier_qkv: bool = False

    def __post_init__(self) -> None:
        wrong = _of_another_type(vars(self))
        if wrong:
            raise ValueError(wrong[0])
        for name, (least, most) in _LIMITS.items():
            if not least <= getattr(self, name) <= most:
                value = getattr(self, name)
                raise ValueError(f"{name} must be from {least} to {most}, found {value}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, found {getattr(self, name)!r}")
        if self.pooling == "token" and not self.class_token:
            raise ValueError("pooling 'token' needs a class token")
        if self.positions == "rotary" and self.width // self.heads % 4:
            raise ValueError(
                f"rotary positions need heads of a multiple of 4 channels, found "
                f"{self.width // self.heads}"
            )

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward layer; SwiGLU's is two thirds, rounded up to a multiple of
        8.
        """
        if self.inner:
            return self.inner
        if self.feed_forward == "swiglu":
            return (int(4 * self.width * 2 / 3) + 7) // 8 * 8
        return 4 * self.width

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token and registers."""
        return int(self.class_token) + self.registers

    @property
    def table_shape(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        return self.grid, self.grid_columns or self.grid

    @property
    def table_prefix(self) -> int:
        """Entries of the position table before those of patches."""
        return int(self.class_token and self.class_position)

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
        # JSON writes 0.0 as 0 where it likes.
        fields = {
            name: float(value)
            if type(defaults.get(name)) is float and type(value) is int
            else value
            for name, value in fields.items()
        }
        wrong += _of_another_type(fields)
        if wrong:
            raise ValueError("not a ViT's sizes: " + "; ".join(wrong))
        return cls(**fields)


def _of_another_type(values: Mapping[str, Any]) -> list[str]:
    """Fields whose value is no whole number, number, true or false, or text, and should be one."""
    problems = []
    for field in dataclasses.fields(ViTSpec):
        kind = int if field.default is dataclasses.MISSING else type(field.default)
        if field.name in values and type(values[field.name]) is not kind:
            value = values[field.name]
            problems.append(f"{field.name} should be {kind.__name__}, found {value!r}")
    return problems


# Far beyond any model that there is: what lies outside is a mistake, or meant to do harm.
_LIMITS: dict[str, tuple[float, float]] = {
    "width": (1, 65536),
    "depth": (1, 1000),
    "heads": (1, 4096),
    "patch_size": (1, 1024),
    "grid": (1, 1024),
    "grid_columns": (0, 1024),
    "inner": (0, 262144),
    "registers": (0, 1024),
    "norm_epsilon": (0.0, 1.0),
    "interpolate_offset": (0.0, 1.0),
    "mask_deviation": (0.0, 1.0),
}
_CHOICES = {
    "feed_forward": FEED_FORWARDS,
    "activation": ACTIVATIONS,
    "positions": POSITIONS,
    "pooling": POOLINGS,
    "final_norm": FINAL_NORMS,
}
# What SynCLR's ViT and CLIP's are other than DINOv2's, as the authors' code makes them.
SYNCLR: dict[str, Any] = {"layer_scale": False, "mask_deviation": 0.02}
CLIP: dict[str, Any] = {
    "norm_epsilon": 1e-5,
    "interpolate_offset": 0.0,
    "activation": "quick_gelu",
    "layer_scale": False,
    "pre_norm": True,
    "patch_bias": False,
    "final_norm": "class",
    "xavier_qkv": True,
}
_SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3},
    "vit_small": {"width": 384, "depth": 12, "heads": 6},
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16},
    "vit_giant2": {"width": 1536, "depth": 40, "heads": 24},
}
SPECS: dict[str, ViTSpec] = {name: ViTSpec(**sizes) for name, sizes in _SIZES.items()}
for _name in ("vit_small", "vit_base", "vit_large"):
    SPECS[f"{_name}_synclr"] = dataclasses.replace(SPECS[_name], **SYNCLR)
    SPECS[f"{_name}_clip"] = dataclasses.replace(SPECS[_name], **CLIP)
# Other patch sizes than the paper's 14.
for _name in _SIZES:
    SPECS[f"{_name}_patch16"] = dataclasses.replace(SPECS[_name], patch_size=16, grid=14)


def named_spec(name: str) -> ViTSpec | None:
    """The spec of a student's name; NAME_<n>blocks is NAME with fewer blocks. None for no such
    name.
    """
    shortened = re.fullmatch(r"(.+)_([1-9]\d*)blocks", name)
    base = SPECS.get(shortened[1] if shortened else name)
    if base is None or shortened is None:
        return base
    depth = int(shortened[2])
    return dataclasses.replace(base, depth=depth) if depth <= base.depth else None


def student_spec(name: str, crop: int, start: ViTSpec | None = None) -> ViTSpec:
    """The student of a name for square crops. One that starts from a model has that model's
    choices: its name tells the sizes alone. ValueError where they do not fit together.
    """
    spec = named_spec(name)
    if spec is None:
        raise ValueError(f"{name}: no student has that name")
    if start is not None:
        if (start.width, start.heads) != (spec.width, spec.heads):
            raise ValueError(
                f"{name} is {spec.width} wide with {spec.heads} heads, the model to start from "
                f"{start.width} with {start.heads}"
            )
        if start.depth % spec.depth:
            raise ValueError(
                f"{name} has {spec.depth} blocks, the model to start from {start.depth}: expected "
                "a divisor"
            )
        spec = dataclasses.replace(start, depth=spec.depth)
    if crop % spec.patch_size:
        raise ValueError(
            f"{name} has patches of {spec.patch_size} px, which do not divide crops of {crop} px"
        )
    return dataclasses.replace(spec, grid=crop // spec.patch_size, grid_columns=0)
