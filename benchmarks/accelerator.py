"""Measures the training step on an accelerator, most telling results first, within ten minutes.

    python benchmarks/accelerator.py [--minutes 10] [--output results.jsonl] [--trace DIRECTORY]
    python benchmarks/accelerator.py --table results.jsonl

Each measurement runs in a process of its own (accelerator_job.py), so that one which runs out of
memory, dies or hangs costs its own time alone, and so that memory falls between them; PyTorch never
shares the device with JAX. A result is one line of JSON, written as soon as it is there; a table
of Markdown follows at the end or, of a run that was cut off, with --table.

Needs jax, flax, optax, numpy and this repository; PyTorch is timed where it is installed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

JOB = Path(__file__).with_name("accelerator_job.py")
Result = dict[str, Any]
# What a whole step is tried with: an implementation of attention, and what the backward pass
# computes again. A platform has two of the three; the other is a line that says so.
CANDIDATES = (("cudnn", "off"), ("pallas", "off"), ("xla", "off"))
# Of the last words of a process that died, and of an error.
LONGEST = 300


class Runner:
    """Runs jobs one after the other until the time is over; writes each result at once."""

    def __init__(self, common: dict[str, Any], minutes: float, output: Path | None):
        self.common = common
        self.end = time.monotonic() + 60 * minutes
        self.section_end = self.end
        self.output = output
        self.results: list[Result] = []
        if output is not None:
            output.write_text("")

    @contextlib.contextmanager
    def section(self, seconds: float) -> Iterator[None]:
        """What runs inside is given so many seconds in all, or what is left of the whole."""
        self.section_end = min(self.end, time.monotonic() + seconds)
        yield
        self.section_end = self.end

    def record(self, result: Result) -> Result:
        """Writes one line, flushed."""
        self.results.append(result)
        line = json.dumps(result)
        print(line, flush=True)
        if self.output is not None:
            with self.output.open("a") as file:
                file.write(line + "\n")
        return result

    def run(self, kind: str, **options: Any) -> list[Result]:
        """All results of one job; what failed has an "error" in place of a time."""
        job = {"kind": kind, **options}
        if self.section_end - time.monotonic() < 1:
            return [self.record({**job, "error": "no time was left for it"})]
        results = [self.record({**job, **result}) for result in self._lines(job)]
        return results or [self.record({**job, "error": "it ended without a word"})]

    def _lines(self, job: dict[str, Any]) -> Iterator[Result]:
        """What the process says, until it ends or is ended."""
        command = [sys.executable, JOB, json.dumps(self.common | job)]
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            ) as process,
        ):
            late = threading.Event()

            def stop() -> None:
                late.set()
                _kill(process)

            seconds = self.section_end - time.monotonic()
            timer = threading.Timer(seconds, stop)
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    # A library may print there too, and who is ended may end within a line.
                    with contextlib.suppress(ValueError):
                        result = json.loads(line)
                        if isinstance(result, dict):
                            yield result
                code = process.wait()
            finally:
                timer.cancel()
                _kill(process)
            if late.is_set():
                yield {"error": f"stopped after {seconds:.0f} seconds, its share of the time"}
            elif code != 0:
                errors.seek(0)
                yield {"error": f"exit code {code}: {_last_line(errors.read())}"}


def _kill(process: subprocess.Popen) -> None:
    """And all that it started, as PyTorch's compiler does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(printed: bytes) -> str:
    lines = printed.decode(errors="replace").strip().splitlines()
    return lines[-1][-LONGEST:] if lines else "it said nothing"


def winner(results: Iterable[Result]) -> Result | None:
    """The whole step with most images a second; None where none ran."""
    steps = [one for one in results if one["kind"] == "step" and "images_per_second" in one]
    return max(steps, key=lambda one: one["images_per_second"], default=None)


def measure(runner: Runner, pair: str, large: str, batch: int, trace: Path | None) -> None:
    """Everything, in the order in which it is worth knowing."""
    runner.run("machine")
    with runner.section(60):
        runner.run("attention", pair=pair, batch=batch)
        runner.run("parts", pair=pair, batch=batch)
    steps: list[Result] = []
    with runner.section(160):
        for attention, remat in CANDIDATES:
            steps += runner.run("step", pair=pair, batch=batch, attention=attention, remat=remat)
        best = winner(steps)
        if best is not None:
            way = {"attention": best["attention"], "remat": "blocks"}
            steps += runner.run("step", pair=pair, batch=batch, **way)
    best = winner(steps)
    way = {"attention": "auto", "remat": "off"}
    if best is not None:
        way = {name: best[name] for name in way}
    with runner.section(80):
        for other in (batch // 2, 2 * batch):
            runner.run("step", pair=pair, batch=other, **way)
    with runner.section(120):
        for other in (batch // 2, batch):
            runner.run("step", pair=large, batch=other, **way)
    with runner.section(120):
        for compiled in (False, True):
            runner.run("pytorch", pair=pair, batch=batch, compiled=compiled)
    if trace is not None:
        runner.run("trace", pair=pair, batch=batch, directory=str(trace), **way)


def table(results: Iterable[Result]) -> Iterator[str]:
    """Lines of Markdown."""
    for result in results:
        if result["kind"] == "machine" and "device" in result:
            yield ", ".join(str(value) for name, value in result.items() if name != "kind") + "\n"
    yield "| | images | time | images/s | MFU | peak memory | compiled in |"
    yield "|---|---|---|---|---|---|---|"
    for result in results:
        if result["kind"] == "machine" and "error" not in result:
            continue
        cells = [_label(result), str(result.get("batch", ""))]
        if "error" in result:
            yield "| " + " | ".join([*cells, result["error"].replace("|", "\\|")]) + " | | | | |"
            continue
        cells += [
            f"{1e3 * result['seconds']:.2f} ms" if "seconds" in result else "",
            f"{result['images_per_second']:.0f}" if "images_per_second" in result else "",
            f"{result['mfu']:.1%}" if "mfu" in result else "",
            f"{result['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in result else "",
            f"{result['compile_seconds']:.0f} s" if "compile_seconds" in result else "",
        ]
        yield "| " + " | ".join(cells) + " |"


def _label(result: Result) -> str:
    kind = result["kind"]
    if kind == "pytorch":
        return f"PyTorch's step, {result['pair']}, " + (
            "compiled" if result["compiled"] else "eager"
        )
    words = [result.get("part", {"step": "whole step"}.get(kind, kind)), result.get("pair", "")]
    if "attention" in result:
        words.append(f"attention {result['attention']}")
    if "remat" in result:
        words.append(f"remat {result['remat']}")
    return ", ".join(filter(None, words))


def main() -> None:
    """Prints a line a result and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="for all of it")
    parser.add_argument("--pair", default="B", help="the student that most is asked about")
    parser.add_argument("--large", default="L", help="the student that is tried at two batches")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--blocks", type=int, help="of each ViT alone, for a trial")
    parser.add_argument("--output", type=Path, help="a file for the lines of JSON")
    parser.add_argument("--trace", type=Path, help="a directory for the profile of the best step")
    parser.add_argument("--table", type=Path, help="prints the table of such a file, no more")
    args = parser.parse_args()
    if args.table is not None:
        lines = args.table.read_text().splitlines()
        print("\n".join(table([json.loads(line) for line in lines])))
        return
    common = {name: vars(args)[name] for name in ("image", "rounds", "precision", "blocks")}
    with tempfile.TemporaryDirectory() as cache:
        # What one process compiled the next one, for the trace, need not compile again.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
        runner = Runner(common, args.minutes, args.output)
        with contextlib.suppress(KeyboardInterrupt):
            measure(runner, args.pair, args.large, args.batch, args.trace)
    print("\n" + "\n".join(table(runner.results)))


if __name__ == "__main__":
    main()
