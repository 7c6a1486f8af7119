"""Configurations and command lines that nobody should give: one clear list, never a traceback."""

import random
import shutil
from typing import Any

from conftest import ROOT

from fault_suite.account import Fault
from fault_suite.bench import Bench
from proteus_jax import config
from proteus_jax.cli import app
from proteus_jax.errors import InputError
from proteus_jax.training import runner, setup

QUICKSTART = str(ROOT / "configs" / "quickstart_paper.py")
ANYTHING = (
    *("", " ", "-1", "0", "1", "2", "3", "7", "1.5", "1e99", "1e400", "nan", "inf", "-inf", "None"),
    *(
        "none",
        "true",
        "False",
        "maybe",
        "abc",
        "ünïcødé",
        "\x1b[31mred",
        "a\nb",
        "'",
        '"',
        "(",
        ")",
    ),
    *(
        ")",
        "[1,",
        "((((",
        "()",
        "[]",
        "(1, 2)",
        "('a',)",
        "1,2,3",
        "a,,b",
        ",",
        "0x10",
        "1_000",
        "\uff11\uff12",
    ),
    *(
        "__import__('os').system('false')",
        "{}",
        "{'a': 1}",
        "<b>",
        "%s%n",
        "..",
        "../../etc",
        "~",
        "~nobody-here",
    ),
    *("nothing/there", "x" * 5000, "9" * 400, "gs://", "gs://bucket/x", "s3://b/c", "http://h/x"),
    *("tfds:", "tfds:nothing", "ftp://x", "vit_tiny", "vit_tiny,vit_small", "vit_tiny_0blocks"),
    *("vit_giant9", "float32", "bfloat16", "float8", "auto", "off", "blocks", "imagenet", "own"),
    *("teacher", "scikit", "1000000000000", "28", "27", "196", "-0.0", "1e-9", "0.999999999"),
)
# What reads a whole disk, or fetches from a network; and what nobody has the time for.
_FAR = ("..", "~", "../../etc", "gs://bucket/x", "s3://b/c")
_LONG = ("1000000000000", "9" * 400, "1e99")
NOT_FOR = {
    "data.root": _FAR,
    "eval.root": _FAR,
    "linear.epochs": _LONG,
    "data.workers": ("7", "27", "28", "196", "1_000", "\uff11\uff12"),
}
PROTOCOLS = ("knn", "linear", "analysis", "finegrained", "robustness")
STRANGE = (
    *("--", "-", "---", "--config.", "--config.=1", "--config.data=1", "--config.nonsense=1"),
    *("--config.batch.x=1", "--config.data..root=1", "--wrokdir=x", "positional", "--doctor=1"),
    *("--topology=v5e:4x4", "--mfu=2", "--hosts=2", "--host=x", "--wait=-1", "--output=x"),
    *(
        "--config.data.root",
        "--plan",
        "--profile=no",
        "--replay=x",
        "--config.Batch=1",
        "=",
        "--=x",
    ),
)
# Files in place of a configuration, and what each does.
FILES = {
    "empty": "",
    "no Python": "get_config = = 1",
    "binary": "\x00\x01",
    "no function": "x = 1",
    "returns nothing": "def get_config():\n    return None",
    "returns a dict": "def get_config():\n    return {}",
    "raises": "def get_config():\n    raise ValueError('line\\nline')",
    "ends": "import sys\nsys.exit(0)",
    "recurses": "def get_config():\n    return get_config()",
    "imports what is not there": "import not_there",
    "wants arguments": "def get_config(a):\n    return a",
    "an empty one": "import ml_collections\nget_config = ml_collections.ConfigDict",
}
SPOILT = (
    *(
        "batch = 'x'",
        "batch = None",
        "student = 5",
        "student = ('a', 1)",
        "data = 3",
        "method = None",
    ),
    *("data.root = 7", "data.root = (1, 2)", "data.crop = 2.5", "teachers = 5", "seed = -1"),
    *("teachers = {'a': 1}", "precision = 8", "eval = 'x'", "teacher = ()", "epochs = 'many'"),
    *("data.randaugment = {'operations': 'two'}", "data.held_out = {}", "log_every = 0"),
)


def faults(bench: Bench, count: int, seed: int) -> list[Fault]:
    """So many command lines, of one to four wrong words each, a fifth of them evaluations; and all
    files. Evaluations in which nothing is wrong after all are made.
    """
    _only_begins()
    fields = config.fields_of(QUICKSTART)
    lines = [
        Fault(f"line {number}", lambda number=number: _line(bench, fields, number, seed))
        for number in range(count - count // 5)
    ]
    _write_classes(bench)
    lines += [
        Fault(f"evaluation {number}", lambda number=number: _evaluation(bench, number, seed))
        for number in range(count // 5)
    ]
    files = [
        Fault(f"a file: {name}", lambda text=text, name=name: _file(bench, name, text))
        for name, text in FILES.items()
    ]
    template = (
        "from proteus_jax.configs import quickstart_paper as quickstart\n"
        "def get_config():\n    c = quickstart.get_config()\n"
    )
    for change in SPOILT:
        words = f"{template}    c.unlock()\n    c.data.unlock()\n    c.{change}\n    return c"
        files.append(
            Fault(f"a file: {change}", lambda text=words, name=change: _file(bench, name, text))
        )
    return lines + files


class _Silent:
    """A console that nobody sees."""

    quiet = True

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _line(bench: Bench, fields: list[str], number: int, seed: int) -> None:
    rng = random.Random(seed * 100000 + number)
    arguments = bench.command(bench.root / "fuzzed")[2:]
    _add_words(arguments, fields, rng)
    _ends_in_words(bench, arguments)


def _write_classes(bench: Bench) -> None:
    """Labeled images."""
    for number, path in enumerate(sorted(bench.images.iterdir())):
        folder = bench.root / "classes" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)


def _evaluation(bench: Bench, number: int, seed: int) -> None:
    rng = random.Random(seed * 100000 + 50000 + number)
    protocol, workdir = rng.choice(PROTOCOLS), bench.root / "fuzzed"
    path = ROOT / "configs" / "eval" / f"{protocol}.py"
    arguments = [
        *(f"--config={path}", f"--workdir={workdir}", f"--config.model={bench.teacher}"),
        *(f"--config.data.root={bench.root / 'classes'}", "--config.data.workers=0"),
        *(f"--config.analysis.teacher={bench.teacher}", "--config.linear.epochs=1"),
        *("--config.batch=8", "--config.data.resize=32", "--config.data.crop=28"),
    ]
    _add_words(arguments, config.fields_of(str(path)), rng)
    try:
        app.run(arguments, _Silent())  # type: ignore[arg-type]
    except InputError as error:
        _assert_words(error.problems, arguments)
    else:
        assert (workdir / "results.json").exists(), arguments
    shutil.rmtree(workdir, ignore_errors=True)


def _add_words(arguments: list[str], fields: list[str], rng: random.Random) -> None:
    """One to four, anywhere."""
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.15:
            arguments.insert(rng.randrange(len(arguments)), rng.choice(STRANGE))
            continue
        field = rng.choice(fields)
        name = field if rng.random() < 0.9 else _misspelt(field, rng)
        value = rng.choice(ANYTHING)
        if value not in NOT_FOR.get(field, ()):
            arguments.append(f"--config.{name}={value}")


def _misspelt(field: str, rng: random.Random) -> str:
    at = rng.randrange(len(field))
    return field[:at] + rng.choice("xyz._0") + field[at + 1 :]


def _file(bench: Bench, name: str, text: str) -> None:
    path = bench.root / f"{abs(hash(name))}.py"
    path.write_text(text)
    _ends_in_words(bench, [f"--config={path}", f"--workdir={bench.root / 'fuzzed'}"], wrong=True)


def _ends_in_words(bench: Bench, arguments: list[str], *, wrong: bool = False) -> None:
    """Refused in lines that name what they are about, or a run that could begin."""
    problems: list[str] = []
    try:
        app.run(arguments, _Silent())  # type: ignore[arg-type]
    except InputError as error:
        problems = error.problems
        assert problems, arguments
    else:
        assert not wrong, arguments
    _assert_words(problems, arguments)
    assert not (bench.root / "fuzzed").exists(), arguments


def _assert_words(problems: list[str], arguments: list[str]) -> None:
    for problem in problems:
        assert problem.strip(), arguments
        assert "Traceback" not in problem, arguments
        assert len(problem) < 7000, arguments


def _only_begins() -> None:
    """In place of training: what comes before the first step, so that thousands can be tried."""

    def begin(configuration: Any, inputs: Any, place: Any, console: Any, *_: Any, **__: Any) -> int:
        setup.build_experiment(configuration, inputs)
        return 0

    runner.run = begin
