"""Measures what 52 linear heads cost: an epoch of the probe against a plain feature pass.

    python benchmarks/probe.py [--model vit_small] [--images 256] [--batch 64] [--classes 1000]
                               [--rounds 5]

In turn within one run, with random weights on drawn pictures. The last line is `ratio: <number>`:
the time of the probe's epoch over that of the pass.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from proteus_jax.config import Override, load
from proteus_jax.data.datasets.labeled import LabeledDataset
from proteus_jax.data.sources.base import MemorySource
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.evaluation.classifiers import linear_heads
from proteus_jax.evaluation.feature_extraction import LoaderConfig, class_token, freeze
from proteus_jax.evaluation.linear_training import RandomCrops
from proteus_jax.evaluation.probe_training import train_probe
from proteus_jax.evaluation.protocol import Context
from proteus_jax.evaluation.schema import evaluation_schema
from proteus_jax.feature_extractor import Model
from proteus_jax.models.config import SPECS
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.runtime import sharding
from proteus_jax.weights.model_dir import ModelCard


def main() -> None:
    """Runs the rounds and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small", choices=SPECS)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    size = args.crop * 8 // 7
    pictures = list(rng.integers(0, 256, (args.images, size, size, 3), dtype=np.uint8))
    source = MemorySource(pictures, [str(number) for number in range(args.images)])
    labels = rng.integers(0, args.classes, args.images)
    train_set = LabeledDataset(source, labels, tuple(map(str, range(args.classes))))
    fields = {"model": args.model, "batch": args.batch, "data.crop": args.crop, "data.resize": size}
    overrides = [Override(name, str(value)) for name, value in fields.items()]
    config, problems = load("eval/linear", overrides, evaluation_schema)
    assert not problems
    mesh, spec = sharding.make_mesh(), SPECS[args.model]
    model = Model(jax.jit(BackboneFunction(spec).init)(jax.random.key(0)), ModelCard(spec=spec))
    frozen = freeze(model, mesh)

    def quiet(_: str) -> None:
        """Says nothing."""

    view, reading = CenterCrop(size, args.crop), LoaderConfig(args.batch)
    context = Context(config, frozen, str, mesh, Path(), view, reading, quiet, quiet)
    probe = linear_heads.Probe(
        kinds=tuple(linear_heads.Kind(n, pooled) for n in (1, 4) for pooled in (False, True)),
        rates=tuple(config.settings.learning_rates),
        classes=args.classes,
        steps=-(-args.images // args.batch),
        batch=args.batch,
    )
    tokens = functools.partial(linear_heads.last_tokens, blocks=4)
    crops = RandomCrops(context, probe, tokens, train_set)

    def init() -> dict:
        return {**probe.init(spec.width, 0), "step": jnp.zeros((), jnp.int32)}

    times: dict[str, list[float]] = {"pass": [], "probe": []}
    for number in range(args.rounds + 1):
        start = time.perf_counter()
        frozen.table(class_token, source, view, reading)
        between = time.perf_counter()
        state = train_probe(
            context,
            crops.train_step,
            crops.place,
            crops.batches,
            init=init,
            steps=probe.steps,
            what="heads",
            facts={},
        )
        jax.block_until_ready(state)
        end = time.perf_counter()
        if number:  # the first one compiles
            times["pass"].append(between - start)
            times["probe"].append(end - between)
            print(f"round {number}: pass {between - start:.2f} s, probe {end - between:.2f} s")
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    print(f"{len(probe.names)} heads, {args.images} images: {medians}")
    print(f"ratio: {medians['probe'] / medians['pass']:.3f}")


if __name__ == "__main__":
    main()
