"""Weights in and out, checked both ways.

    proteus convert import SOURCE --output DIR    .pth, .bin, .safetensors, .npz, .onnx, a directory
                                                  of Hugging Face or timm
    proteus convert import NAME                   a known name or hf:ORG/NAME, into the cache, or a
                                                  directory (--output DIR)
    proteus convert verify DIR --against SOURCE   block by block, with transformers
    proteus convert verify DIR --golden FILE.npz  with stored outputs
    proteus convert export DIR --format FORMAT --output PATH
    proteus convert list                          the known names

`python convert_weights.py` is the same from the repository.

Exit codes: 0 done and within tolerance; 1 verify found a difference; 2 the input was wrong, or an
export differed when loaded back, and nothing was written.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from proteus_jax.cli.photographs import photographs
from proteus_jax.errors import InputError
from proteus_jax.models.normalization import STATISTICS
from proteus_jax.runtime import process
from proteus_jax.runtime.download import go_offline
from proteus_jax.weights import hub
from proteus_jax.weights.convert.export_formats import (
    FORMATS,
    LARGEST_BATCH,
    PROGRAMS,
    SIZED,
    Settings,
)
from proteus_jax.weights.convert.export_weights import export
from proteus_jax.weights.convert.families import FAMILIES
from proteus_jax.weights.convert.import_weights import import_weights
from proteus_jax.weights.convert.parity import TOLERANCE, Comparison, verify, verify_golden
from proteus_jax.weights.fetch import copy_model, obtain_model
from proteus_jax.weights.model_card import description
from proteus_jax.weights.model_dir import NO_LICENSE, load_card, update_card
from proteus_jax.weights.registry import TEACHERS

DIFFERENT, WRONG_INPUT = 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    if arguments is None:
        process.begin()
    options = _parser().parse_args(arguments)
    if getattr(options, "offline", False):
        go_offline()
    try:
        return options.run(options)
    except InputError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return WRONG_INPUT
    except OSError as error:
        # A directory that cannot be written to, a full disk: nothing half-written remains.
        print(f"{error.filename or 'proteus convert'}: {error.strerror or error}", file=sys.stderr)
        return WRONG_INPUT


def _path(text: str) -> Path:
    try:
        if "\0" in text:
            raise RuntimeError("it holds a NUL")
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected rows and columns as 16x12, found {text!r}")
    return int(match[1]), int(match[2])


def _sides(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected pixels as 224 or 112x224, found {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _pixels(sides: tuple[int, int]) -> str:
    height, width = sides
    return f"{height}" if height == width else f"{height}x{width}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="proteus convert", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    _add_import(commands)
    _add_verify(commands)
    _add_export(commands)
    command = commands.add_parser("list", help="the known names")
    command.set_defaults(run=_list)
    return parser


def _add_import(commands: Any) -> None:
    command = commands.add_parser("import", help="read weights, write a model directory")
    command.add_argument("source", help="a weight file, a directory, a known name, or hf:ORG/NAME")
    command.add_argument(
        "--output",
        type=_path,
        help="the directory to write; a known name and hf: have one in the cache without it",
    )
    command.add_argument("--offline", action="store_true", help="fetch nothing")
    command.add_argument("--heads", type=int, help="attention heads, where not width / 64")
    command.add_argument("--prefix", help="only names that begin so belong to the model")
    command.add_argument("--key", help="the entry that holds the model, where several do")
    command.add_argument(
        "--grid", type=_grid, metavar="ROWSxCOLUMNS", help="of a position table that is no square"
    )
    command.add_argument("--family", choices=FAMILIES, help="where the names do not tell it")
    command.add_argument(
        "--normalization",
        "--normalisation",
        choices=STATISTICS,
        help="channel statistics, where not the family's own",
    )
    command.add_argument(
        "--license", "--licence", default=NO_LICENSE, help="of the weights, for the card"
    )
    command.set_defaults(run=_import)


def _add_verify(commands: Any) -> None:
    command = commands.add_parser(
        "verify", help="compare a model directory with its source in PyTorch"
    )
    command.add_argument("directory", type=_path)
    command.add_argument(
        "--against", type=_path, metavar="SOURCE", help="the weight file or directory"
    )
    command.add_argument(
        "--golden", type=_path, metavar="FILE", help="outputs that other code stored (.npz)"
    )
    command.add_argument(
        "--force", action="store_true", help="write a difference into config.json, and exit with 0"
    )
    command.add_argument(
        "--images", type=_path, help="a folder of photographs (default: four of scikit-image's)"
    )
    command.add_argument("--prefix", help="only names of SOURCE that begin so belong to the model")
    command.add_argument("--key", help="the entry of SOURCE that holds the model")
    command.set_defaults(run=_verify)


def _add_export(commands: Any) -> None:
    command = commands.add_parser("export", help="write a model directory in another format")
    command.add_argument("directory", type=_path)
    command.add_argument("--format", choices=FORMATS, required=True)
    command.add_argument("--output", type=_path, required=True, metavar="PATH")
    command.add_argument(
        "--size",
        type=_sides,
        nargs="+",
        default=[],
        metavar="PX",
        help="image sides of onnx, stablehlo and huggingface, as 224 or 112x224, height first; a "
        "file for each (default: the table's own)",
    )
    command.add_argument("--batch", type=int, help="of onnx and stablehlo (default: any)")
    command.add_argument(
        "--images", type=_path, help="a folder of photographs (default: four of scikit-image's)"
    )
    command.add_argument(
        "--no-check",
        action="store_true",
        help="do not load it back with its own library, which is then not needed",
    )
    command.set_defaults(run=_export)


def _import(options: argparse.Namespace) -> int:
    if options.source in TEACHERS or options.source.startswith(hub.PREFIX):
        directory = obtain_model(options.source)
        if options.output is not None:
            directory = copy_model(directory, options.output)
    else:
        if options.output is None:
            raise InputError("--output: expected the directory to write")
        directory = options.output
        import_weights(
            _source(options.source),
            directory,
            heads=options.heads,
            prefix=options.prefix,
            key=options.key,
            grid=options.grid,
            family=options.family,
            normalization=STATISTICS[options.normalization] if options.normalization else None,
            license=options.license,
        )
    for line in description(directory, load_card(directory)):
        print(line)
    return 0


def _source(text: str) -> Path:
    try:
        return _path(text)
    except argparse.ArgumentTypeError as error:
        raise InputError(str(error)) from None


def _verify(options: argparse.Namespace) -> int:
    directory = options.directory.expanduser()
    spec = load_card(directory).spec
    if (options.against is None) == (options.golden is None):
        raise InputError("verify: expected one of --against SOURCE and --golden FILE")
    if options.golden is not None:
        comparisons = verify_golden(directory, options.golden)
        print(f"outputs of {options.golden}; errors in standard deviations")
    else:
        sides = Settings().sides_of(spec)
        pictures = photographs(options.images, *sides)
        comparisons = verify(directory, options.against, pictures, options.prefix, options.key)
        print(f"{len(pictures)} photographs of {_pixels(sides)} px; errors in standard deviations")
    compared = []
    for one in comparisons:
        _show(one, one.passed)
        compared.append(one)
    passed = all(one.passed for one in compared)
    print("equal" if passed else f"different: more than {TOLERANCE:g} somewhere")
    if passed or options.force:
        source: Any = options.golden if options.against is None else options.against
        update_card(directory, verified=_report(compared, source.name, passed))
        return 0
    return DIFFERENT


def _show(comparison: Comparison, passed: bool) -> None:
    print(
        f"  {'ok  ' if passed else 'FAIL'} {comparison.name:20} largest {comparison.largest:.1e}  "
        f"mean {comparison.mean:.1e}  1 - cosine {max(0.0, 1 - comparison.cosine):.1e}"
    )


def _report(compared: list[Comparison], source: str, passed: bool) -> dict[str, Any]:
    """The comparison as config.json keeps it."""
    return {
        "against": source,
        "largest": max(one.largest for one in compared),
        "mean": max(one.mean for one in compared),
        "cosine": min(one.cosine for one in compared),
        "tolerance": TOLERANCE,
        "passed": passed,
    }


def _export(options: argparse.Namespace) -> int:
    if options.size and options.format not in SIZED:
        raise InputError(f"--size: only for {', '.join(SIZED)}")
    if options.batch and options.format not in PROGRAMS:
        raise InputError(f"--batch: only for {' and '.join(PROGRAMS)}")
    if options.batch is not None and not 1 <= options.batch <= LARGEST_BATCH:
        raise InputError(
            f"--batch: expected at least 1 and at most {LARGEST_BATCH}, found {options.batch}"
        )
    requested: list[tuple[int, int]] = list(dict.fromkeys(options.size))
    outputs: dict[tuple[int, int] | None, Path] = {None: options.output}
    if requested:
        several, plain = len(requested) > 1, options.output
        outputs = {
            sides: plain.with_stem(f"{plain.stem}-{_pixels(sides)}") if several else plain
            for sides in requested
        }
    # All that can be said before is said before the first is written.
    spec = load_card(options.directory).spec
    for sides, output in outputs.items():
        Settings(sides=sides).sides_of(spec)
        if output.exists():
            raise InputError(f"{output}: exists already; give another name or remove it first")
    for sides, output in outputs.items():
        comparisons = export(
            options.directory,
            options.format,
            output,
            lambda height, width: photographs(options.images, height, width),
            Settings(sides=sides, batch=options.batch),
            check=not options.no_check,
        )
        if options.no_check:
            print(f"{output}: written, and not loaded back (--no-check)")
            continue
        print(f"{output}: loaded back, errors in standard deviations")
        for one in comparisons:
            _show(one, True)
    return 0


def _list(_: argparse.Namespace) -> int:
    statistics = {value: name for name, value in STATISTICS.items()}
    for name, known in TEACHERS.items():
        sources = [known.url, f"{hub.PREFIX}{known.repository}" if known.repository else ""]
        if known.wheel:
            sources = [f"{known.wheel.requirement} (package index)"]
        source = ", or ".join(filter(None, sources))
        facts = [
            f"{known.family}, patch {known.spec.patch_size}, {known.side} px, statistics of "
            f"{statistics[known.normalization]}",
            known.license,
        ]
        if known.wheel or known.sha256:
            facts.append(f"sha256 {known.wheel.sha256 if known.wheel else known.sha256 + '...'}")
        print(f"{name:24} {source or known.note}")
        for fact in [*facts, *([known.note] if source and known.note else [])]:
            print(f"{'':24} {fact}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
