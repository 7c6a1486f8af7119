"""How much the suite sees: faults put in one at a time, and the tests that should find each.

    python tests/mutants.py [--only=PART] [--sample=N] [--seed=TEXT] [--jobs=N]

Each entry of mutant_list.py goes into a copy of the repository, its tests run there, and what they
say is printed. The last line counts; the exit code is 1 where a fault passed unseen, or where an
entry is no longer true. --only takes those whose file or fault has PART in it, --sample a number of
them, drawn by --seed (the commit, where nothing is said).
"""

import argparse
import concurrent.futures
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
# What pytest ends with where tests failed; anything else says nothing of the fault.
FAILED = 1
# A fault may keep a test waiting; one that waits longer than any test needs has been found.
DEADLINE = 900


def located(name: str) -> Path | None:
    """A file of tests, whose name is one of its own in all folders."""
    return next((ROOT / "tests").rglob(name), None)


def broken(mutant: Mutant) -> str:
    """Why an entry cannot be tried, or nothing."""
    file = ROOT / mutant.file
    count = file.read_text().count(mutant.text) if file.is_file() else 0
    if count != 1:
        return f"its text is {count} times in {mutant.file}"
    for test in mutant.tests:
        name, _, function = test.partition("::")
        path = located(name)
        if path is None or f"def {function.partition('[')[0]}" not in path.read_text():
            return f"there is no {test}"
    return ""


def copied(folder: Path) -> Path:
    """The files of the repository, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def seen(mutant: Mutant, copy: Path, programs: Path) -> tuple[int, str]:
    """What pytest ends with, and what it printed, with the fault in a copy."""
    file = copy / mutant.file
    whole = file.read_text()
    environment = os.environ | {
        "PROTEUS_JAX_TEST_PROGRAMS": str(programs),
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # What only its files would see is not seen by who does not have them.
        "PROTEUS_JAX_REFERENCE": "",
    }
    tests = [
        f"{path.relative_to(ROOT)}{test[len(path.name) :]}"
        for test in mutant.tests
        if (path := located(test.partition("::")[0]))
    ]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    file.write_text(whole.replace(mutant.text, mutant.replacement))
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=DEADLINE
        )
        return done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        return FAILED, "it did not end"
    finally:
        file.write_text(whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", default="")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    options = parser.parse_args()
    chosen = [each for each in MUTANTS if options.only in f"{each.file} {each.does}"]
    wrong = [f"{each.file}: {each.does}: {why}" for each in MUTANTS if (why := broken(each))]
    if wrong or not chosen:
        print("\n".join(wrong) or f"no entry has {options.only!r} in it")
        return 1
    if options.sample:
        head = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True).stdout
        drawn = random.Random(options.seed or commit.strip())
        chosen = drawn.sample(chosen, min(options.sample, len(chosen)))
    unseen = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(options.jobs):
            copies.put(copied(Path(folder) / str(number)))

        def tried(mutant: Mutant) -> tuple[Mutant, int, str, float]:
            copy, start = copies.get(), time.monotonic()
            try:
                code, printed = seen(mutant, copy, Path(folder) / "programs")
                return mutant, code, printed, time.monotonic() - start
            finally:
                copies.put(copy)

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for mutant, code, printed, seconds in pool.map(tried, chosen):
                word = {FAILED: "found", 0: "NOT SEEN"}.get(code, f"pytest ended with {code}")
                print(f"{word:9} {seconds:4.0f} s  {mutant.file}: {mutant.does}", flush=True)
                if code not in (0, FAILED):
                    print(printed[-2000:])
                unseen += code != FAILED
    print(f"{len(chosen)} mutants, {len(chosen) - unseen} found")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
