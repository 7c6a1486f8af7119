"""Rules for the fields that say how images are found and become pixels; of training and of
evaluation.
"""

from proteus_jax.data.pillow_images import DROP, Decoding
from proteus_jax.data.pixel_range import AUTO
from proteus_jax.schema import Rule


def _is_decoding(range_: str, alpha: str) -> bool:
    try:
        return bool(Decoding.of(range_, alpha))
    except (ValueError, TypeError, AttributeError):
        return False


READING_RULES = {
    "data.range": Rule(
        lambda value: _is_decoding(value, DROP), "auto, full, or two numbers LOW,HIGH"
    ),
    "data.alpha": Rule(
        lambda value: _is_decoding(AUTO, value), "drop, or a color as white or #808080"
    ),
    "data.image_column": Rule(lambda value: isinstance(value, str), "a column, or nothing"),
    "data.label_column": Rule(lambda value: isinstance(value, str), "a column, or nothing"),
}
