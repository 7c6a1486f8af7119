"""Proteus in JAX: small vision transformers distilled from foundation models, on any folder of
images.
"""

from pathlib import Path

__version__ = "0.1.0"


def load(source: "str | Path", precision: str = "float32"):
    """A backbone as a function from uint8 images [B, H, W, 3] to features.

    `source` is a directory with model.safetensors and config.json (a student, or what
    convert_weights.py made), the name of a known teacher (fetched if need be), or the directory of
    a run: its student, or before there is one its newest checkpoint; `hf:ORG/NAME`, and whatever
    else docs/weights.md names. `precision` is that of matmuls and their weights: float32, bfloat16,
    or auto (bfloat16 on accelerators). errors.InputError says what is wrong with anything else.
    """
    # Here and not above: `import proteus_jax` alone loads neither jax nor anything else.
    from proteus_jax.loading import load_any

    return load_any(source, precision)
