"""Cuts a smaller model out of a larger one, without training, on unlabeled images.

    proteus slice TEACHER IMAGES... --student vit_tiny --output DIR
    proteus slice TEACHER IMAGES... --width 256 --depth 8 --output DIR
    proteus slice TEACHER IMAGES... --sizes [--output table.json]

TEACHER is a known name, hf:ORG/NAME, a path or an address; IMAGES are folders or whatever
config.data.root takes. The model in DIR is evaluated, exported and trained on as any other. Heads
keep their size: a width alone tells their number, and their number the width. --sizes shows how
near slices of several sizes come to TEACHER, and writes nothing but the table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from proteus_jax.cli.ending import end_at_a_signal, ending
from proteus_jax.errors import InputError
from proteus_jax.runtime import process
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.filesystem import write_atomically
from proteus_jax.slicing.sizes import FIELDS
from proteus_jax.training import standalone_slice
from proteus_jax.training.initialization import slice_in_words

COLUMNS = "width heads hidden depth   params  GFLOPs  lost  missed  class  patch   CKA"


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The command line; returns the exit code. Without a `console` the process is the command's
    own, and ends at a signal.
    """
    parser = argparse.ArgumentParser(
        prog="proteus slice",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("teacher", metavar="TEACHER")
    parser.add_argument("roots", metavar="IMAGES", nargs="+")
    parser.add_argument("--output", type=Path, help="a new directory; with --sizes a file")
    parser.add_argument("--student", default="", help="a student's name, for its sizes")
    parser.add_argument("--width", type=int, help="of the stream")
    parser.add_argument("--heads", type=int, help="of each block's attention")
    parser.add_argument("--hidden", type=int, help="units of each block's feed-forward layer")
    parser.add_argument("--depth", type=int, help="blocks")
    parser.add_argument("--sizes", action="store_true", help="a table of sizes instead")
    parser.add_argument("--images", type=int, default=512, help="to fit on (512)")
    parser.add_argument("--crop", type=int, default=224, help="their side in pixels (224)")
    parser.add_argument("--seed", type=int, default=0, help="which images, and their crops (0)")
    if arguments is None:
        process.begin()
    options = parser.parse_args(arguments)
    if console is None:
        console = Console()
        end_at_a_signal(console)
    return ending(lambda: _run(options, console), console)


def _run(options: argparse.Namespace, console: Console) -> int:
    _check(options)
    settings = standalone_slice.Settings(
        tuple(options.roots), options.images, options.crop, options.seed, options.sizes
    )
    bench = standalone_slice.Bench(options.teacher, settings, console.progress)
    sizes = {name: getattr(options, name) for name in FIELDS}
    if options.sizes:
        return _table(bench, options.output, console)
    spec = bench.spec_of(name=options.student, **sizes)
    name = options.student or f"slice of {options.teacher}"
    sliced = bench.slice(spec, console.progress)
    output = options.output.expanduser()
    standalone_slice.save_slice(bench, spec, sliced, output, name)
    console.line(f"block  lost  missed of the stream of {options.teacher}")
    for number, error in enumerate(sliced.errors, 1):
        console.line(f"{number:5d} {error.lost:5.1%} {error.missed:7.1%}")
    console.line(slice_in_words(name, sliced.errors))
    console.line(f"{standalone_slice.size_of(spec)}: {output}")
    return 0


def _table(bench: standalone_slice.Bench, output: Path | None, console: Console) -> int:
    """Prints the table of sizes, and writes it where it is asked for."""
    specs = standalone_slice.usual_specs(bench)
    console.line(COLUMNS)
    written = []
    for row in standalone_slice.table_rows(bench, specs, console.progress):
        spec, scores = row.spec, row.scores
        console.line(
            f"{spec.width:5d} {spec.heads:5d} {spec.hidden:6d} {spec.depth:5d} "
            f"{row.parameters / 1e6:6.1f} M {row.gflops:7.2f} {row.error.lost:5.1%} "
            f"{row.error.missed:6.1%} {scores.agreement_class:6.3f} "
            f"{scores.agreement_patch:6.3f} {scores.cka:5.3f}"
        )
        sizes = {key: getattr(spec, key) for key in FIELDS}
        figures = {"parameters": row.parameters, "gflops": row.gflops, "seconds": row.seconds}
        written.append(sizes | figures | row.error._asdict() | scores._asdict())
    if output is not None:
        write_atomically(output.expanduser(), json.dumps(written, indent=2) + "\n")
    return 0


def _check(options: argparse.Namespace) -> None:
    """InputError lists what is wrong with the arguments."""
    problems = [
        f"--{name}: expected a number above 0, found {value}"
        for name in (*FIELDS, "images", "crop")
        if (value := getattr(options, name)) is not None and value < 1
    ]
    if not 0 <= options.seed < 2**32:
        problems.append(f"--seed: expected from 0 to 4294967295, found {options.seed}")
    own = [name for name in FIELDS if getattr(options, name) is not None]
    if options.sizes and (own or options.student):
        problems.append("--sizes: expected without a size of its own")
    if not options.sizes:
        if not (own or options.student):
            problems.append(
                "--student: expected a name, or a size of its own (--width, --heads, ...)"
            )
        if options.output is None:
            problems.append("--output: expected a directory")
        elif options.output.expanduser().exists():
            problems.append(f"--output: {options.output} is there already")
    if problems:
        raise InputError(problems)


if __name__ == "__main__":
    sys.exit(main())
