"""One measurement of accelerator.py in a process of its own: a job as JSON in, results as JSON out.

MFU counts the work that the method needs (proteus_jax/models/flops.py), whatever was really
computed. All jobs stand in one file, longer than others here: it is what the process runs.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from proteus_jax.models.config import SPECS, ViTSpec  # noqa: E402 (the path comes first)

Job = dict[str, Any]
Result = dict[str, Any]
# By the student's letter: teacher and student.
PAIRS = {
    "T": ("vit_small", "vit_tiny"),
    "S": ("vit_base", "vit_small"),
    "B": ("vit_large", "vit_base"),
    "L": ("vit_giant2", "vit_large"),
}
ATTENTIONS = ("cudnn", "pallas", "xla")


def specs(job: Job) -> tuple[ViTSpec, ViTSpec]:
    """Teacher and student for the job's images; of a trial with few blocks alone."""
    pairs = []
    for name in PAIRS[job["pair"]]:
        spec = SPECS[name]
        if name == "vit_giant2":
            spec = dataclasses.replace(spec, feed_forward="swiglu")
        blocks = job["blocks"] or spec.depth
        pairs.append(dataclasses.replace(spec, grid=job["image"] // spec.patch_size, depth=blocks))
    return pairs[0], pairs[1]


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
    """Of one call, after two that warm up; each waits for the device."""
    spent = []
    for number in range(rounds + 2):
        start = time.perf_counter()
        call()
        if number >= 2:
            spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def error_text(error: Exception) -> str:
    """The first line of an error, not all of it."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:300]}"


class Bench:
    """Builds and times what one job asks of JAX."""

    def __init__(self, job: Job):
        import jax
        import jax.numpy as jnp

        from proteus_jax.models import flops
        from proteus_jax.models.attention import choose
        from proteus_jax.models.functional import BackboneFunction, StudentFunction

        self.job = job
        self.dtype = jnp.dtype(job["precision"])
        self.teacher_spec, self.student_spec = specs(job)
        name, platform = job.get("attention", "auto"), jax.default_backend()
        self.attention = choose(name, platform, self.dtype, 64).implementation
        self.teacher = BackboneFunction(self.teacher_spec, self.dtype, self.attention)
        widths = {"teacher": self.teacher_spec.width}
        remat = job.get("remat", "off")
        self.student = StudentFunction(
            self.student_spec, widths, self.dtype, remat=remat, attention=self.attention
        )
        sizes = [(self.teacher_spec, job["image"])], [self.student_spec], job["image"]
        self.work = flops.training(*sizes, masked_share=0.5)
        self.device = flops.known_device(jax.devices()[0].device_kind)

    def teacher_params(self) -> Any:
        """As the step has them: in its precision."""
        import jax

        from proteus_jax.models.functional import in_precision

        def make() -> Any:
            return in_precision(self.teacher.init(jax.random.key(1)), self.dtype)

        return jax.jit(make)()

    def timed(self, function: Callable, *arguments: Any, work: float = 0.0) -> Result:
        """A compiled call's time, the compiler's count of memory, and MFU where `work` (operations
        an image) and the device are known.
        """
        import jax

        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        result: Result = {"compile_seconds": time.perf_counter() - start}

        def call() -> None:
            jax.block_until_ready(compiled(*arguments))

        result["seconds"] = median_seconds(call, self.job["rounds"])
        result["peak_bytes"] = compiled.memory_analysis().peak_memory_in_bytes
        return result | self.rates(result["seconds"], work)

    def rates(self, seconds: float, work: float) -> Result:
        """Images a second, and the share of the device's peak that `work` an image makes."""
        rate = self.job["batch"] / seconds
        known = self.device is not None and work > 0
        return {"images_per_second": rate} | (
            {"mfu": rate * work / self.device.peak} if known else {}
        )


def machine(job: Job) -> Iterator[Result]:
    """Describes the machine that is measured."""
    import jax

    device = jax.devices()[0]
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    version = getattr(device.client, "platform_version", "").strip().splitlines()
    yield {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "platform": version[0] if version else device.platform,
        "precision": job["precision"],
        "image": job["image"],
        "commit": commit or "unknown",
    }


def attention(job: Job) -> Iterator[Result]:
    """Attention of one block of the student, alone: forward, and both ways."""
    import jax
    import jax.numpy as jnp

    from proteus_jax.models.attention import attention as attend

    for name in ATTENTIONS:

        def forward(qkv: jax.Array, name: str = name) -> jax.Array:
            return attend(qkv, name)

        def both(qkv: jax.Array, way: Callable = forward) -> jax.Array:
            return jax.grad(lambda qkv: jnp.sum(way(qkv).astype(jnp.float32)))(qkv)

        for part, function in (("attention forward", forward), ("attention both ways", both)):
            label = {"part": part, "attention": name}
            try:
                bench = Bench(job | {"attention": name})
                spec = bench.student_spec
                tokens = spec.prefix + spec.grid**2
                shape = (job["batch"], tokens, 3, spec.heads, spec.width // spec.heads)
                qkv = jax.random.normal(jax.random.key(0), shape, bench.dtype)
                yield label | bench.timed(function, qkv)
            except Exception as error:  # Not every platform has each of them.
                yield label | {"error": error_text(error)}


def parts(job: Job) -> Iterator[Result]:
    """The teacher's forward pass, then the student's losses and gradients, by implementation."""
    import jax
    from workload import gradients, noise

    from proteus_jax.models.normalization import IMAGENET

    images = noise(job["batch"], job["image"])
    for part, ways in (
        ("teacher forward", ATTENTIONS),
        ("student both ways", ATTENTIONS),
        ("student both ways, masked whole", ("auto",)),
    ):
        for name in ways:
            label = {"part": part, "attention": name}
            try:
                bench = Bench(job | {"attention": name})
                params, student = bench.teacher_params(), bench.work.total - bench.work.teacher
                if part == "teacher forward":
                    # A new function each time: JAX knows what it traced by the function.
                    def function(params: Any, images: jax.Array, bench: Bench = bench) -> Any:
                        return bench.teacher(params, IMAGENET(images))

                    yield label | bench.timed(function, params, images, work=bench.work.teacher)
                else:
                    function, arguments = gradients(
                        bench.teacher, bench.student, params, images, whole="whole" in part
                    )
                    yield label | bench.timed(function, *arguments, work=student)
            except Exception as error:
                yield label | {"error": error_text(error)}


def step(job: Job) -> Iterator[Result]:
    """The step that main.py trains with."""
    import jax

    bench = Bench(job)
    compiled, call, spent = _whole_step(bench)
    seconds = median_seconds(call, job["rounds"])
    result = {"compile_seconds": spent, "seconds": seconds}
    result["planned_bytes"] = compiled.memory_analysis().peak_memory_in_bytes
    # Nothing else ran in this process: the device's own figure is this step's.
    memory = jax.devices()[0].memory_stats() or {}
    result["peak_bytes"] = memory.get("peak_bytes_in_use", result["planned_bytes"])
    yield result | bench.rates(seconds, bench.work.total)


def _whole_step(bench: Bench) -> tuple[Any, Callable[[], Any], float]:
    """The compiled step, a call of it, and the seconds that compiling took."""
    import jax
    from workload import noise, recipe

    init, train = recipe(bench.teacher, {"student": bench.student}, erasing=0.25)
    teachers = {"teacher": bench.teacher_params()}
    images = noise(bench.job["batch"], bench.job["image"])
    state = jax.jit(init)()
    start = time.perf_counter()
    compiled = jax.jit(train, donate_argnums=0).lower(state, teachers, images).compile()
    spent = time.perf_counter() - start

    def call() -> None:
        nonlocal state
        state, metrics = compiled(state, teachers, images)
        jax.block_until_ready(metrics)

    return compiled, call, spent


def trace(job: Job) -> Iterator[Result]:
    """A profile of three steps, for XProf or Perfetto."""
    import jax

    _, call, _ = _whole_step(Bench(job))
    call()
    with jax.profiler.trace(job["directory"]):
        for _ in range(3):
            call()
    yield {"part": f"three steps in {job['directory']}"}


def pytorch(job: Job) -> Iterator[Result]:
    """PyTorch's step, where it is installed and sees what JAX would use."""
    try:
        import torch
    except ImportError:
        yield {"error": "PyTorch is not installed"}
        return
    import torch_step

    from proteus_jax.models import flops

    on_gpu = torch.cuda.is_available()
    teacher, student = specs(job)
    made = torch_step.make(
        teacher,
        student,
        batch=job["batch"],
        image=job["image"],
        device="cuda" if on_gpu else "cpu",
        compiled=job["compiled"],
    )
    start = time.perf_counter()
    made.train()
    result: Result = {"device": "cuda" if on_gpu else "cpu"}
    result["compile_seconds"] = time.perf_counter() - start
    result["seconds"] = median_seconds(made.train, job["rounds"])
    result["images_per_second"] = job["batch"] / result["seconds"]
    if on_gpu:
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
        known = flops.known_device(torch.cuda.get_device_name())
        if known is not None:
            sizes = [(teacher, job["image"])], [student], job["image"]
            work = flops.training(*sizes, masked_share=0.5).total
            result["mfu"] = result["images_per_second"] * work / known.peak
    yield result


KINDS = {kind.__name__: kind for kind in (machine, attention, parts, step, trace, pytorch)}


def main() -> None:
    """Runs the job of the first argument."""
    job = json.loads(sys.argv[1])
    try:
        for result in KINDS[job["kind"]](job):
            print(json.dumps(result), flush=True)
    except Exception as error:  # A failure is a result, too.
        print(json.dumps({"error": error_text(error)}), flush=True)


if __name__ == "__main__":
    main()
