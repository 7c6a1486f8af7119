"""PyTorch weights in, checked.

    python convert_weights.py import SOURCE --output DIR     .pth, .safetensors, .npz, .onnx
    python convert_weights.py import NAME                    a known name, into the cache
    python convert_weights.py verify DIR --against SOURCE    block by block, with transformers
    python convert_weights.py list                           the known names

Exit codes: 0 done and within tolerance; 1 verify found a difference; 2 the input was wrong, and
nothing was written.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from proteus_jax.convert.importer import import_weights
from proteus_jax.convert.verify import TOLERANCE, verify
from proteus_jax.data import images, pictures
from proteus_jax.data.catalog import open_source
from proteus_jax.errors import InputError
from proteus_jax.pretrained import ModelCard, load_card
from proteus_jax.teachers import KNOWN, obtain_teacher

DIFFERENT, WRONG_INPUT = 1, 2
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except InputError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return WRONG_INPUT
    except OSError as error:
        # A directory that cannot be written to, a full disk: nothing half-written remains.
        print(
            f"{error.filename or 'convert_weights.py'}: {error.strerror or error}", file=sys.stderr
        )
        return WRONG_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("import", help="read weights, write a model directory")
    command.add_argument("source", help="a weight file, or a known name")
    command.add_argument(
        "--output", type=Path, help="the directory to write; a known name has one in the cache"
    )
    command.add_argument("--heads", type=int, help="attention heads, where not width / 64")
    command.add_argument("--prefix", help="only names that begin so belong to the model")
    command.add_argument("--licence", default="not stated", help="of the weights, for the card")
    command.set_defaults(run=_import)
    command = commands.add_parser(
        "verify", help="compare a model directory with its source in PyTorch"
    )
    command.add_argument("directory", type=Path)
    command.add_argument(
        "--against", type=Path, required=True, metavar="SOURCE", help="the weight file"
    )
    command.add_argument(
        "--images", type=Path, help="a folder of photographs (default: four of scikit-image's)"
    )
    command.add_argument("--prefix", help="only names of SOURCE that begin so belong to the model")
    command.set_defaults(run=_verify)
    command = commands.add_parser("list", help="the known names")
    command.set_defaults(run=_list)
    return parser


def _import(options: argparse.Namespace) -> int:
    if options.source in KNOWN:
        if options.output is not None:
            raise InputError(
                f"{options.source}: a known name goes to the cache; leave --output out"
            )
        directory = obtain_teacher(options.source)
    else:
        if options.output is None:
            raise InputError("--output: expected the directory to write")
        directory = options.output.expanduser()
        import_weights(
            Path(options.source),
            directory,
            heads=options.heads,
            prefix=options.prefix,
            licence=options.licence,
        )
    _describe(directory, load_card(directory))
    return 0


def _describe(directory: Path, card: ModelCard) -> None:
    spec = card.spec
    print(
        f"{directory}: {card.family}, {spec.depth} blocks, {spec.width} wide, {spec.heads} heads, "
        f"{spec.feed_forward}, patch {spec.patch_size}, table {spec.grid} x {spec.grid}, "
        f"{spec.registers} registers"
    )
    if card.absent:
        print(f"absent in the source, zeros here: {', '.join(card.absent)}")


def _verify(options: argparse.Namespace) -> int:
    directory = options.directory.expanduser()
    spec = load_card(directory).spec
    photographs = _photographs(options.images, spec.grid * spec.patch_size)
    print(
        f"{len(photographs)} photographs of {spec.grid * spec.patch_size} px; errors in "
        "standard deviations"
    )
    worst = True
    for found in verify(directory, options.against, photographs, options.prefix):
        print(
            f"  {'ok  ' if found.passed else 'FAIL'} {found.name:14} largest "
            f"{found.largest:.1e}  mean {found.mean:.1e}"
        )
        worst = worst and found.passed
    print("equal" if worst else f"different: more than {TOLERANCE:g} somewhere")
    return 0 if worst else DIFFERENT


def _photographs(folder: Path | None, side: int) -> np.ndarray:
    """Square middles of photographs, uint8 [n, side, side, 3]. InputError where one is broken."""
    if folder is None:
        found = pictures.obtain_pictures()
        return np.stack(
            [_square(images.decode((found / name).read_bytes()), side) for name in PHOTOGRAPHS]
        )
    source, _ = open_source(str(folder))
    squares = []
    for index in range(min(len(source), len(PHOTOGRAPHS))):
        try:
            squares.append(_square(images.opened(source.read(index)).pixels(), side))
        except images.Unreadable as error:
            raise InputError(f"{folder}: {source.name(index)}: {error}") from None
    return np.stack(squares)


def _square(array: np.ndarray, side: int) -> np.ndarray:
    height, width, _ = array.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    middle = Image.fromarray(array[top : top + short, left : left + short])
    return np.asarray(middle.resize((side, side), Image.Resampling.BICUBIC))


def _list(_: argparse.Namespace) -> int:
    for name, known in KNOWN.items():
        source = known.wheel.requirement + " (package index)" if known.wheel else known.url
        print(
            f"{name:24} {source}\n{'':24} {known.licence}{'; ' + known.note if known.note else ''}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
