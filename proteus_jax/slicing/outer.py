"""What lies around the blocks of a sliced model: its embedding before them, and its last norm."""

import jax
import numpy as np

from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import Params
from proteus_jax.slicing.folding import unit_norm

TOKENS = ("cls_token", "mask_token", "register_tokens", "pos_embed")


def projected(params: Params, spec: ViTSpec, basis: np.ndarray, embedded_size: float) -> Params:
    """The source's params without blocks, for the narrower stream: stream @ basis. `embedded_size`
    is the root mean square of that before the first block, without the bias of a norm that makes
    it; it counts only where there is such a norm.
    """
    into = _before_norm(params, spec, basis)
    embedding = params["patch_embed"]["proj"]
    result: Params = {
        "patch_embed": {"proj": {name: _times(each, into) for name, each in embedding.items()}}
    }
    for name in TOKENS:
        if name in params:
            result[name] = _times(params[name], into)
    width = basis.shape[1]
    if spec.pre_norm:
        # The student's norm divides by what is left in its width: the scale makes up for it.
        result["norm_pre"] = {
            "scale": np.full(width, embedded_size, np.float32),
            "bias": _times(params["norm_pre"]["bias"], basis),
        }
    result["norm"] = unit_norm(width)
    return result


def _before_norm(params: Params, spec: ViTSpec, basis: np.ndarray) -> np.ndarray:
    """The map [d, width] of the embedded tokens: through the scale of a norm that follows."""
    if not spec.pre_norm:
        return basis
    scale = params["norm_pre"]["scale"].astype(np.float32)
    centering = np.eye(len(scale), dtype=np.float32) - 1 / len(scale)
    return (centering * scale) @ basis


def _times(array: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.asarray(array.astype(np.float32) @ matrix, np.float32)


def scaled(params: Params, factor: float) -> Params:
    """The same model with all that is written into its stream times a factor, which the norms that
    read it take out again.
    """
    if factor == 1.0:
        return params
    blocks = dict(params["blocks"])
    for branch, names in (("attn", ("proj",)), ("mlp", ("fc2", "w3"))):
        layers = dict(blocks[branch])
        for name in set(names) & layers.keys():
            layers[name] = {part: array * factor for part, array in layers[name].items()}
        blocks[branch] = layers
    first = ("norm_pre",) if "norm_pre" in params else ("patch_embed", *TOKENS)
    enters = {name: params[name] for name in first if name in params}
    return {
        **params,
        **jax.tree.map(lambda array: np.asarray(array * factor, np.float32), enters),
        "blocks": blocks,
    }
