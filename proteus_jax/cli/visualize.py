"""Draws what models see in images, as one picture.

    proteus visualize MODEL IMAGES... --output out.png
        [--beside MODEL] [--size 448]

One row an image; for each model its patch tokens as colors (the first principal component tells
what is in front, three more are its colors, as in the DINOv2 papers) and what its class token
attends to in the last block. MODEL is whatever proteus_jax.load takes; --beside, which may come
several times, names another.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from proteus_jax.errors import InputError, exit_code
from proteus_jax.evaluation.reporting.visualize import SIZE, visualize
from proteus_jax.runtime import process


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="proteus visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--beside", action="append", default=[], metavar="MODEL")
    parser.add_argument("--size", type=int, default=SIZE, help="shorter side in pixels")
    if arguments is None:
        process.begin()
    read = parser.parse_args(arguments)
    try:
        if not 14 <= read.size <= 4096:
            raise InputError(f"--size: expected from 14 to 4096 pixels, found {read.size}")
        output = read.output.expanduser()
        visualize([read.model, *read.beside], read.images, output, read.size)
    except InputError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return exit_code(error)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
