"""Rematerialization: which arrays a block keeps for its backward pass, and which are computed
again.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"
# cuDNN's attention names nothing that it saves: its forward pass is known by its primitive.
_CUDNN_FORWARD = "dot_product_attention_fwd"


def kept(arrays: Any) -> Any:
    """Marks arrays that `off` saves for the backward pass."""
    return checkpoint_name(arrays, KEPT)


_named = jax.checkpoint_policies.save_only_these_names(KEPT)


def _off(primitive: Any, *arguments: Any, **params: Any) -> Any:
    if primitive.name.startswith(_CUDNN_FORWARD):
        return True
    return _named(primitive, *arguments, **params)


# off: saves what matmuls and attention computed (`kept`); elementwise arithmetic is computed again,
# which costs less than its memory would. blocks: saves a block's input alone, for about a third
# more arithmetic in the student.
REMAT = {"off": _off, "blocks": jax.checkpoint_policies.nothing_saveable}
