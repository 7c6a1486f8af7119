"""The paper's four pairs on TPU slices at batch 1024, compiled: memory, what moves, and how fast no
run can be than that.

    make .venv/tpu.stamp       # brings the compiler; no TPU is needed
    JAX_PLATFORMS=cpu .venv/tpu/bin/python benchmarks/topologies.py --write

For each pair and slice it tries plans from the cheapest in arithmetic on, and keeps the first whose
memory, as compiled, fits. --write puts the table into proteus_jax/floors.json, from which --plan
takes the MFU that it assumes; --markdown prints the one of docs/topologies.md from that file. A
compilation takes one to three minutes.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hlo_floor import CHIPS, count

from proteus_jax import config
from proteus_jax.models.normalization import IMAGENET
from proteus_jax.training.builder import TeacherInfo, assemble, run_length
from proteus_jax.training.planning import plan
from proteus_jax.training.planning.floors import FILE, Floor, table
from proteus_jax.training.planning.memory import estimate_memory
from proteus_jax.training.planning.topology import named_topology
from proteus_jax.training.schema import schema_of
from proteus_jax.weights.registry import TEACHERS

ROOT = Path(__file__).parent.parent
CONFIGS = ("vitti14", "vits14", "vitb14", "vitl14")
TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v5p:2x2x4", "v5p:4x4x4", "v6e:4x4", "v6e:8x8")
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
# Dollars an hour for a chip, on demand, as published (Google Cloud, us-central1 and us-east5;
# November 2025).
PRICES = {"v5e": 1.20, "v5p": 4.20, "v6e": 2.70}
EPOCHS = 300


def compiled(name: str, topology_name: str) -> Floor | None:
    """The first plan that fits, compiled; None where none does."""
    topology = named_topology(topology_name)
    assert topology.device is not None
    limit = topology.device.memory * plan.USABLE
    for settings in PLANS:
        overrides = [config.Override(field, str(value)) for field, value in settings.items()]
        configuration, problems = config.load(
            str(ROOT / "configs" / f"{name}.py"), overrides, schema_of
        )
        assert not problems, problems
        known = TeacherInfo(TEACHERS[configuration.teachers["teacher"].source].spec, IMAGENET)
        steps = run_length(configuration, plan.IMAGENET_IMAGES)
        assembly = assemble(configuration, {"teacher": known}, steps, topology.platform)
        estimate = estimate_memory(configuration, assembly, topology.devices, configuration.batch)
        if estimate.total > HOPELESS * limit:
            continue
        try:
            step = plan.compiled_step(configuration, assembly, topology.name)
        except Exception as error:
            print(f"  {name} {settings}: {str(error)[:200]}", file=sys.stderr)
            continue
        analysis = step.memory_analysis()
        assert analysis is not None
        memory = analysis.peak_memory_in_bytes
        if memory > limit:
            continue
        moved = count(step.as_text(), CHIPS[topology_name.partition(":")[0]])
        return Floor(
            config=name,
            topology=topology_name,
            fsdp=int(settings["fsdp"]),
            remat=str(settings["remat"]),
            images=configuration.batch // topology.devices,
            work=assembly.work(configuration.data.crop).total,
            bytes=moved.bytes,
            floor=moved.floor,
            estimate=moved.estimate,
            memory=memory,
        )
    return None


def write(floors: list[Floor]) -> None:
    """Rows that were made now, in the place of those of the same pair and slice."""
    before = table().floors if FILE.is_file() else []
    made = {(each.config, each.topology): each for each in [*before, *floors]}
    order = [(name, topology) for name in CONFIGS for topology in TOPOLOGIES]
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    about = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        **{name: version(name) for name in ("jax", "libtpu")},
    }
    rows = [made[key]._asdict() for key in order if key in made]
    text = ",\n".join(json.dumps(row) for row in rows)
    FILE.write_text(f'{{"made": {json.dumps(about)},\n"floors": [\n{text}\n]}}\n')
    table.cache_clear()


def markdown() -> Iterator[str]:
    """The table of docs/topologies.md."""
    yield (
        "| config | slice | fsdp | remat | images a chip | memory | moved | floor | estimate | "
        "MFU at most | assumed | hours | dollars |"
    )
    yield "|" + "---|" * 13
    for each in table().floors:
        topology = named_topology(each.topology)
        assert topology.device is not None
        peak = topology.device.peak
        share = each.expected(peak)
        seconds = EPOCHS * plan.IMAGENET_IMAGES * each.work / (peak * share * topology.devices)
        hours = seconds / 3600
        dollars = hours * topology.devices * PRICES[each.topology.partition(":")[0]]
        yield (
            f"| {each.config} | {each.topology} | {each.fsdp} | {each.remat} | {each.images} | "
            f"{each.memory / 1e9:.1f} GB | {each.bytes / 1e9:.1f} GB | {1e3 * each.floor:.0f} ms | "
            f"{1e3 * each.estimate:.0f} ms | {each.most(peak):.0%} | {share:.0%} | {hours:.1f} | "
            f"{dollars:,.0f} |"
        )


def main() -> None:
    """Compiles, and says what was found as it is found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    if args.markdown:
        print("\n".join(markdown()))
        return
    for name in args.configs:
        for topology in args.topologies:
            start = time.perf_counter()
            floor = compiled(name, topology)
            print(floor or f"{name} {topology}: none fits", flush=True)
            print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            if args.write and floor is not None:
                write([floor])


if __name__ == "__main__":
    main()
