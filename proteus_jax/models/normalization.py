"""From uint8 images to what a ViT was trained on."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


class Normalization(NamedTuple):
    """A model's own channel statistics, of values from 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def checked(cls, mean: Any, std: Any) -> "Normalization":
        """Makes a normalization of lists from outside; ValueError where they are not three numbers
        each.
        """
        for values, least in ((mean, -1e3), (std, 1e-6)):
            fits = isinstance(values, list | tuple) and len(values) == 3
            if not fits or not all(
                type(value) in (int, float) and least <= value <= 1e3 for value in values
            ):
                raise ValueError(
                    "normalization should be three means and three deviations above 0, found "
                    f"{str(mean)[:60]} and {str(std)[:60]}"
                )
        red, green, blue = map(float, mean)
        first, second, third = map(float, std)
        return cls((red, green, blue), (first, second, third))

    def __call__(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """Float32 images, as PyTorch's ToTensor and Normalize make them."""
        return self.of_unit_range(images.astype(jnp.float32) / 255.0)

    def of_unit_range(self, scaled: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """The same of float32 images with values from 0 to 1."""
        return (scaled - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {"imagenet": IMAGENET, "clip": CLIP, "half": HALF}
