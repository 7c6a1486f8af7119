"""What can go wrong in a month of training, tried: python tests/faults.py [--quick] [--only=GROUP]

--quick takes some minutes on two cores, all of it less than half an hour. The last line counts
the faults; the exit code is 1 where one was lost.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401  (before JAX starts)
from fault_suite import bits, changed, disk, fuzz, hostile, killed, machine, memory, soak, steps  # noqa: E402
from fault_suite.account import Account  # noqa: E402
from fault_suite.bench import Bench  # noqa: E402

from proteus_jax.runtime.process import REQUESTS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="groups whose names contain this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quick, seed, cores = options.quick, options.seed, min(os.cpu_count() or 1, 8)
    # Under nohup, or behind a shell's &, some of them are ignored, which a run respects.
    for number in REQUESTS:
        signal.signal(number, signal.SIG_DFL)
    account = Account()
    with tempfile.TemporaryDirectory(prefix="faults é ") as folder:
        bench = Bench(Path(folder).resolve())
        groups = {
            "killed": lambda: killed.kills(bench, 3 if quick else 100, seed),
            "signals": lambda: killed.signals(bench, quick=quick),
            "signals, early": lambda: killed.early_signals(bench, 3 if quick else 30, seed),
            "hosts": lambda: [] if quick else killed.hosts(bench, 6, seed),
            "bits": lambda: bits.corruptions(bench, 40 if quick else 200, seed),
            "bits, resumed": lambda: bits.resumed(bench, 2 if quick else 20, seed),
            "bits, nothing left": lambda: bits.nothing_left(bench),
            "disk": lambda: disk.faults(bench, quick=quick),
            "machine": lambda: machine.faults(bench, quick=quick),
            "memory": lambda: [] if quick else memory.faults(bench),
            "not finite": lambda: steps.faults(bench, quick=quick),
            "hostile": lambda: hostile.faults(bench),
            "words": lambda: fuzz.faults(bench, 60 if quick else 600, seed),
            "changed": lambda: changed.faults(bench, quick=quick),
            "soak": lambda: [] if quick else soak.faults(bench),
        }
        alone = ("hosts", "bits", "memory", "words")
        for name, faults in groups.items():
            if options.only in name:
                account.tried(name, faults(), together=1 if name in alone else cores)
    print(account.line())
    return 1 if account.lost else 0


if __name__ == "__main__":
    sys.exit(main())
