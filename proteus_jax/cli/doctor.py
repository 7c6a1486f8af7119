"""Looks at every image, reports the faults, and lists the images that training should leave out.

    proteus doctor --config=vitb14 --config.data.root=DIR --workdir=runs/mine
    proteus doctor --config=vitb14 --config.data.root=DIR --output=doctor.json
    proteus doctor --devices [--hosts=2 --host=0 --coordinator=ADDRESS:PORT]

Training takes the file that is written (WORKDIR/doctor.json or --output) in place of the images.
--devices sums arrays over all devices of all hosts instead, and says how fast they hear each other.

Exit codes: 0 done; 2 the input was wrong, and nothing was written; 75 interrupted.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from proteus_jax.cli.arguments import Arguments
from proteus_jax.data import dataset
from proteus_jax.data.passed_over import PassedOver
from proteus_jax.data.pixel_range import AUTO
from proteus_jax.data.sources.base import Source
from proteus_jax.data.validate import Findings, examine
from proteus_jax.data.workers import in_parallel, worker_pool
from proteus_jax.errors import InputError
from proteus_jax.runtime.console import Console, duration
from proteus_jax.runtime.cpu_quota import cores
from proteus_jax.runtime.filesystem import why_unwritable, write_atomically
from proteus_jax.runtime.workdir import is_remote
from proteus_jax.training.config import TrainConfig

MANIFEST = "doctor.json"
# So many names of a kind are shown.
_SHOWN = 5
# Fewer images than this are few to train on from random weights.
_FEW = 5000


def run(configuration: TrainConfig, read: Arguments, problems: list[str], console: Console) -> int:
    """Looks at the images of a configuration; returns the exit code."""
    output = read.paths.get("--output") or f"{read.paths.get('--workdir') or '.'}/{MANIFEST}"
    if is_remote(output):
        problems = [*problems, f"--doctor writes to this machine: expected a path, found {output}"]
    run_doctor(configuration, Path(output).expanduser(), problems, console)
    return 0


def run_doctor(
    config: TrainConfig, output: Path, problems: Sequence[str], console: Console
) -> None:
    """Looks at the images of every root, says what it finds, and writes one manifest for each.

    InputError, with nothing written, where a root has no images or `problems`, which are those of
    the configuration, are not empty; what was found of the images is said all the same.
    """
    faults, manifests = [*problems, *_check_output(output)], []
    images, seconds = 0, 0.0
    for root in config.data.root:
        try:
            if root.lower().endswith(".json"):
                raise InputError(f"{root}: expected a place of images, found what --doctor wrote")
            source, passed = dataset.open_source(root, config.data.reading)
        except InputError as error:
            faults += [f"--config.data.root: {problem}" for problem in error.problems]
            continue
        findings, elapsed = _examined(config, root, source, console)
        images, seconds = images + len(source), seconds + elapsed
        for line in _report(source, passed, findings, elapsed):
            console.line(line)
        for line in _verdict(config, source, findings):
            console.line(line)
        manifests.append(_manifest(root, source, passed, findings))
    if not config.data.root:
        faults.append("--config.data.root: expected a place of images, found none")
    if images:
        console.line(_what_the_run_needs(config, images, seconds))
    if faults:
        raise InputError(faults)
    output.parent.mkdir(parents=True, exist_ok=True)
    for number, manifest in enumerate(manifests, 1):
        path = output
        if len(manifests) > 1:
            path = output.with_name(f"{output.stem}-{number}{output.suffix}")
        write_atomically(path, json.dumps(manifest, indent=1) + "\n")
        console.line(f"to train without what is wrong: --config.data.root={path}")


def _check_output(output: Path) -> list[str]:
    reason = f"{output} is a directory" if output.is_dir() else why_unwritable(output.parent)
    return [f"--output: {reason}"] if reason else []


def _examined(
    config: TrainConfig, root: str, source: Source, console: Console
) -> tuple[Findings, float]:
    console.line(f"{root}: {len(source)} images")
    start, wrong = time.monotonic(), 0

    def show_progress(done: int, more: int) -> None:
        nonlocal wrong
        wrong += more
        rate = done / (time.monotonic() - start)
        console.progress(
            f"{done}/{len(source)} looked at  {wrong} cannot be read  {rate:.0f} images/s  "
            f"{duration((len(source) - done) / rate)} left",
            last=done == len(source),
        )

    # What workers send back of an image is a few numbers.
    pool = worker_pool(config.data.workers, max(config.data.threads, cores()), side=1)
    if pool.remark:
        console.line(pool.remark)
    parallel = partial(in_parallel, workers=pool.workers, threads=pool.threads)
    return examine(source, parallel, show_progress), time.monotonic() - start


def _report(
    source: Source, passed: PassedOver, findings: Findings, elapsed: float
) -> Iterator[str]:
    for line in passed._replace(no_images=()).lines():
        yield f"  passed over: {line}"
    unreadable = findings.unreadable()
    broken = [f"{name}: no image, or empty" for name in passed.no_images]
    broken += [f"{source.name(index)}: {fault}" for index, fault in unreadable.items()]
    for text in broken[:_SHOWN]:
        yield f"  cannot be read: {text}"
    if len(broken) > _SHOWN:
        yield f"  and {len(broken) - _SHOWN} more, all of them in {MANIFEST}"
    yield f"  {len(broken):8}  cannot be read"
    kinds = Counter(map(_kind, unreadable.values()))
    kinds["empty, or no image from the first byte on"] += len(passed.no_images)
    for kind, count in kinds.items():
        if count:
            yield f"  {count:8}    {kind}"
    for kind, indices in findings.odd().items():
        yield f"  {len(indices):8}  {kind}{_examples(source, indices)}"
    for index, (low, high, highest) in itertools.islice(findings.ranges().items(), _SHOWN):
        yield f"              {source.name(index)}: {low:g} to {high:g} of {highest:g}"
    flat = findings.flat()
    yield f"  {len(flat):8}  of nearly one color{_examples(source, flat)}"
    equal, alike = findings.equal(), findings.alike()
    for what, groups in (("exact copies", equal), ("that look like another", alike)):
        copies = [index for group in groups for index in group[1:]]
        yield f"  {len(copies):8}  {what}{_examples(source, copies)}"
    yield "  shorter side in pixels"
    histogram = findings.histogram()
    most = max(max(count for _, count in histogram), 1)
    for label, count in histogram:
        if count:
            yield f"    {label:14} {count:8}  {'#' * max(1, round(40 * count / most))}"
    yield (
        f"  looked at in {duration(elapsed)}, {len(findings.records) / elapsed:.0f} images/s; one "
        f"core decodes {findings.decode_rate():.0f} images/s"
    )


def _verdict(config: TrainConfig, source: Source, findings: Findings) -> Iterator[str]:
    """Says what to do before a run, or that there is nothing to do."""
    total, advice = len(source), []
    readable = total - len(findings.unreadable())
    kept = total - len(findings.excluded())
    if readable < total * (1 - config.data.max_corrupt_fraction):
        advice.append(
            f"{total - readable} of {total} images cannot be read, and a run would stop: train on "
            f"{MANIFEST}, which leaves them out"
        )
    elif kept < total:
        advice.append(f"{total - kept} images are broken or copies: {MANIFEST} leaves them out")
    if kept < _FEW:
        advice.append(
            f"{kept} images are few: begin with a slice of the teacher (--config=fast), and "
            "compare with what it scores before training"
        )
    small = findings.smaller_than(config.data.crop)
    if 2 * small > readable:
        advice.append(
            f"{small} images are smaller than the crops of {config.data.crop} px and get enlarged: "
            "give a smaller --config.data.crop"
        )
    ranges = findings.ranges()
    if ranges and config.data.range == AUTO:
        low, high = min(r[0] for r in ranges.values()), max(r[1] for r in ranges.values())
        advice.append(
            f"{len(ranges)} images have more than 8 bits, and each is stretched as its own values "
            f"ask for; one range for all would be --config.data.range={low:g},{high:g}"
        )
    for line in advice or ["nothing stands in the way of a run"]:
        yield f"  {'to do' if advice else 'verdict'}: {line}"


def _what_the_run_needs(config: TrainConfig, images: int, seconds: float) -> str:
    draws = config.epochs * (config.data.epoch or images)
    if config.steps:
        draws = config.steps * config.batch
    decoded = draws / config.data.repeated_aug
    return (
        f"the run draws {draws:.0f} views of {decoded:.0f} images: this host takes "
        f"{duration(decoded * seconds / images)} to read and decode so many; what augments them "
        "comes on top"
    )


def _kind(fault: str) -> str:
    """The kind of a fault, for the sums."""
    for kind, sign in (
        ("empty", "empty"),
        ("truncated", "truncated"),
        ("too large to decode", "pixels are more than"),
        ("missing", "No such file"),
    ):
        if sign in fault:
            return kind
    return "no image, or a broken one"


def _absolute(root: str) -> str:
    """A root that means the same from everywhere."""
    here = Path(root).expanduser()
    return str(here.absolute()) if here.exists() or here.is_absolute() else root


def _examples(source: Source, indices: Sequence[int]) -> str:
    if not indices:
        return ""
    shown = ", ".join(source.name(index) for index in indices[:2])
    return f", as {shown}"


def _manifest(root: str, source: Source, passed: PassedOver, findings: Findings) -> dict[str, Any]:
    def named(groups: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[source.name(index) for index in group] for group in groups]

    return {
        "root": _absolute(root),
        "fingerprint": source.fingerprint,
        "images": len(source),
        "left_out": [
            {"index": index, "name": source.name(index), "reason": reason}
            for index, reason in findings.excluded().items()
        ],
        "no_images": list(passed.no_images),
        "passed_over": passed.as_json(),
        "odd": {
            kind: [source.name(index) for index in indices]
            for kind, indices in findings.odd().items()
        },
        "ranges": {
            source.name(index): {"lowest": low, "highest": high, "of": most}
            for index, (low, high, most) in findings.ranges().items()
        },
        "nearly_one_color": [source.name(index) for index in findings.flat()],
        "copies": named(findings.equal()),
        "look_alike": named(findings.alike()),
        "shorter_side": dict(findings.histogram()),
        "decode_images_per_second_and_core": round(findings.decode_rate(), 1),
    }
