"""What a run will need, before it: counted work, machines by name, memory, lines of --plan."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import warm
from conftest import ROOT, Heard

from proteus_jax import config
from proteus_jax.cli import plan as command
from proteus_jax.cli.arguments import parse
from proteus_jax.data.throughput import Rate
from proteus_jax.errors import InputError
from proteus_jax.models import flops
from proteus_jax.models.config import SPECS, ViTSpec
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.models.normalization import IMAGENET
from proteus_jax.training.builder import Assembly, TeacherInfo, assemble, run_length
from proteus_jax.training.planning import floors, memory, plan
from proteus_jax.training.planning.topology import named_topology
from proteus_jax.training.schema import schema_of
from proteus_jax.weights.registry import TEACHERS


@pytest.mark.parametrize(
    ("name", "giga_multiplications"),
    [
        ("vit_tiny", 1.70),
        ("dinov2_vits14", 6.12),
        ("dinov2_vitb14", 23.16),
        ("dinov2_vitl14", 81.0),
        ("dinov2_vitg14", 299.4),
    ],
)
def test_forward_work(name: str, giga_multiplications: float) -> None:
    spec = TEACHERS[name].spec if name in TEACHERS else SPECS[name]
    assert flops.forward(spec, 224) / 2e9 == pytest.approx(giga_multiplications, rel=5e-3)


def test_training_work_is_the_teachers_once_and_the_students_by_half_more() -> None:
    teacher, student = SPECS["vit_base"], SPECS["vit_small"]
    work = flops.training([(teacher, 224)], [student], 224, masked_share=0.5)
    assert work.teacher == flops.forward(teacher, 224)
    assert work.student == 3 * flops.forward(student, 224)
    assert work.masked_half == work.student / 2
    assert work.heads < 0.01 * work.total
    unmasked = flops.training([(teacher, 224)], [student], 224, masked_share=0.0)
    assert unmasked.masked_half == 0
    assert unmasked.heads < work.heads
    both = flops.training([(teacher, 224)], [student, student], 224, masked_share=0.5)
    assert both.student == 2 * work.student
    assert both.teacher == work.teacher


@pytest.mark.parametrize(
    ("text", "devices", "hosts", "kind"),
    [
        ("v5e:4x4", 16, 4, "TPU v5e"),
        ("v5p:2x2x4", 16, 4, "TPU v5"),
        ("v6e:4x4", 16, 4, "TPU v6"),
        ("v4:2x2x2", 8, 2, "TPU v4"),
        ("H100:8", 8, 1, "NVIDIA H100"),
        ("a100:4x8", 32, 4, "NVIDIA A100"),
    ],
)
def test_machines_by_name(text: str, devices: int, hosts: int, kind: str) -> None:
    found = named_topology(text)
    assert (found.devices, found.hosts) == (devices, hosts)
    assert found.device is not None
    assert found.device.name == kind


@pytest.mark.parametrize("text", ["v5e", "v9:4", "h100:", "h100:0", "v5e:4x", "v5e:4x4x4x4", "x"])
def test_machines_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--topology: expected a kind out of"):
        named_topology(text)


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "TPU v5 lite", "TPU v5", "TPU v6 lite"])
def test_known_devices(kind: str) -> None:
    found = flops.known_device(kind)
    assert found is not None
    expected = {"NVIDIA H100 80GB HBM3": 989, "TPU v5 lite": 197, "TPU v5": 459, "TPU v6 lite": 918}
    assert found.peak == expected[kind] * 1e12
    assert flops.known_device("cpu") is None


@pytest.mark.parametrize(
    ("kind", "peak", "memory"),
    [
        ("NVIDIA H100 PCIe", 756e12, 80e9),
        ("NVIDIA H100 80GB HBM3", 989e12, 80e9),
        ("NVIDIA H200", 989e12, 141e9),
        ("NVIDIA A100-SXM4-40GB", 312e12, 40e9),
        ("NVIDIA A100-PCIE-40GB", 312e12, 40e9),
        ("NVIDIA A100-SXM4-80GB", 312e12, 80e9),
        ("NVIDIA L4", 121e12, 24e9),
        ("TPU v4", 275e12, 32 * 2**30),
        ("TPU v5 lite", 197e12, 16 * 2**30),
        ("TPU v5p", 459e12, 95 * 2**30),
        ("TPU v6 lite", 918e12, 32 * 2**30),
    ],
)
def test_what_devices_can_do(kind: str, peak: float, memory: float) -> None:
    """By the names that JAX gives them; published figures. A longer name goes first."""
    found = flops.known_device(kind)
    assert found is not None
    assert (found.peak, found.memory) == (peak, memory)


def test_devices_that_only_sound_alike() -> None:
    for kind in ("NVIDIA L40", "NVIDIA L40S", "cpu", "TPU v51", ""):
        assert flops.known_device(kind) is None, kind


def test_work_of_a_tiny_model_by_hand() -> None:
    """Every matmul of a forward pass counted out: 5 tokens of width 8, patches of 2 px."""
    spec = ViTSpec(width=8, depth=3, heads=2, patch_size=2, grid=2)
    embedding = 4 * (2 * 2 * 3) * 8
    qkv, attention, proj = 5 * 8 * 24, 2 * 5 * 5 * 8, 5 * 8 * 8
    mlp = 5 * (8 * 32 + 32 * 8)
    assert flops.forward(spec, 4) == 2 * (embedding + 3 * (qkv + attention + proj + mlp))
    gated = dataclasses.replace(spec, feed_forward="swiglu", inner=24, registers=2)
    block = 7 * 4 * 8 * 8 + 2 * 7 * 7 * 8 + 7 * 3 * 8 * 24
    assert flops.forward(gated, 4) == 2 * (embedding + 3 * block)
    # Heads for teachers 6 and 10 wide: the class token, four patches, and half of them masked.
    # The second looks at images of its own side.
    teachers = [
        (dataclasses.replace(spec, width=width, heads=2), side) for width, side in ((6, 4), (10, 8))
    ]
    work = flops.training(teachers, [spec, gated], 4, masked_share=0.5)
    assert work.heads == 2 * 3 * 2 * (1 + 4 + 2) * 8 * (6 + 10)
    assert work.student == 3 * (flops.forward(spec, 4) + flops.forward(gated, 4))
    assert work.masked_half == work.student / 2
    assert work.teacher == flops.forward(teachers[0][0], 4) + flops.forward(teachers[1][0], 8)
    assert work.total == sum(work)


@pytest.mark.parametrize(
    ("overrides", "unit"),
    [
        (("grad_accum_steps=2",), 64),
        ((), 32),
        (("method.loss_weights.patch=0", "grad_accum_steps=4"), 64),
        (("method.loss_weights.patch=0",), 16),
    ],
)
def test_a_batch_divides_by_devices_parts_and_pairs(overrides: tuple[str, ...], unit: int) -> None:
    topology = named_topology("v5e:4x4")
    for batch, fits in ((unit * 3, True), (unit * 3 + unit // 2, False)):
        changes = [config.Override(*text.split("=")) for text in (*overrides, f"batch={batch}")]
        configuration, problems = config.load(
            str(ROOT / "configs" / "vitb14.py"), changes, schema_of
        )
        assert not problems
        if fits:
            plan._check(configuration, topology)
            continue
        with pytest.raises(InputError, match=f"expected a multiple of {unit} for 16 devices"):
            plan._check(configuration, topology)


def test_teachers_look_one_after_the_other() -> None:
    """Their weights are there together; what works is the larger one's."""
    configuration, assembly = assembled()
    (teacher,) = assembly.teachers.values()
    small = dataclasses.replace(teacher.backbone.spec, depth=1, width=384, heads=6)
    other = teacher._replace(backbone=BackboneFunction(small, jnp.bfloat16, "pallas"))
    one, both, small_alone = (
        memory.estimate_memory(configuration, assembly._replace(teachers=teachers), 16, 1024)
        for teachers in ({"a": teacher}, {"a": teacher, "b": other}, {"b": other})
    )
    assert both.teacher == one.teacher + small_alone.teacher
    assert small_alone.teacher_activations < one.teacher_activations
    assert both.teacher_activations == one.teacher_activations


def assembled(*overrides: str) -> tuple:
    """A configuration of the paper's and what it trains with, for 16 TPUs."""
    return assembled_as("vitb14", *overrides)


def assembled_as(name: str, *overrides: str) -> tuple:
    changes = [config.Override(*text.split("=")) for text in overrides]
    configuration: Any
    configuration, problems = config.load(str(ROOT / "configs" / f"{name}.py"), changes, schema_of)
    assert not problems
    known = TeacherInfo(TEACHERS[configuration.teachers["teacher"].source].spec, IMAGENET)
    steps = run_length(configuration, plan.IMAGENET_IMAGES)
    return configuration, assemble(configuration, {"teacher": known}, steps, "tpu")


def test_memory_follows_what_a_configuration_asks_for() -> None:
    plain = memory.estimate_memory(*assembled(), devices=16, batch=1024)
    split = memory.estimate_memory(*assembled("fsdp=4"), devices=16, batch=1024)
    for name in ("student", "optimizer", "teacher"):
        assert getattr(split, name) == pytest.approx(getattr(plain, name) / 4, rel=0.02)
    again = memory.estimate_memory(*assembled("remat=blocks"), devices=16, batch=1024)
    assert again.activations < 0.4 * plain.activations
    halves = memory.estimate_memory(*assembled("grad_accum_steps=2"), devices=16, batch=1024)
    assert halves.activations == pytest.approx(plain.activations / 2)
    moments = memory.estimate_memory(
        *assembled("optimizer.mu_dtype=bfloat16"), devices=16, batch=1024
    )
    assert moments.optimizer == pytest.approx(plain.optimizer * 3 / 4, rel=0.01)
    average = memory.estimate_memory(*assembled("ema_decay=0.99"), devices=16, batch=1024)
    assert average.average == pytest.approx(plain.student, rel=0.03)


def test_the_estimate_is_near_what_a_compiler_says() -> None:
    """On a CPU, of the small pair in float32: what is stored exactly, the rest within a third."""
    # The kernel for TPUs would be interpreted.
    overrides = ("precision=float32", "teacher_precision=float32", "attention=xla")
    configuration, assembly = assembled(
        *overrides, "batch=32", "teacher=dinov2_vits14", "student=vit_tiny", "data.crop=112"
    )
    estimate = memory.estimate_memory(configuration, assembly, 1, 32)
    images = jax.ShapeDtypeStruct((32, 112, 112, 3), "uint8")
    state = assembly.state_shapes()
    step = jax.jit(assembly.train_step, donate_argnums=0)
    teachers = {"teacher": assembly.teachers["teacher"].backbone.shapes}
    found = step.lower(state, teachers, images).compile().memory_analysis()
    assert found is not None
    stored = estimate.student + estimate.optimizer + estimate.teacher + 32 * 112**2 * 3
    assert found.argument_size_in_bytes == pytest.approx(stored, rel=0.01)
    total = found.argument_size_in_bytes + found.temp_size_in_bytes
    assert estimate.total == pytest.approx(total, rel=0.34)


def printed(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    return warm.run(
        [
            sys.executable,
            str(ROOT / "main.py"),
            f"--config={ROOT / 'configs' / 'vitti14.py'}",
            *arguments,
        ],
        tmp_path,
        os.environ,
    )


def test_plan_prints_lines_and_leaves_nothing(tmp_path: Path) -> None:
    result = printed(tmp_path, "--plan", "--topology=a100:2x8", "--mfu=0.5", "--price=2")
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert lines["devices"] == "16 x NVIDIA A100 on 2 hosts"
    assert lines["trainable parameters"] == "5.73 M"
    assert lines["GFLOP an image"] == "27.7 GFLOP"
    assert lines["fits"] == "yes by this estimate"
    images = 16 * 312e12 * 0.5 / 27.7e9
    assert float(lines["images a second"].split()[0]) == pytest.approx(images, rel=0.01)
    hours = 300 * 1281167 / images / 3600
    assert float(lines["wall time"].split()[0]) == pytest.approx(hours, rel=0.01)
    assert float(lines["device-hours"].split()[0]) == pytest.approx(16 * hours, rel=0.01)
    assert float(lines["cost"].split()[0]) == pytest.approx(32 * hours, rel=0.01)
    for line in result.stdout.splitlines():
        assert re.fullmatch(r"[^:]+: \S.*", line)
    assert not list(tmp_path.iterdir())


Lines = Callable[..., dict[str, str]]


@pytest.fixture
def lines_of(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """What --plan prints with these arguments, in this process; nothing is measured."""
    monkeypatch.setattr(plan, "views_per_second", lambda *_: Rate(100.0, 2))
    monkeypatch.setattr(plan, "_measured_peak", lambda: 1e11)

    def printed_lines(*arguments: str) -> dict[str, str]:
        read = parse([f"--config={ROOT / 'configs' / 'vitti14.py'}", "--plan", *arguments])
        overrides = [config.Override(*override) for override in read.overrides]
        configuration, problems = config.load(read.paths["--config"], overrides, schema_of)
        console = Heard()
        command.run(configuration, read, [*read.problems, *problems], console)
        return dict(line.split(": ", 1) for line in console.lines)

    return printed_lines


def test_the_assumed_mfu_comes_from_what_was_compiled(lines_of: Lines) -> None:
    lines = lines_of("--topology=v5e:4x4")
    most = re.fullmatch(
        r"(\d+)% \(by what vitti14 moves, compiled for 64 images a device of v5e:4x4\)",
        lines["MFU at most"],
    )
    assumed = re.fullmatch(r"(\d+)% \(midway between that floor and .*", lines["assumed MFU"])
    assert most
    assert assumed
    assert 0 < int(assumed[1]) < int(most[1]) <= 100
    peak = 16 * 197e12
    rate = peak * int(assumed[1]) / 100 / 27.7e9
    # The share is printed in whole percent.
    assert float(lines["images a second"].split()[0]) == pytest.approx(rate, rel=0.03)
    # Another share of a topology that nothing was compiled for.
    assert lines_of("--topology=h100:8")["assumed MFU"] == "40% (an assumption)"
    found = lines_of("--topology=v6e:2x4", "--mfu=0.25", "--config.batch=512")
    assert found["assumed MFU"] == "25% (--mfu)"
    assert "v6e" in found["MFU at most"]


def test_a_floor_and_what_is_expected_by_hand() -> None:
    """100 GFLOP an image, 64 images: 6.4 TFLOP, of which a chip of 200 TFLOP/s needs 32 ms."""
    row = floors.Floor("c", "v5e:4x4", 1, "off", 64, 1e11, 5e10, 0.064, 0.192, 1e9)
    assert row.most(200e12) == pytest.approx(0.5)
    assert row.expected(200e12) == pytest.approx(0.25)


def test_the_largest_batch_fits_and_the_next_does_not(lines_of: Lines) -> None:
    lines = lines_of("--topology=v5e:4x4")
    largest = int(lines["largest batch that fits"].split()[0])
    configuration, assembly = assembled_as("vitti14")
    limit = 16 * 2**30 * plan.USABLE
    assert largest % 32 == 0
    assert memory.estimate_memory(configuration, assembly, 16, largest).total <= limit
    assert memory.estimate_memory(configuration, assembly, 16, largest + 32).total > limit
    # Four hosts of four chips each decode a quarter of the images.
    rate = float(lines["images a second"].split()[0])
    assert float(lines["host images a second needed"].split()[0]) == pytest.approx(
        rate / 4, rel=1e-3
    )


def test_the_table_of_compiled_steps() -> None:
    made, rows = floors.table()
    assert {"commit", "jax", "libtpu"} <= made.keys()
    for each in rows:
        configuration, problems = config.load(
            str(ROOT / "configs" / f"{each.config}.py"), [], schema_of
        )
        assert not problems
        topology = named_topology(each.topology)
        assert topology.device is not None
        assert each.images * topology.devices == configuration.batch
        assert 0 < each.expected(topology.device.peak) < each.most(topology.device.peak) < 1
        assert each.memory < plan.USABLE * topology.device.memory
        assert floors.nearest(each.topology, each.work, each.images) == each
    assert floors.nearest("h100:8", 1e9, 64) is None


def test_the_epoch_is_that_of_the_images(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch, lines_of: Lines
) -> None:
    arguments = (f"--config.data.root={photographs}", "--topology=v5e:4x4", "--config.epochs=1024")
    lines = lines_of(*arguments, "--config.data.held_out.share=0")
    assert lines["images an epoch"] == "40 images (those of --config.data.root to train on)"
    assert lines["steps"] == "40 of 1024 images"
    assert lines_of()["images an epoch"].startswith("1281167 images (ImageNet-1K's")
    # A plan fetches nothing.
    monkeypatch.setenv("PROTEUS_JAX_CACHE", str(tmp_path / "cache"))
    fetched = lines_of("--config.data.root=scikit-image")
    assert fetched["images an epoch"].endswith("scikit-image's are not fetched for a plan)")
    result = printed(tmp_path, "--plan", f"--config.data.root={tmp_path / 'absent'}")
    assert result.returncode == 2
    assert "absent" in result.stderr


def test_a_plan_of_another_teacher(tiny_teacher: Path, lines_of: Lines) -> None:
    lines = lines_of(f"--config.teacher={tiny_teacher}", "--topology=v5e:4x4")
    assert float(lines["teacher parameters"].split()[0]) < 0.1


def test_a_program_is_kept_where_it_can_be_compiled(tmp_path: Path) -> None:
    for topology in ((), ("--topology=h100:8",)):
        result = printed(tmp_path, "--plan", "--hlo=step.hlo", *topology)
        assert result.returncode == 2
        assert "--hlo: expected with --topology of TPUs" in result.stderr
    result = printed(tmp_path, "--plan", f"--hlo={tmp_path}", "--topology=v5e:4x4")
    assert result.returncode == 2
    assert "--hlo: expected a file to write" in result.stderr
    if importlib.util.find_spec("libtpu") is None:
        result = printed(tmp_path, "--plan", "--hlo=step.hlo", "--topology=v5e:4x4")
        assert result.returncode == 2
        assert "--hlo: v5e:4x4 cannot be compiled for here" in result.stderr
    assert not list(tmp_path.iterdir())


def test_what_a_platform_does_not_have_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    result = printed(tmp_path, f"--workdir={tmp_path / 'run'}", "--config.attention=pallas")
    assert result.returncode == 2
    assert "--config.attention: expected auto or xla on a cpu in float32" in result.stderr
    half = ("--topology=v5e:4x4", "--config.teacher_precision=float16")
    result = printed(tmp_path, "--plan", *half)
    assert result.returncode == 2
    assert "on a TPU, which has no float16" in result.stderr
    assert not list(tmp_path.iterdir())


def test_plan_refuses_in_words(tmp_path: Path) -> None:
    result = printed(tmp_path, "--plan", "--mfu=2", "--price=much", "--config.batch=many")
    assert result.returncode == 2
    for words in (
        "--mfu: expected a number above 0 and at most 1, found '2'",
        "--price: expected a number 0 or more, found 'much'",
        "--config.batch: expected a whole number, found 'many'",
    ):
        assert words in result.stderr
    result = printed(tmp_path, "--plan", "--topology=v5e:4x4", "--config.batch=1000")
    assert result.returncode == 2
    assert "--config.batch: expected a multiple of 32 for 16 devices" in result.stderr
    result = printed(tmp_path, "--workdir=gs://bucket/run", "--topology=v5e:4x4")
    assert result.returncode == 2
    assert "--topology: only --plan asks for it" in result.stderr
    assert "--workdir: gs://bucket/run" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "warmup", "said"),
    [
        # Four epochs of 1251.17 steps, with the configuration's warm-up of five.
        (("epochs=4.0",), 500, "warm-up of 500 steps in place of 6256, as the run has 5005"),
        (
            ("steps=3", "optimizer.warmup_steps=10"),
            0,
            "warm-up of 0 steps in place of 10, as the run has 3",
        ),
        (("steps=100", "optimizer.warmup_steps=99"), 99, ""),
        (("steps=3", "optimizer.warmup_steps=0"), 0, ""),
    ],
)
def test_a_warm_up_is_shorter_than_its_run(
    overrides: tuple[str, ...], warmup: int, said: str
) -> None:
    configuration, _ = assembled(*overrides)
    found = run_length(configuration, plan.IMAGENET_IMAGES)
    assert found.warmup == warmup
    assert found.remark.startswith(said)
    assert bool(found.remark) == bool(said)


def test_what_a_compiler_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peak against the memory, and its program on request; one that cannot is told of."""
    found = SimpleNamespace(peak_memory_in_bytes=15e9, argument_size_in_bytes=3e9)
    compiled = SimpleNamespace(memory_analysis=lambda: found, as_text=lambda: "HloModule a")
    monkeypatch.setattr(plan, "compiled_step", lambda *_: compiled)
    topology = named_topology("v5e:4x4")
    asked, _ = assembled()
    assembly = Assembly(*6 * [None])  # pyright: ignore
    lines = list(plan._compiler_lines(asked, assembly, topology, tmp_path / "a" / "step.hlo"))
    assert lines[:3] == [
        "compiled, memory a device: 15.00 GB",
        "compiled, memory a device, state, teacher and images: 3.00 GB",
        "compiled, fits: yes",
    ]
    assert (tmp_path / "a" / "step.hlo").read_text() == "HloModule a"
    found.peak_memory_in_bytes = 17e9
    assert "compiled, fits: no" in list(plan._compiler_lines(asked, assembly, topology, None))

    def cannot(*_: object) -> None:
        raise RuntimeError("no chip\nand more")

    monkeypatch.setattr(plan, "compiled_step", cannot)
    (line,) = plan._compiler_lines(asked, assembly, topology, None)
    assert line.startswith("compiled for v5e:4x4: not here (no chip); pip install")


def test_a_peak_is_measured_by_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations for each of the products of the median round, here one of half a second."""
    clock = iter([0.0, 0.5, 1.0, 1.5, 2.0, 9.0])
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
    assert plan._measured_peak(16, 3) == 2 * 16**3 / 0.5
