"""A released model as the beginning of a student."""

import jax
import jax.numpy as jnp
import numpy as np

from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import Params
from proteus_jax.models.pos_embed import resize_position_table


def init_from_pretrained(params: Params, old: ViTSpec, new: ViTSpec) -> Params:
    """A model's arrays for a spec that `models.specs.student_spec` made of its own: the last of
    every so many blocks where it has fewer, the position table for its grid.
    """
    stride = old.depth // new.depth
    blocks = jax.tree.map(lambda layers: layers[stride - 1 :: stride], params["blocks"])
    result = {**params, "blocks": blocks}
    if old.positions == "table":
        grid = (new.grid, new.grid)
        table = resize_position_table(jnp.asarray(params["pos_embed"]), old, grid)
        result["pos_embed"] = np.asarray(table)
    return result
