"""The paper's four pairs on TPU slices at batch 1024: which mesh and remat fit, by XLA's compiler.

    pip install "jax[tpu]"       # brings the compiler; no TPU is needed
    JAX_PLATFORMS=cpu python benchmarks/topologies.py

Tries plans from the cheapest in arithmetic on, and prints for each pair and slice the first whose
memory, as compiled, fits, as a row of docs/topologies.md.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from proteus_jax import config, plan
from proteus_jax.assembly import Known, assemble, length
from proteus_jax.known import KNOWN
from proteus_jax.models.normalisation import IMAGENET
from proteus_jax.topology import named_topology

CONFIGS = ("vitti14", "vits14", "vitb14", "vitl14")
TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v5p:2x2x4", "v6e:4x4")
# In the order of what they cost.
PLANS = (
    {"fsdp": 1, "remat": "off"},
    {"fsdp": 4, "remat": "off"},
    {"fsdp": 1, "remat": "blocks"},
    {"fsdp": 4, "remat": "blocks"},
    {"fsdp": 16, "remat": "blocks"},
)
# An estimate so much above the memory is not worth compiling.
HOPELESS = 1.5


def compiled(name: str, topology_name: str, settings: dict) -> tuple[float, float] | None:
    """Bytes a device by estimate and by the compiler; None where it cannot fit."""
    file = Path(__file__).parent.parent / "configs" / f"{name}.py"
    overrides = [config.Override(field, str(value)) for field, value in settings.items()]
    configuration, problems = config.load(str(file), overrides)
    assert not problems, problems
    topology = named_topology(topology_name)
    assert topology.device is not None
    assembly = assemble(
        configuration,
        {"teacher": Known(KNOWN[configuration.teacher].spec, IMAGENET)},
        length(configuration, plan.IMAGENET_IMAGES),
        topology.platform,
    )
    estimate = plan.memory(configuration, assembly, topology.devices, configuration.batch).total
    limit = topology.device.memory * plan.USABLE
    if estimate > HOPELESS * limit:
        return None
    try:
        found = plan.compiled_memory(configuration, assembly, topology.name)
    except Exception as error:
        print(f"  {settings}: {str(error)[:200]}", file=sys.stderr)
        return None
    total = found.arguments + found.temporary
    return (estimate, total) if total <= limit else None


def main() -> None:
    """Prints the table, row by row as it is found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    args = parser.parse_args()
    print("| config | slice | fsdp | remat | images a device | estimated GB | compiled GB |")
    print("|---|---|---|---|---|---|---|")
    for name in args.configs:
        for topology in args.topologies:
            start = time.perf_counter()
            devices = named_topology(topology).devices
            for settings in PLANS:
                found = compiled(name, topology, settings)
                if found is not None:
                    estimate, total = (value / plan.GB for value in found)
                    print(
                        f"| {name} | {topology} | {settings['fsdp']} | {settings['remat']} | "
                        f"{1024 // devices} | {estimate:.2f} | {total:.2f} |",
                        flush=True,
                    )
                    break
            else:
                print(f"| {name} | {topology} | none fits | | {1024 // devices} | | |", flush=True)
            print(f"  {name} {topology}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
