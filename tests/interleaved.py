"""main.py on devices whose hosts take turns, as jax.make_mesh orders those of a TPU slice."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

_make_mesh = jax.make_mesh


def wired(shape: tuple[int, ...], names: tuple[str, ...], **choices: Any) -> jax.sharding.Mesh:
    """The first device of each host, then the second of each ..., the last host first."""
    mesh = _make_mesh(shape, names, **choices)
    by_host: dict[int, list[Any]] = {}
    for device in mesh.devices.flat:
        by_host.setdefault(device.process_index, []).append(device)
    turns = zip(*(by_host[host] for host in sorted(by_host, reverse=True)), strict=True)
    flat = [device for turn in turns for device in turn]
    return jax.sharding.Mesh(np.array(flat).reshape(shape), names, **choices)


if __name__ == "__main__":
    jax.make_mesh = wired
    import main

    main.end(main.main())
