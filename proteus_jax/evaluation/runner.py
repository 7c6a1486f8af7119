"""One evaluation: everything is checked, then the protocol runs, then its results are written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import proteus_jax
from proteus_jax.data.passed_over import PassedOver
from proteus_jax.data.transforms.center_crop import CenterCrop
from proteus_jax.data.workers import worker_pool
from proteus_jax.errors import InputError, about, collecting
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.feature_extraction import LoaderConfig, freeze
from proteus_jax.evaluation.protocol import Context, Saving
from proteus_jax.evaluation.protocols.registry import PROTOCOLS
from proteus_jax.evaluation.results import (
    FILE,
    describe,
    read_results,
    weights_digest,
    write_results,
)
from proteus_jax.feature_extractor import Model
from proteus_jax.loading import load_any
from proteus_jax.models.precision import dtype_of
from proteus_jax.runtime import collectives, sharding
from proteus_jax.runtime.cluster_env import unseen_gpus
from proteus_jax.runtime.compilation_cache import FOLDER as COMPILED
from proteus_jax.runtime.compilation_cache import keep_compiled_programs
from proteus_jax.runtime.console import Console
from proteus_jax.runtime.filesystem import write_atomically
from proteus_jax.runtime.metric_writer import FILE as METRICS
from proteus_jax.runtime.preemption import PreemptionHandler
from proteus_jax.runtime.workdir import CHECKPOINTS, Workdir, is_remote
from proteus_jax.runtime.workdir_checks import first_of, why_no_workdir
from proteus_jax.weights.model_dir import WEIGHTS

HOLDS_A_MODEL_OR_RUN = (WEIGHTS, CHECKPOINTS, METRICS)
# The checkpoints of a probe, in the workdir.
PROBE = "probe"
# Seconds from a request to stop after which an evaluation ends, saved or not.
DEADLINE = 300.0


class Inputs(NamedTuple):
    """A model, and the data of the protocol."""

    model: Model
    data: Any


def open_inputs(config: EvalConfig, workdir: str, known: Sequence[str] = ()) -> Inputs:
    """InputError lists all that is wrong, with the problems that are known already first."""
    problems = list(known)
    reason = why_no_workdir(workdir)
    if reason:
        problems.append(f"--workdir: {reason}")
    else:
        problems += _check_place(config, workdir)
    return _found(config, problems)


def prepare(config: EvalConfig, known: Sequence[str] = ()) -> None:
    """Finds model and images before there is a workdir; what has to be fetched is."""
    _found(config, list(known))


def _found(config: EvalConfig, problems: list[str]) -> Inputs:
    protocol = PROTOCOLS[config.protocol]
    data = model = None
    try:
        data = protocol.open(config)
    except InputError as error:
        problems += error.problems
    with collecting(problems, "--config.model"):
        model = load_any(config.model)
    if model is not None:
        problems += _check_model(config, model)
        problems += protocol.check(config, model.spec, lambda: weights_digest(model.params))
    if problems or model is None:
        raise InputError(problems)
    return Inputs(model, data)


def _check_place(config: EvalConfig, workdir: str) -> list[str]:
    """A model's or a run's folder would lose its config.json, another evaluation its results."""
    there = first_of(workdir, HOLDS_A_MODEL_OR_RUN)
    if there:
        return [f"--workdir: {workdir} holds a model or a run ({there}); give another folder"]
    if not is_remote(workdir) and (Path(workdir).expanduser() / FILE).exists():
        problems: list[str] = []
        with collecting(problems, "--workdir"):
            protocol = read_results(Path(workdir).expanduser())["protocol"]
        if problems:
            return problems
        if protocol.partition(",")[0] != config.protocol:
            return [f"--workdir: {workdir} holds the results of {protocol}; give another folder"]
    return []


def _check_model(config: EvalConfig, model: Model) -> list[str]:
    patch = model.spec.patch_size
    if config.data.crop % patch:
        return [
            f"--config.data.crop: expected a multiple of the model's patch size {patch}, found "
            f"{config.data.crop}"
        ]
    return []


def run(config: EvalConfig, inputs: Inputs, place: Workdir, console: Console) -> int:
    """Measures, and writes results.json; returns the exit code."""
    place.compare(jax.process_index(), collectives.gather_from_all_hosts)
    keep_compiled_programs(place.address_of(place.local / COMPILED))
    workdir, is_primary = place.local, jax.process_index() == 0
    with about("--workdir"):
        workdir.mkdir(parents=True, exist_ok=True)
    console.quiet = not is_primary
    console.keep_log(
        workdir / "log.txt" if is_primary else workdir / f"log.{jax.process_index()}.txt"
    )
    mesh = sharding.make_mesh()
    dtype = dtype_of(config.precision, jax.default_backend())
    readers = worker_pool(config.data.workers, config.data.threads, config.data.crop)
    context = Context(
        config=config,
        frozen=freeze(inputs.model, mesh, dtype),
        digest=lambda: weights_digest(inputs.model.params),
        mesh=mesh,
        workdir=workdir,
        view=CenterCrop(config.data.resize, config.data.crop),
        reading=LoaderConfig(config.batch, readers.workers, readers.threads),
        say=console.line,
        progress=console.progress,
    )
    console.line(f"proteus_jax {proteus_jax.__version__}: {config.protocol} of {config.model}")
    for remark in filter(None, [unseen_gpus(jax.default_backend()), readers.remark]):
        console.line(remark)
    for line in getattr(inputs.data, "passed_over", PassedOver()).lines():
        console.line(f"passed over: {line}")
    with PreemptionHandler(DEADLINE, console.error) as handler:
        saving = Saving(place.address_of(workdir / PROBE), console, handler)
        context = context._replace(saving=saving)
        measured = PROTOCOLS[config.protocol].measure(context, inputs.data)
    results: dict[str, Any] = {"protocol": config.protocol} | measured
    results["constants"] = _constants(config) | results.get("constants", {})
    results["model"] = describe(config.model, inputs.model)
    if is_primary:
        text = json.dumps(config.as_json, indent=2) + "\n"
        write_atomically(workdir / "config.json", text)
        write_results(workdir, results)
    console.line(f"written to {place.named(Path(workdir / FILE))}")
    return 0


def _constants(config: EvalConfig) -> dict[str, Any]:
    """All that shapes the numbers, beside the model and the images."""
    shared: dict[str, Any] = {"resize": config.data.resize, "crop": config.data.crop}
    shared["precision"] = config.precision
    return shared | config.as_json.get(config.protocol, {})
