"""A model directory against the weights it came from, run by transformers in PyTorch, block by
block.

At the position table's own size: transformers resizes the table without DINOv2's offset of 0.1, so
that at any other size the two differ by design.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from proteus_jax.convert import huggingface
from proteus_jax.convert.importer import read_official
from proteus_jax.errors import InputError
from proteus_jax.models.functional import BackboneFunction, Params
from proteus_jax.models.specs import ViTSpec
from proteus_jax.pretrained import load_model

# Largest error allowed, in standard deviations of the reference's output.
TOLERANCE = 2e-4


class Comparison(NamedTuple):
    """Errors of one output, in standard deviations of the reference's."""

    name: str
    largest: float
    mean: float

    @property
    def passed(self) -> bool:
        """Whether the largest error is within tolerance; not a number is not."""
        return self.largest <= TOLERANCE


def verify(
    directory: Path, source: Path, images: UInt8[np.ndarray, "b h w 3"], prefix: str | None = None
) -> Iterator[Comparison]:
    """Compares every block's output and the final tokens on square images of the position table's
    own size.
    """
    params, card = load_model(directory)
    spec = card.spec
    side = spec.grid * spec.patch_size
    if images.shape[1:3] != (side, side):
        raise InputError(
            f"images should be {side} x {side}, the position table's own size, found "
            f"{images.shape[1:3]}"
        )
    pixels = np.asarray(card.normalisation(jnp.asarray(images)))
    expected = _torch_outputs(read_official(source, prefix), spec, pixels)
    for name, ours, theirs in zip(
        _names(spec), _our_outputs(params, spec, pixels), expected, strict=True
    ):
        difference = np.abs(ours - theirs)
        deviation = float(theirs.std())
        yield Comparison(
            name, float(difference.max()) / deviation, float(difference.mean()) / deviation
        )


def _names(spec: ViTSpec) -> list[str]:
    return [f"block {block}" for block in range(spec.depth)] + ["final tokens"]


def _our_outputs(params: Params, spec: ViTSpec, pixels: np.ndarray) -> list[np.ndarray]:
    backbone = BackboneFunction(spec)

    @jax.jit
    def run(params: Params, pixels: jax.Array) -> list[jax.Array]:
        blocks = backbone.intermediates(params, pixels, range(spec.depth), normalise=False)
        outputs = [*blocks, backbone(params, pixels)]
        return [jnp.concatenate([f.cls[:, None], f.registers, f.patches], axis=1) for f in outputs]

    with jax.default_matmul_precision("highest"):
        return [np.asarray(output) for output in run(params, pixels)]


def _torch_outputs(
    arrays: dict[str, np.ndarray], spec: ViTSpec, pixels: np.ndarray
) -> list[np.ndarray]:
    try:
        import torch
        import transformers
    except ImportError:
        raise InputError(
            "verify compares with PyTorch: pip install -r requirements-parity.txt (torch and "
            "transformers)"
        ) from None
    weights = {
        name: torch.from_numpy(np.array(array))
        for name, array in huggingface.from_official(arrays).items()
    }
    weights.setdefault("embeddings.mask_token", torch.zeros(1, spec.width))
    kind, config = _torch_model(transformers, spec)
    transformers.utils.logging.disable_progress_bar()
    # from_pretrained and not load_state_dict: newer releases name modules otherwise than the files
    # they read.
    model, loading = kind.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True
    )
    wrong = [
        name
        for reason in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in loading[reason]
    ]
    if wrong:
        raise InputError(
            f"transformers does not take these weights: {len(wrong)} names differ, as {wrong[0]}"
        )
    with torch.no_grad():
        inputs = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        found = model.eval()(inputs, output_hidden_states=True)
    return [state.numpy() for state in (*found.hidden_states[1:], found.last_hidden_state)]


def _torch_model(transformers: Any, spec: ViTSpec) -> tuple[Any, Any]:
    """The class, and its configuration for these sizes."""
    settings: dict[str, Any] = {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "image_size": spec.grid * spec.patch_size,
        "patch_size": spec.patch_size,
        "layer_norm_eps": spec.norm_epsilon,
        "use_swiglu_ffn": spec.feed_forward == "swiglu",
    }
    if spec.registers:
        config = transformers.Dinov2WithRegistersConfig(
            num_register_tokens=spec.registers, **settings
        )
        return transformers.Dinov2WithRegistersModel, config
    return transformers.Dinov2Model, transformers.Dinov2Config(**settings)
