"""Arithmetic that a training step needs, counted; and what devices can do, as published."""

from collections.abc import Sequence
from typing import NamedTuple

from proteus_jax.models.config import ViTSpec

# A backward pass is twice a forward one: gradients of inputs and of weights.
TRAINING_PASSES = 3


class Work(NamedTuple):
    """Floating-point operations for one image of the batch (a multiplication and an addition are
    two).

    Only what the method needs: nothing that a backward pass makes again, no elementwise arithmetic.
    """

    teacher: float
    student: float
    masked_half: float
    heads: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def forward(spec: ViTSpec, crop: int) -> float:
    """One pass of a ViT over one square crop."""
    patches = (crop // spec.patch_size) ** 2
    tokens, width = spec.prefix + patches, spec.width
    linears = 3 if spec.feed_forward == "swiglu" else 2
    block = tokens * (4 * width**2 + linears * width * spec.hidden) + 2 * tokens**2 * width
    embedding = patches * 3 * spec.patch_size**2 * width
    return 2.0 * (embedding + spec.depth * block)


def training(
    teachers: Sequence[tuple[ViTSpec, int]],
    students: Sequence[ViTSpec],
    crop: int,
    *,
    masked_share: float,
) -> Work:
    """A step's work for each image: each teacher looks once, at crops of its own side; every
    student learns from all of it and, masked, from a share of the images once more.
    """
    student = heads = 0.0
    for spec in students:
        student += TRAINING_PASSES * forward(spec, crop)
        patches = (crop // spec.patch_size) ** 2
        # The patch head sees the patches of the masked images alone.
        tokens = 1 + patches + patches * masked_share
        width = sum(teacher.width for teacher, _ in teachers)
        heads += TRAINING_PASSES * 2.0 * tokens * spec.width * width
    teacher_flops = sum(forward(teacher, side) for teacher, side in teachers)
    return Work(teacher_flops, student, student * masked_share, heads)


class Device(NamedTuple):
    """A kind of device: bfloat16 operations a second without sparsity, bytes of memory."""

    name: str
    peak: float
    memory: float


GIB = 2.0**30
# As their makers publish them. The first whose name the device's own begins with; longer names
# first.
DEVICES = (
    Device("NVIDIA H200", 989e12, 141e9),
    Device("NVIDIA H100 PCIe", 756e12, 80e9),
    Device("NVIDIA H100", 989e12, 80e9),
    Device("NVIDIA A100-SXM4-40GB", 312e12, 40e9),
    Device("NVIDIA A100-PCIE-40GB", 312e12, 40e9),
    Device("NVIDIA A100", 312e12, 80e9),
    Device("NVIDIA L4", 121e12, 24e9),
    Device("TPU v4", 275e12, 32 * GIB),
    Device("TPU v5 lite", 197e12, 16 * GIB),
    Device("TPU v5e", 197e12, 16 * GIB),
    Device("TPU v5p", 459e12, 95 * GIB),
    Device("TPU v5", 459e12, 95 * GIB),
    Device("TPU v6e", 918e12, 32 * GIB),
    Device("TPU v6", 918e12, 32 * GIB),
)


def known_device(kind: str) -> Device | None:
    """The row of a device kind as JAX names it; None where it is not known."""

    def is_one(device: Device) -> bool:
        # Whole words: an L40 is no L4.
        rest = kind.removeprefix(device.name)
        return kind.startswith(device.name) and not rest[:1].isalnum()

    return next(filter(is_one, DEVICES), None)
