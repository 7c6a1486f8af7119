"""Distills vision foundation models into small ViTs, and evaluates them.

    proteus COMMAND [ARGUMENTS]
    proteus COMMAND --help
    proteus --version

`python main.py` is the same from the repository. Without a command it trains or evaluates, as the
configuration says; --plan, --doctor and --devices stand for the commands:

    python main.py --config=configs/vitb14.py --workdir=runs/vitb14 [--config.FIELD=VALUE ...]
    python main.py --config=configs/vitb14.py --plan [--topology=v5e:4x4]
"""

from typing import NamedTuple


class Command(NamedTuple):
    """A command in a line; `flags` are those of `python main.py` that it stands for."""

    meaning: str
    flags: tuple[str, ...] = ()


CONFIGURED = {
    "train": Command("distill a teacher into a student, or go on with it"),
    "evaluate": Command("measure a model"),
    "plan": Command("what a run needs and costs, from sizes alone", ("--plan",)),
    "doctor": Command("look at all images; with --devices, at all devices", ("--doctor",)),
}
OTHERS = {
    "convert": Command("weights in and out, checked both ways"),
    "features": Command("features of images, as a file or a folder of parts"),
    "slice": Command("a smaller model out of a larger one, in seconds, without training"),
    "visualize": Command("what models see in images, as a picture"),
    "table": Command("models against benchmarks"),
}
