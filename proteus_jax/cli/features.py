"""Writes the features of images: of a folder, of shards, or of a data set.

    proteus features MODEL IMAGES --output features.npz
    proteus features MODEL IMAGES --output features.parquet --tokens cls,mean --layers 4
    proteus features MODEL IMAGES --output DIR --tokens patches --dtype float16

MODEL is whatever proteus_jax.load takes, IMAGES whatever config.data.root takes. Each image comes
once, in the order of the source, with its name and, where it has one, its class. A .npz, .parquet
or .npy (of one kind of tokens) is written whole at the end; a folder gets parts, and the same
command goes on with it where it was stopped. --crop native keeps the sizes of images, rounded to
patches; of patches each part then has the rows of all its images, and a `grid` of each.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import proteus_jax
from proteus_jax.cli.ending import end_at_a_signal, ending
from proteus_jax.cli.hosts import meet
from proteus_jax.data.dataset import Reading, open_source
from proteus_jax.data.pillow_images import Decoding
from proteus_jax.data.sources.base import Columns, Source
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.data.transforms.native_size import NativeSize
from proteus_jax.data.workers import worker_pool
from proteus_jax.errors import InputError, collecting
from proteus_jax.evaluation.feature_dump import KINDS, Wanted, dump_features, labels_of
from proteus_jax.evaluation.feature_extraction import LoaderConfig
from proteus_jax.evaluation.feature_files import (
    MOST_IN_A_FILE,
    SUFFIXES,
    FeatureFile,
    PartFolder,
    SingleFile,
)
from proteus_jax.evaluation.results import weights_digest
from proteus_jax.feature_extractor import NATIVE, Model
from proteus_jax.loading import load_any
from proteus_jax.runtime import process
from proteus_jax.runtime.collectives import broadcast_from_rank0
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.filesystem import why_unwritable
from proteus_jax.schema import MOST_WORKERS

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The command line; returns the exit code. Without a `console` the process is the command's
    own, and ends at a signal.
    """
    if arguments is None:
        process.begin()
    options = _parser().parse_args(arguments)
    if console is None:
        console = Console()
        end_at_a_signal(console)
    return ending(lambda: _run(options, console), console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="proteus features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("images", metavar="IMAGES")
    parser.add_argument("--output", required=True, type=Path, help="a file or a folder")
    parser.add_argument("--tokens", default="cls", help=f"kinds out of {', '.join(KINDS)} (cls)")
    parser.add_argument(
        "--layers", type=int, default=0, help="of the last so many blocks (the model's output)"
    )
    parser.add_argument("--crop", default="224", help="side in pixels, or native (224)")
    parser.add_argument("--resize", type=int, help="shorter side before the crop (crop * 256/224)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "auto"), default="float32")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (64)")
    parser.add_argument("--workers", type=int, help="processes that decode")
    parser.add_argument("--range", default="auto", help="as config.data.range")
    parser.add_argument("--alpha", default="drop", help="as config.data.alpha")
    parser.add_argument("--image-column", default="", help="of parquet")
    parser.add_argument("--label-column", default="", help="of parquet")
    return parser


def _run(options: argparse.Namespace, console: Console) -> int:
    problems: list[str] = []
    with meet(problems, console):
        wanted, view_of, reading = _checked(options, problems)
        output = options.output.expanduser()
        model = source = None
        with collecting(problems, "MODEL"):
            model = load_any(options.model, options.precision)
        with collecting(problems, "IMAGES"):
            source, passed = open_source(options.images, reading)
        if model is not None:
            problems += _fits(model, wanted, options)
        if problems or model is None or source is None:
            raise InputError(problems)
        for line in passed.lines():
            console.line(f"passed over: {line}")
        labels = None
        try:
            labels = labels_of(source)
        except InputError as error:
            console.line(f"without classes: {error.problems[0]}")
        view = view_of(model)
        writes = jax.process_index() == 0
        file = _file(output, _facts(options, model, source), model, source, wanted, view)
        start = broadcast_from_rank0(file.done() if writes else 0)
        if start:
            console.line(f"goes on after {start} of {len(source)} images")
        pool = worker_pool(options.workers, 4, side=224)
        config = LoaderConfig(options.batch, pool.workers, pool.threads)
        facts = dump_features(
            model,
            source,
            wanted,
            view,
            config,
            file if writes else None,
            start,
            console.progress,
            labels,
        )
        if writes:
            file.finish(facts)
        lost = len(facts["unreadable"])
        console.line(f"{len(source) - lost} images, {lost} that cannot be read: {output}")
    return 0


def _checked(options: argparse.Namespace, problems: list[str]) -> tuple[Wanted, Any, Reading]:
    """Reads the options; what is wrong with them is added to the problems."""
    tokens = tuple(part.strip() for part in options.tokens.split(",") if part.strip())
    if not tokens or set(tokens) - set(KINDS) or len(set(tokens)) < len(tokens):
        problems.append(f"--tokens: expected some of {', '.join(KINDS)}, found {options.tokens!r}")
    if options.batch < 1 or options.layers < 0:
        problems.append("--batch, --layers: expected numbers above 0")
    if options.workers is not None and not 0 <= options.workers <= MOST_WORKERS:
        problems.append(f"--workers: expected from 0 to {MOST_WORKERS}, found {options.workers}")
    if options.resize is not None and options.resize < 1:
        problems.append(f"--resize: expected pixels above 0, found {options.resize}")
    if options.crop != NATIVE and not options.crop.isdecimal():
        problems.append(f"--crop: expected pixels or {NATIVE}, found {options.crop!r}")
    suffix = options.output.suffix
    if suffix in SUFFIXES:
        beside = [options.output.with_suffix(".json")] if suffix == ".npy" else []
        for path in (options.output, *beside):
            if path.expanduser().exists():
                problems.append(f"--output: {path} is there already")
    elif suffix:
        kinds = ", ".join(SUFFIXES)
        problems.append(f"--output: expected {kinds}, or a folder without a suffix, found {suffix}")
    if suffix == ".npy" and len(tokens) > 1:
        problems.append("--output: a .npy holds one kind of tokens; give a .npz")
    reason = why_unwritable(options.output.expanduser().parent)
    if reason:
        problems.append(f"--output: {reason}")
    reading = Reading()
    try:
        decoding = Decoding.of(options.range, options.alpha)
        reading = Reading(Columns(options.image_column, options.label_column), decoding)
    except (ValueError, TypeError):
        problems.append("--range, --alpha: expected values as of config.data.range and .alpha")

    def view_of(model: Model) -> CenterCrop | NativeSize:
        if options.crop == NATIVE:
            return NativeSize(model.spec.patch_size)
        crop = int(options.crop)
        return CenterCrop(options.resize or round(crop * 256 / 224), crop)

    return Wanted(tokens, options.layers, options.dtype), view_of, reading


def _fits(model: Model, wanted: Wanted, options: argparse.Namespace) -> list[str]:
    problems, patch = [], model.spec.patch_size
    if wanted.layers > model.spec.depth:
        problems.append(
            f"--layers: expected at most the model's {model.spec.depth}, found {wanted.layers}"
        )
    if options.crop.isdecimal() and (int(options.crop) % patch or int(options.crop) < patch):
        problems.append(
            f"--crop: expected a multiple of the patch size {patch}, found {options.crop}"
        )
    if options.crop.isdecimal() and options.resize and options.resize < int(options.crop):
        problems.append(f"--resize: expected at least the crop, found {options.resize}")
    return problems


def _facts(options: argparse.Namespace, model: Model, source: Source) -> dict[str, Any]:
    """All that must be the same where a folder is gone on with."""
    return {
        "proteus_jax": proteus_jax.__version__,
        "model": options.model,
        "weights_sha256": weights_digest(model.params),
        "images": options.images,
        "fingerprint": source.fingerprint,
        "tokens": options.tokens,
        "layers": options.layers,
        "crop": options.crop,
        "resize": options.resize,
        "dtype": options.dtype,
        "precision": options.precision,
        "range": options.range,
        "alpha": options.alpha,
    }


def _file(
    output: Path,
    facts: dict[str, Any],
    model: Model,
    source: Source,
    wanted: Wanted,
    view: CenterCrop | NativeSize,
) -> FeatureFile:
    if not output.suffix:
        return PartFolder(output, facts)
    side = view.crop if isinstance(view, CenterCrop) else 224
    shapes = wanted.shapes(model, (side // model.spec.patch_size) ** 2)
    numbers = sum(_product(shape) for shape in shapes.values())
    size = len(source) * numbers * DTYPES[wanted.dtype]
    if size > MOST_IN_A_FILE:
        raise InputError(
            f"--output: {size / 1e9:.0f} GB of features are too many for a file; give a folder"
        )
    return SingleFile(output)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


if __name__ == "__main__":
    sys.exit(main())
