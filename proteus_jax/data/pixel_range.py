"""Images of more than 8 bits as 8 bits: which range of their values becomes black to white."""

from typing import Literal, NamedTuple

import numpy as np

from proteus_jax.errors import Unreadable

AUTO, FULL = "auto", "full"
PixelRange = Literal["auto", "full"] | tuple[float, float]


class DeepImage(NamedTuple):
    """Values of an image of more than 8 bits: [H, W] or [H, W, 3], and perhaps an alpha channel
    [H, W] from 0 to 1. `lowest` and `highest` are what its file can hold; 0 and 1 of floats.
    """

    values: np.ndarray
    lowest: float
    highest: float
    alpha: np.ndarray | None = None

    def used(self) -> tuple[float, float]:
        """The smallest and the largest finite value; Unreadable where there is none."""
        values = self.values
        if values.dtype.kind == "f":
            values = values[np.isfinite(values)]
            if not values.size:
                raise Unreadable("expected numbers, found none that is finite")
        return float(values.min()), float(values.max())

    def to_uint8(self, range_: PixelRange) -> np.ndarray:
        """Uint8 [H, W] or [H, W, 3]: `range_` from 0 to 255, what lies outside of it clipped."""
        low, high = self._bounds(range_)
        values = self.values.astype(np.float64)
        if self.values.dtype.kind == "f":
            values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        scaled = (values - low) * (255.0 / (high - low))
        return np.rint(scaled).clip(0, 255).astype(np.uint8)

    def _bounds(self, range_: PixelRange) -> tuple[float, float]:
        """Returns the values that become 0 and 255.

        Under "auto" a file that uses the upper half of what it can hold is taken as it is, as a
        photograph of 16 bits is; one that leaves the uppermost bits empty (12 bits of a camera, of
        a CT, of a thermal camera) is stretched from its smallest to its largest value.
        """
        if isinstance(range_, tuple):
            return range_
        if range_ == FULL:
            return self.lowest, self.highest
        low, high = self.used()
        inside = self.lowest <= low and high <= self.highest
        if self.lowest == 0 and inside and high > self.highest / 2:
            return self.lowest, self.highest
        if low < high:
            return low, high
        # One value everywhere has no range of its own: as many bits as it needs.
        return min(0.0, low), max(2.0 ** np.ceil(np.log2(abs(high) + 1)) - 1, 1.0)
