"""Several hosts: who is where, who is missing, and that two processes train as one does."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import compiler
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warm
from commands import UNMEASURED, command, environment, free_port, losses, until
from conftest import ROOT, photograph, shuffled
from PIL import Image

from proteus_jax.cli.arguments import process_info
from proteus_jax.errors import InputError, Interrupted
from proteus_jax.models.config import ViTSpec
from proteus_jax.models.functional import BackboneFunction
from proteus_jax.runtime import cluster_env, collectives, device_check, distributed, sharding
from proteus_jax.runtime.cluster_env import (
    ALONE,
    ProcessInfo,
    detect_cluster_env,
    first_node,
    processes_here,
)
from proteus_jax.runtime.metric_writer import read_metrics
from proteus_jax.runtime.rendezvous import rendezvous
from proteus_jax.weights.model_dir import ModelCard, save_model

STEPS = 6
GLOO = re.compile(
    r"\[Gloo\] Rank|is connected to|peer ranks(?:\.| is ?:)?|Expected number of connected"
)
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "4",
    "SLURM_STEP_NODELIST": "gpu[007-010],other1",
}


def test_places() -> None:
    assert detect_cluster_env({}, {}) == ALONE
    flags = {"--hosts": "2", "--host": "1", "--coordinator": "10.0.0.1:99"}
    assert detect_cluster_env(flags, SLURM) == ProcessInfo(1, 2, "10.0.0.1", 99, "the flags")
    found = detect_cluster_env({}, SLURM)
    assert (found.host, found.hosts, found.address) == (3, 4, "gpu007")
    assert found.local_devices is None
    assert detect_cluster_env({}, SLURM | {"SLURM_PROCID": "0"}).port == found.port
    assert detect_cluster_env({}, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == ALONE
    # A batch script without srun.
    assert detect_cluster_env({}, SLURM | {"SLURM_STEP_NODELIST": ""}) == ALONE
    shared = {"SLURM_NNODES": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert detect_cluster_env({}, SLURM | shared).local_devices == (1,)
    hidden = shared | {"CUDA_VISIBLE_DEVICES": "1"}
    assert detect_cluster_env({}, SLURM | hidden).local_devices is None
    pod = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3"}
    assert detect_cluster_env({}, pod) == ProcessInfo(
        2, 4, "t0", cluster_env.PORT, "TPU_WORKER_HOSTNAMES"
    )


def test_a_shell_of_an_interactive_step_is_alone() -> None:
    """`srun --pty bash` in an allocation of four tasks: the step has one."""
    interactive = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert detect_cluster_env({}, interactive) == ALONE
    # What mpirun starts there is not.
    found = detect_cluster_env({}, interactive | MPIRUN)
    assert (found.host, found.hosts, found.address) == (1, 2, "127.0.0.1")


TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_launchers() -> None:
    found = detect_cluster_env({}, TORCHRUN)
    assert found[:3] == (5, 8, "node0")
    assert found.local_devices == (1,)
    # It listens at its own port there.
    assert found.port != 29500
    assert detect_cluster_env({}, TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).port == found.port
    one_a_node = TORCHRUN | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert detect_cluster_env({}, one_a_node).local_devices is None
    assert detect_cluster_env({}, TORCHRUN | {"CUDA_VISIBLE_DEVICES": "3"}).local_devices is None
    assert detect_cluster_env({}, TORCHRUN | {"WORLD_SIZE": "1"}) == ALONE
    # Where it does not say how many share the machine, others may.
    unsaid = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert detect_cluster_env({}, unsaid).local_devices == (1,)
    nodes = MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    assert detect_cluster_env({}, nodes | uri).address == "10.96.0.1"
    with pytest.raises(InputError, match=r"mpirun started 2 processes.*--host=.OMPI_COMM_WORLD_R"):
        detect_cluster_env({}, nodes)
    with pytest.raises(InputError, match="WORLD_SIZE=8: expected RANK and LOCAL_RANK"):
        detect_cluster_env({}, {"WORLD_SIZE": "8"})


def test_what_slurm_started_starts_others() -> None:
    """`srun torchrun`: the processes are torchrun's."""
    inner = SLURM | TORCHRUN | {"TORCHELASTIC_RUN_ID": "none", "SLURM_NTASKS": "2"}
    found = detect_cluster_env({}, inner)
    assert found[:3] == (5, 8, "node0")
    assert found.source == "torchrun"
    # A batch script's own variables of these names say nothing.
    assert detect_cluster_env({}, SLURM | TORCHRUN).source == "SLURM"
    assert processes_here(inner) == 4
    assert processes_here(SLURM | {"SLURM_NNODES": "2"}) == 2
    assert processes_here({}) == 1
    # Three on two nodes: one of them has two.
    assert processes_here(SLURM | {"SLURM_NTASKS": "3", "SLURM_NNODES": "2"}) == 2


def test_jobs_of_one_machine_listen_apart() -> None:
    """Each at two ports, its coordinator's and the one beside it."""
    ports = [
        detect_cluster_env({}, SLURM | {"SLURM_JOB_ID": str(job), "SLURM_PROCID": "0"}).port
        for job in range(7000, 8000)
    ]
    assert len(set(ports)) > 850
    # Two may meet at one port, of which each says so; none is at the other's second.
    assert not set(ports) & {port + 1 for port in ports}
    assert 1024 < min(ports) <= max(ports) < 32767


def test_a_host_that_is_wrong_waits_for_nobody() -> None:
    """Neither the first of two nor the second; alone all problems are collected."""
    for host in ("0", "1"):
        place = {"--hosts": "2", "--host": host, "--coordinator": "127.0.0.1:9000"}
        with pytest.raises(InputError, match="a problem"):
            process_info(place, ["a problem"])
    known = ["a problem"]
    assert process_info({"--wait": "0"}, known)[0] == ALONE
    assert len(known) == 2


class Device(NamedTuple):
    process_index: int
    device_kind: str


def test_hosts_with_devices_of_other_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [Device(0, "A100"), Device(0, "A100"), Device(1, "A100"), Device(1, "H100")]
    monkeypatch.setattr(distributed.jax, "devices", lambda: devices)
    with pytest.raises(InputError, match="host 0: 2 A100, host 1: 2 A100"):
        distributed._refuse_uneven_hosts()
    monkeypatch.setattr(distributed.jax, "devices", lambda: devices[:3])
    with pytest.raises(InputError, match="host 0: 2 A100, host 1: 1 A100"):
        distributed._refuse_uneven_hosts()
    monkeypatch.setattr(
        distributed.jax, "devices", lambda: [Device(n, "A100") for n in (1, 0, 1, 0)]
    )
    distributed._refuse_uneven_hosts()


def test_what_is_said_of_a_sum() -> None:
    """A ring of eight sends and receives seven eighths twice: 1.75 MiB of 1 MiB."""
    line = device_check._line(2**20, 0.5, 8)
    assert line.split()[:4] == ["1", "MiB", "500.00", "ms"]
    assert float(device_check._line(2**30, 0.5, 8).split()[4]) == pytest.approx(3.76, abs=0.01)


def test_a_sum_that_is_wrong_anywhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the eight devices here; right first, then with one wrong element of many."""
    mesh = sharding.make_mesh()
    assert device_check._summed(64, mesh)[1] == 8
    add = jnp.sum
    monkeypatch.setattr(
        device_check.jnp, "sum", lambda *each, **more: add(*each, **more).at[3].add(1.0)
    )
    with pytest.raises(InputError, match="a sum of 64 bytes over 8 devices is wrong"):
        device_check._summed(64, mesh)


def test_a_process_takes_its_own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that its place says, as of several on one machine."""
    asked: dict[str, Any] = {}

    class Left(Exception):
        pass

    def initialize(address: str, **more: Any) -> None:
        asked.update(more, address=address)
        raise Left

    company = SimpleNamespace(leave=lambda *_: None, lost_one=lambda _: False)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: company)
    monkeypatch.setattr(distributed, "_exit_in_place_of_abort", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    place = ProcessInfo(3, 4, "10.0.0.1", 9000, "a test", (1,))
    with (
        pytest.raises(Left),
        distributed.initialize_distributed(place, {}, timeout=1.0, progress=print, say=print),
    ):
        pass
    assert asked["local_device_ids"] == (1,)
    assert (asked["process_id"], asked["num_processes"]) == (3, 4)
    assert asked["address"] == "10.0.0.1:9000"


def test_several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    pod = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "t0,t1"}
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    address = {"MEGASCALE_COORDINATOR_ADDRESS": "first:8080"}
    found = detect_cluster_env({}, pod | slices | address)
    assert found[:4] == (3, 4, "first", cluster_env.PORT)
    with pytest.raises(InputError, match="MEGASCALE_NUM_SLICES=2: expected MEGASCALE_COORDINATOR"):
        detect_cluster_env({}, pod | slices)
    monkeypatch.setattr(cluster_env, "TPU_DEVICES", (ROOT,))
    answers = {
        "agent-worker-number": "0",
        "worker-network-endpoints": "a:b:10.1.0.2",
        "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9'\n",
    }
    monkeypatch.setattr(cluster_env, "_metadata", lambda name: answers.get(name, ""))
    assert detect_cluster_env({}, {})[:4] == (1, 2, "10.0.0.9", cluster_env.PORT)


def test_a_tpus_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_env, "TPU_DEVICES", (ROOT,))
    answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:10.1.0.2,unknown:unknown:10.1.0.3",
    }
    monkeypatch.setattr(cluster_env, "_metadata", lambda name: answers.get(name, ""))
    assert detect_cluster_env({}, {}) == ProcessInfo(
        1, 2, "10.1.0.2", cluster_env.PORT, "the TPU's metadata"
    )
    # A TPU device without a metadata server, as in a container.
    monkeypatch.setattr(cluster_env, "_metadata", lambda _: "")
    assert detect_cluster_env({}, {}) == ALONE


def test_gpus_that_jax_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_env, "GPU_DEVICES", tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS")
    assert cluster_env.unseen_gpus("cpu") is None
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    said = cluster_env.unseen_gpus("cpu")
    assert said is not None
    assert said.startswith("2 GPUs here, but JAX sees none")
    assert cluster_env.unseen_gpus("gpu") is None
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cluster_env.unseen_gpus("cpu") is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("node[007-012,020],x3", "node007"),
        ("rack1-n[3,5-7]", "rack1-n3"),
        ("n[1-2]-ib", "n1-ib"),
        ("rack[1-2]node[03-4,7],x", "rack1node03"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        ({"--hosts": "2"}, {}, "--host, --coordinator: expected together with --hosts"),
        (
            {"--hosts": "two", "--host": "0", "--coordinator": "here"},
            {},
            "--hosts: expected a whole number, found 'two'\n"
            "--coordinator: expected ADDRESS:PORT, found 'here'",
        ),
        (
            {"--hosts": "2", "--host": "2", "--coordinator": "a:1"},
            {},
            "the flags: expected hosts numbered from 0 to 1, found host 2",
        ),
        (
            {"--hosts": "0", "--host": "0", "--coordinator": "a:1"},
            {},
            "the flags: expected at least 1 host, found 0",
        ),
        ({}, SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID: expected a whole number, found 'x'"),
    ],
)
def test_wrong_places(flags: dict, environment: dict, words: str) -> None:
    with pytest.raises(InputError) as error:
        detect_cluster_env(flags, environment)
    assert words in str(error.value)


def meet_all(count: int, abouts: list[dict], timeout: float = 5.0, total: int = 0) -> list[Any]:
    """What each of `count` hosts finds: its company, or why there is none."""
    port = free_port()
    results: list[Any] = [None] * count

    def one(host: int) -> None:
        place = ProcessInfo(host, total or count, "127.0.0.1", port, "a test")
        try:
            results[host] = rendezvous(place, abouts[host], timeout=timeout, say=print)
        except (InputError, Interrupted) as error:
            results[host] = error

    threads = [threading.Thread(target=one, args=(host,)) for host in range(count)]
    for thread in threads:
        thread.start()
    # A stranger on the port is no host.
    with socket.socket() as stranger:
        stranger.settimeout(1)
        if stranger.connect_ex(("127.0.0.1", port + 1)) == 0:
            # It may have been shown the door already.
            with contextlib.suppress(ConnectionError):
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    for thread in threads:
        thread.join()
    return results


def test_all_meet_and_part() -> None:
    companies = meet_all(3, [{"version": "1"}] * 3)
    for company in companies:
        assert not company.lost_one(0.1)
    for company in companies:
        company.leave()
        assert not company.lost_one(0)


def test_hosts_compare_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text on all, or not: a few equal bytes of two digests are chance."""
    gather = collectives.multihost_utils
    monkeypatch.setattr(gather, "process_allgather", lambda mine: np.stack([mine, mine]))
    assert collectives.same_on_all_hosts("a")
    changed = np.arange(32) > 3
    monkeypatch.setattr(
        gather, "process_allgather", lambda mine: np.stack([mine, mine ^ np.uint8(changed)])
    )
    assert not collectives.same_on_all_hosts("a")


def test_hosts_may_say_what_is_no_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of bytes that are no UTF-8, and texts of different lengths."""
    monkeypatch.setattr(collectives.jax, "process_count", lambda: 2)

    def gathered(mine: np.ndarray) -> np.ndarray:
        if mine.ndim == 0:
            return np.array([mine, 3])
        other = np.zeros_like(mine)
        other[:3] = np.frombuffer(b"abc", np.uint8)
        return np.stack([mine, other])

    monkeypatch.setattr(collectives.multihost_utils, "process_allgather", gathered)
    assert collectives.gather_from_all_hosts("x/\udcff.png") == ["x/\\udcff.png", "abc"]
    assert collectives.gather_from_all_hosts("") == ["", "abc"]


def test_who_is_missing_has_a_number() -> None:
    first, second = meet_all(2, [{}] * 2, timeout=1.0, total=4)
    for found in (first, second):
        assert isinstance(found, Interrupted)
        assert "after 1 s 2 of 4 hosts are here: host 0, host 1 (" in str(found)
        assert "missing: 2, 3" in str(found)


def test_strangers_do_not_make_the_wait_longer() -> None:
    """Who comes and goes is no reason to wait anew for those who are missing."""
    port, results = free_port(), []
    place = ProcessInfo(0, 2, "127.0.0.1", port, "a test")

    def wait() -> None:
        try:
            rendezvous(place, {}, timeout=1.5, say=print)
        except Interrupted as error:
            results.append(error)

    waiting = threading.Thread(target=wait)
    begun = time.monotonic()
    waiting.start()
    while waiting.is_alive() and time.monotonic() < begun + 20:
        with socket.socket() as stranger, contextlib.suppress(OSError):
            stranger.settimeout(0.2)
            stranger.connect(("127.0.0.1", port + 1))
        waiting.join(0.3)
    assert time.monotonic() - begun < 6
    assert len(results) == 1


def test_without_host_0_the_others_say_so() -> None:
    place = ProcessInfo(1, 2, "127.0.0.1", free_port(), "a test")
    words = r"host 0 at 127.0.0.1:\d+ is not here .*this is host 1 of 2"
    with pytest.raises(Interrupted, match=words):
        rendezvous(place, {}, timeout=1.0, say=print)


def test_hosts_that_run_something_else_are_refused() -> None:
    for what in ("version", "version of jax"):
        for found in meet_all(2, [{what: "1"}, {what: "2"}]):
            assert isinstance(found, InputError)
            assert f"runs something else: its {what} is 2, that of host 0 is 1" in str(found)


def processes(
    count: int,
    devices: int,
    workdir: Path,
    photographs: Path,
    teacher: Path,
    *more: str,
    at: Path | None = None,
    change: Callable[[list[str]], list[str]] = list,
    extra_device_of: int | None = None,
) -> list[subprocess.Popen]:
    """A run of several processes, each with its own fake devices, and under `at` its own folder."""
    arguments = [
        *command(workdir, photographs, teacher),
        f"--config.steps={STEPS}",
        "--config.batch=16",
        "--config.checkpoint_every=3",
        "--config.eval_every=6",
        "--config.data.held_out.views=16",
        *more,
    ]
    cache = teacher.parent.parent / "cache"
    return started(count, devices, change(arguments), cache, at, extra_device_of)


def started(
    count: int,
    devices: int,
    arguments: list[str],
    cache: Path,
    at: Path | None = None,
    extra_device_of: int | None = None,
) -> list[subprocess.Popen]:
    """The processes of a command."""
    port = free_port()
    return [
        warm.start(
            arguments
            + (
                [f"--hosts={count}", f"--host={host}", f"--coordinator=127.0.0.1:{port}"]
                if count > 1
                else []
            ),
            env=os.environ
            | {
                "XLA_FLAGS": f"{compiler.FLAGS} --xla_force_host_platform_device_count="
                f"{devices + (host == extra_device_of)}",
                "JAX_PLATFORMS": "cpu",
                "PROTEUS_JAX_CACHE": str(cache),
            },
            cwd=None if at is None else at / str(host),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for host in range(count)
    ]


def ended(running: list[subprocess.Popen], timeout: float = 180.0) -> list[tuple[int, str, str]]:
    found = []
    for process in running:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        # What the CPU's stand-in for a network says of itself, at times into the middle of a line.
        said = [re.sub(r"(?m)^[\d\s:.]+$", "", GLOO.sub("", text)) for text in (out, err)]
        found.append((process.returncode, *said))
    return found


def test_two_processes_train_as_one_does(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """2 x 2 devices against 1 x 4; and half of it as two, the other half as one."""
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = ended(processes(1, 4, one, photographs, tiny_teacher, "--config.fsdp=2"))
    assert alone[0] == 0, alone
    both = ended(
        processes(2, 2, two, photographs, tiny_teacher, "--config.fsdp=2", "--config.hosts=2")
    )
    assert [code for code, _, _ in both] == [0, 0], both
    assert "2 hosts x 2 devices" in both[0][1]
    assert both[1][1].strip() == both[1][2] == both[0][2] == ""
    assert_close_losses(losses(two), losses(one))
    # Cut back to its half, and gone on with by 1 x 2 devices that share nothing.
    shutil.rmtree(two / "checkpoints" / str(STEPS))
    (resumed,) = ended(processes(1, 2, two, photographs, tiny_teacher))
    assert resumed[0] == 0, resumed
    assert f"resuming at step {STEPS // 2}" in resumed[1]
    assert_close_losses(losses(two), losses(one))


def test_two_processes_cut_the_student_that_one_does(tmp_path: Path, photographs: Path) -> None:
    """A slice and its heads; all weights are divided over the devices of both hosts."""
    spec = ViTSpec(width=256, depth=2, heads=4, grid=2)
    teacher = tmp_path / "models" / "wide"
    params = shuffled(BackboneFunction(spec).init(jax.random.key(1)))
    save_model(teacher, params, ModelCard(spec=spec, license="none"))
    start = ["--config.init.method=slice", "--config.init.heads=least_squares"]
    start += ["--config.init.images=512", "--config.fsdp=4", "--config.steps=1"]
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = ended(processes(1, 4, one, photographs, teacher, *start))
    assert alone[0] == 0, alone
    both = ended(processes(2, 2, two, photographs, teacher, *start))
    assert [code for code, _, _ in both] == [0, 0], both
    ours, theirs = list(read_metrics(two)), list(read_metrics(one))
    # Regressions upon regressions of sums in another order; 1e-6 apart when this was written.
    for key in ("agreement_class", "agreement_patch", "cka"):
        assert ours[0][key] == pytest.approx(theirs[0][key], abs=1e-4)
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], rel=1e-4)
    reports = [json.loads((folder / "slices.json").read_text()) for folder in (two, one)]
    for found, expected in zip(*(next(iter(each.values())) for each in reports), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


INTERLEAVED = str(ROOT / "tests" / "interleaved.py")


def interleaved(arguments: list[str]) -> list[str]:
    """The same command on devices in the order of a TPU slice."""
    return [INTERLEAVED if part.endswith("main.py") else part for part in arguments]


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_hosts_whose_devices_take_turns_measure_as_one_does(
    count: int, tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """Agreement, pictures and losses: more views than a batch, so that a row in the wrong place
    would be measured, or left out. Four hosts with a device each, or two with two that share a
    copy.
    """
    more = ("--config.data.held_out.views=21", "--config.steps=2", "--config.eval_every=2")
    one = tmp_path / "one"
    (alone,) = ended(processes(1, 4, one, photographs, tiny_teacher, *more))
    assert alone[0] == 0, alone
    many = tmp_path / "many"
    parts = (*more, f"--config.fsdp={4 // count}")
    together = ended(
        processes(count, 4 // count, many, photographs, tiny_teacher, *parts, change=interleaved)
    )
    assert [code for code, _, _ in together] == [0] * count, together
    assert_measured_alike(many, one)


def assert_measured_alike(many: Path, one: Path) -> None:
    """The losses, agreement and pictures of two runs."""
    assert_close_losses(losses(many), losses(one), steps=2)
    for ours, theirs in zip(read_metrics(many), read_metrics(one), strict=True):
        measured = [key for key in theirs if key.startswith(("agreement", "neighbour", "cka"))]
        assert [ours[key] for key in measured] == pytest.approx(
            [theirs[key] for key in measured], abs=1e-4
        )
    drawn = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    assert len(drawn) > 2
    for name in drawn:
        # Colors are scaled by the smallest and largest value: rounding may move a level or two.
        assert np.abs(picture(many / name) - picture(one / name)).mean() < 2


@pytest.mark.slow
def test_a_dump_of_hosts_whose_devices_take_turns_is_that_of_one(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """Training diverges at the same step, and each image of the batch has its own name."""
    more = (*UNMEASURED, "--config.learning_rate=1e25", "--config.optimizer.warmup_steps=4")
    more += ("--config.max_skipped=1", "--config.optimizer.mu_dtype=float32")
    one, many = tmp_path / "one", tmp_path / "many"
    (alone,) = ended(processes(1, 4, one, photographs, tiny_teacher, *more))
    together = ended(processes(2, 2, many, photographs, tiny_teacher, *more, change=interleaved))
    assert [code for code, _, _ in (alone, *together)] == [3, 3, 3], (alone, together)
    (ours,), (theirs,) = (list((at / "dump").iterdir()) for at in (many, one))
    assert ours.name == theirs.name
    with np.load(ours / "batch.npz") as found, np.load(theirs / "batch.npz") as expected:
        np.testing.assert_array_equal(found["images"], expected["images"])
    names = [json.loads((at / "dump.json").read_text())["names"] for at in (ours, theirs)]
    assert names[0] == names[1]
    assert len(names[0]) == 16


@pytest.mark.parametrize("protocol", ["knn", "linear", "analysis"])
def test_two_processes_evaluate_as_one_does(
    protocol: str, tmp_path: Path, tiny_teacher: Path
) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 7), ("test", 5)):
        for name in ("a", "b", "c"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(photograph(rng)).save(folder / f"{number}.png")
    more = {
        "knn": ("--config.knn.neighbours=3",),
        "linear": ("--config.linear.epochs=1", "--config.linear.blocks=(1, 2)"),
        "analysis": (f"--config.analysis.teacher={tiny_teacher}",),
    }[protocol]
    arguments = (
        f"--config={ROOT / 'configs' / 'eval' / f'{protocol}.py'}",
        f"--config.model={tiny_teacher}",
        f"--config.data.root={tmp_path / 'images'}",
        "--config.batch=8",
        "--config.data.resize=64",
        "--config.data.crop=56",
        *more,
    )
    found = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        evaluated = [sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}", *arguments]
        ends = ended(started(count, 4 // count, interleaved(evaluated), tmp_path / "cache"))
        assert [code for code, _, _ in ends] == [0] * count, ends
        found.append(json.loads((workdir / "results.json").read_text()))
    assert_close_results(*found)
    if protocol == "linear":
        # Both find the probe that they have saved.
        ends = ended(started(2, 2, interleaved(evaluated), tmp_path / "cache"))
        assert [code for code, _, _ in ends] == [0, 0], ends
        assert "the probe goes on from step" in ends[0][1]
        assert_close_results(found[1], json.loads((workdir / "results.json").read_text()))


def assert_close_results(one: Any, other: Any) -> None:
    """The same but for rounding, and for how long it took."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "images_per_second"}:
            assert_close_results(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_close_results(mine, theirs)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    else:
        assert one == other


def test_two_workdirs_are_refused_before_anything_is_trained(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """A relative path, with another folder behind it on each host."""
    for host in range(2):
        (tmp_path / str(host)).mkdir()
    began = time.monotonic()
    both = ended(processes(2, 1, Path("run"), photographs, tiny_teacher, at=tmp_path))
    assert time.monotonic() - began < 60
    assert [code for code, _, _ in both] == [2, 2], both
    for _, _, err in both:
        assert "--workdir: the hosts do not see the same one" in err
        assert all(str(tmp_path / str(host) / "run") in err for host in range(2))
    # The one that led has nothing but an empty folder, the other not even that.
    assert not list((tmp_path / "0" / "run").iterdir())
    assert not (tmp_path / "1" / "run").exists()


def test_hosts_with_unequal_devices_are_refused(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    both = ended(processes(2, 1, tmp_path / "run", photographs, tiny_teacher, extra_device_of=1))
    assert [code for code, _, _ in both] == [2, 2], both
    words = "expected as many devices of one kind on each host, found host 0: 1 cpu, host 1: 2 cpu"
    assert all(words in err for _, _, err in both), both
    assert not (tmp_path / "run").exists()


def assert_close_losses(found: list[dict], expected: list[dict], steps: int = STEPS) -> None:
    assert [row["step"] for row in found] == list(range(steps + 1))
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        tolerance = 1e-5 if step <= 1 else 1e-4
        for key in ("loss", "token_loss", "feature_loss", "patch_loss"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=tolerance), (step, key)


def test_a_signal_to_one_stops_both_and_one_alone_goes_on(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    workdir, steps = tmp_path / "run", ("--config.steps=400", "--config.checkpoint_every=400")
    running = processes(2, 2, workdir, photographs, tiny_teacher, *UNMEASURED, *steps)
    until(lambda: sum(1 for _ in read_metrics(workdir)) > 4)
    running[1].send_signal(signal.SIGTERM)
    both = ended(running)
    assert [code for code, _, _ in both] == [75, 75], both
    assert "interrupted at step" in both[0][1]
    reached = list(read_metrics(workdir))[-1]["step"]
    steps = (f"--config.steps={reached + 2}",)
    (alone,) = ended(processes(1, 2, workdir, photographs, tiny_teacher, *UNMEASURED, *steps))
    assert alone[0] == 0, alone
    assert f"resuming at step {reached}" in alone[1]


def test_a_signal_while_hosts_wait_for_each_other(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    first, second = processes(2, 1, tmp_path / "run", photographs, tiny_teacher)
    second.kill()
    second.communicate()
    assert first.stdout is not None
    assert "waiting" in first.stdout.readline()
    first.send_signal(signal.SIGTERM)
    ((code, _, err),) = ended([first], timeout=30)
    assert (code, err) == (75, "interrupted; the same command goes on\n")


# What a process does between meeting the others and its first step.
JOINED = """
import os, signal, sys, time
from proteus_jax.runtime import distributed
from proteus_jax.runtime.cluster_env import ProcessInfo
signal.signal(signal.SIGTERM, signal.default_int_handler)
place = ProcessInfo(int(sys.argv[1]), 2, "127.0.0.1", int(sys.argv[2]), "a test")
try:
    with distributed.initialize_distributed(place, {}, timeout=60, progress=print, say=print):
        print("joined", flush=True)
        time.sleep(300)
except KeyboardInterrupt:
    os._exit(7)
"""


def test_a_signal_before_the_loop_of_several_hosts_is_heard() -> None:
    port = str(free_port())
    running = [
        warm.start(
            [sys.executable, "-c", JOINED, str(host), port],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for host in range(2)
    ]
    for process in running:
        assert process.stdout is not None
        while process.stdout.readline() != "joined\n":
            assert process.poll() is None
    running[1].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in ended(running, timeout=60)] == [75, 7]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_host_ends_the_others_with_a_name(
    killed: int, tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    workdir = tmp_path / "run"
    steps = ("--config.steps=4000",)
    running = processes(2, 1, workdir, photographs, tiny_teacher, *UNMEASURED, *steps)
    until(lambda: sum(1 for _ in read_metrics(workdir)) > 3)
    running[killed].kill()
    started = time.monotonic()
    both = ended(running)
    assert time.monotonic() - started < 60
    code, _, err = both[1 - killed]
    assert code == 75, both
    assert f"host {killed} (" in err
    assert "is gone; this run ends" in err
    assert "Traceback" not in err


def test_a_killed_worker_of_one_host_has_all_save_and_stop(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    workdir = tmp_path / "run"
    more = ("--config.steps=4000", "--config.checkpoint_every=4000", "--config.data.workers=1")
    running = processes(2, 1, workdir, photographs, tiny_teacher, *UNMEASURED, *more)
    until(lambda: sum(1 for _ in read_metrics(workdir)) > 3)
    subprocess.run(["pkill", "-KILL", "-P", str(running[1].pid), "-f", "spawn_main"], check=True)
    both = ended(running)
    assert [code for code, _, _ in both] == [75, 75], both
    assert "interrupted at step" in both[0][1]
    assert "was killed" in both[1][2]
    (saved,) = (path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert int(saved) > 3


def test_another_shape_than_promised_is_refused(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    promised = ("--config.hosts=2", "--config.devices=8")
    (alone,) = ended(processes(1, 4, tmp_path / "run", photographs, tiny_teacher, *promised))
    assert alone[0] == 2
    assert "found 1 host x 4 devices, expected 2 x 8" in alone[2]
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_on_one_host_ends_all_as_wrong(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """Each host sees a folder of its own name, of which the second one has an image less."""
    for host in range(2):
        folder = tmp_path / f"{host}" / "images"
        folder.mkdir(parents=True)
        for path in sorted(photographs.rglob("*.jpg"))[host:]:
            (folder / path.name).symlink_to(path)
    running = processes(
        2, 1, tmp_path / "run", Path("images"), tiny_teacher, *UNMEASURED, at=tmp_path
    )
    both = ended(running)
    assert [code for code, _, _ in both] == [2, 2], both
    words = "the hosts do not see the same images or teacher"
    assert words in both[0][2]
    assert words in both[1][2]
    # One that sees none at all says so; the other one hears that it left, and of what.
    for path in (tmp_path / "1" / "images").iterdir():
        path.unlink()
    both = ended(
        processes(2, 1, tmp_path / "2", Path("images"), tiny_teacher, *UNMEASURED, at=tmp_path)
    )
    assert [code for code, _, _ in both] == [2, 2], both
    assert "--config.data.root: images: no image below it (of JPEG" in both[1][2]
    assert "host 1 (" in both[0][2]
    assert "images: no image below it (of JPEG" in both[0][2]


def test_devices_hear_each_other(tmp_path: Path) -> None:
    """Two processes of two devices each sum over all four; so does one alone."""
    port = free_port()
    arguments = [sys.executable, str(ROOT / "main.py"), "--devices"]
    variables = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    pair = [
        warm.start(
            [*arguments, "--hosts=2", f"--host={host}", f"--coordinator=127.0.0.1:{port}"],
            env=environment(tmp_path) | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for host in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert "2 hosts, 4 devices (cpu): sums over all of them" in said[0]
    assert len(re.findall(r" MiB +[\d.]+ ms +[\d.]+ GB/s for each device", said[0])) == 3
    assert "all devices hear each other" in said[0]


# One device never comes to the sum.
SILENT = """
import sys, time
from proteus_jax.runtime import device_check
from proteus_jax.runtime.device_check import check_devices
device_check._summed = lambda *_: time.sleep(60)
check_devices(print, print, patience=0.2)
"""


def test_a_device_that_is_not_heard_ends_the_check() -> None:
    result = subprocess.run(
        [sys.executable, "-u", "-c", SILENT], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert result.returncode == 2
    assert "no answer of all devices within 0 s. On GPUs NCCL_DEBUG=INFO" in result.stdout
