"""Models against benchmarks, from the results.json of any number of evaluations.

    proteus table DIRS... [--alone]

One line a model; below them, without --alone, what the Proteus paper (arXiv 2407.10366) and
DINOv2's repository publish for the same benchmarks.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from proteus_jax.errors import InputError, exit_code
from proteus_jax.evaluation.reporting.comparison_table import table
from proteus_jax.runtime import process


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="proteus table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIRS")
    parser.add_argument("--alone", action="store_true", help="without published numbers")
    if arguments is None:
        process.begin()
    read = parser.parse_args(arguments)
    try:
        directories = [directory.expanduser() for directory in read.directories]
        print(table(directories, published=not read.alone))
    except InputError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
