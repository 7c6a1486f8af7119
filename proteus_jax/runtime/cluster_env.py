"""Which host of a run this process is: from flags, its launcher, or a TPU's metadata."""

import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from proteus_jax.errors import InputError

# JAX's coordinator listens here, the rendezvous one port further.
PORT = 8476
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
METADATA_TIMEOUT = 2.0
# A device file of a TPU: without one nobody asks for metadata.
TPU_DEVICES = (Path("/dev/accel0"), Path("/dev/vfio/0"))
# A file for each GPU that the driver of NVIDIA has found.
GPU_DEVICES = Path("/dev")
# What says of a worker which of several TPU slices it belongs to.
SLICES = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
# What tells jobs of torchrun and of MPI apart.
JOBS = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")


class Launcher(NamedTuple):
    """A program that starts one process on many machines, and the variables in which it tells each
    of them its number. `mark` is one that nothing else sets, where it has one: it then started this
    process, whoever started it.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    mark: str = ""
    has_address: bool = False


_OMPI = "OMPI_COMM_WORLD_"
LAUNCHERS = (
    Launcher(
        "torchrun",
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        mark="TORCHELASTIC_RUN_ID",
        has_address=True,
    ),
    Launcher(
        "mpirun",
        *(f"{_OMPI}{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
        mark=f"{_OMPI}SIZE",
    ),
    Launcher("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


class ProcessInfo(NamedTuple):
    """This process among the hosts of a run, and who said so.

    `local_devices` are the devices that it may take, where several processes share a machine;
    None takes all.
    """

    host: int
    hosts: int
    address: str
    port: int
    source: str
    local_devices: tuple[int, ...] | None = None


ALONE = ProcessInfo(0, 1, "", 0, "this machine alone")


def detect_cluster_env(
    flags: Mapping[str, str], environment: Mapping[str, str] | None = None
) -> ProcessInfo:
    """--hosts, --host and --coordinator where they are given, then torchrun or mpirun, which SLURM
    may have started, a step of SLURM, then a TPU pod; alone otherwise.

    InputError where flags or a launcher's variables make no sense.
    """
    environment = os.environ if environment is None else environment
    if flags:
        return _from_flags(flags)
    launchers = [each for each in LAUNCHERS if environment.get(each.size, "1") != "1"]
    for launcher in launchers:
        if launcher.mark in environment:
            return _from_launcher(launcher, environment)
    if _in_step(environment):
        return _from_slurm(environment)
    for launcher in launchers:
        return _from_launcher(launcher, environment)
    return _from_tpu(environment) or ALONE


def processes_here(environment: Mapping[str, str] | None = None) -> int:
    """How many processes of a run share this machine, as their launcher says."""
    environment = os.environ if environment is None else environment
    for launcher in LAUNCHERS:
        if environment.get(launcher.local_size, "").isdecimal():
            return max(1, int(environment[launcher.local_size]))
    if _in_step(environment):
        return -(-_tasks(environment) // max(1, _step_nodes(environment)))
    return 1


def _in_step(environment: Mapping[str, str]) -> bool:
    """A batch script that starts without srun has the job's variables, but no step's; a shell of an
    interactive step has those of both, and the step's are about this process.
    """
    return bool(environment.get("SLURM_STEP_NODELIST")) and _tasks(environment) > 1


def _step_nodes(environment: Mapping[str, str]) -> int:
    return _number(environment, "SLURM_STEP_NUM_NODES", _number(environment, "SLURM_NNODES", 1))


def _from_flags(flags: Mapping[str, str]) -> ProcessInfo:
    missing = [name for name in ("--hosts", "--host", "--coordinator") if not flags.get(name)]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: expected together with {', '.join(flags)}, as --hosts=2 "
            "--host=0 --coordinator=ADDRESS:PORT"
        )
    problems = [
        f"{name}: expected a whole number, found {flags[name]!r}"
        for name in ("--hosts", "--host")
        if not flags[name].isdecimal()
    ]
    address, colon, port = flags["--coordinator"].rpartition(":")
    if not (colon and address and port.isdecimal() and 0 < int(port) < 65535):
        problems.append(f"--coordinator: expected ADDRESS:PORT, found {flags['--coordinator']!r}")
    if problems:
        raise InputError(problems)
    return _checked(int(flags["--host"]), int(flags["--hosts"]), address, int(port), "the flags")


def _checked(host: int, hosts: int, address: str, port: int, source: str) -> ProcessInfo:
    if hosts < 1:
        raise InputError(f"{source}: expected at least 1 host, found {hosts}")
    if not 0 <= host < hosts:
        raise InputError(
            f"{source}: expected hosts numbered from 0 to {hosts - 1}, found host {host}"
        )
    return ProcessInfo(host, hosts, address, port, source) if hosts > 1 else ALONE


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise InputError(f"{name}: expected a whole number, found {text!r}")
    return int(text)


def _tasks(environment: Mapping[str, str]) -> int:
    return _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))


def _from_slurm(environment: Mapping[str, str]) -> ProcessInfo:
    """A task of an srun; the first node coordinates."""
    nodes = environment["SLURM_STEP_NODELIST"]
    tasks = _tasks(environment)
    job = _port_of(environment.get("SLURM_JOB_ID", ""))
    host = _number(environment, "SLURM_PROCID")
    place = _checked(host, tasks, first_node(nodes), job, "SLURM")
    if tasks > _step_nodes(environment) > 0:
        return _with_one_device(place, environment, "SLURM_LOCALID")
    return place


def _port_of(job: str) -> int:
    """Jobs that share a machine should not share a port."""
    return 20000 + int(hashlib.sha256(job.encode()).hexdigest()[:8], 16) % 6000 * 2


def _with_one_device(place: ProcessInfo, environment: Mapping[str, str], local: str) -> ProcessInfo:
    """Gives each of several processes on a machine the device of its number, which the variable
    `local` has, unless a scheduler has hidden all but one from it.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or "," in visible:
        return place._replace(local_devices=(_number(environment, local),))
    return place


def _from_launcher(launcher: Launcher, environment: Mapping[str, str]) -> ProcessInfo:
    """InputError where it does not say at which machine its processes meet."""
    size, rank = launcher.size, launcher.rank
    missing = [name for name in (rank, launcher.local_rank) if name not in environment]
    if missing:
        raise InputError(
            f"{size}={environment[size]}: expected {' and '.join(missing)} with it, as "
            f"{launcher.name} sets them; without {size} this machine trains alone"
        )
    hosts, here = _number(environment, size), _number(environment, launcher.local_size, 0)
    address = environment.get("MASTER_ADDR", "") if launcher.has_address else ""
    # Where mpirun itself runs, as JAX takes it too.
    head = re.search(r"tcp://([^,:]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if not address and here == hosts:
        address = "127.0.0.1"
    elif not address and head is not None and launcher.rank.startswith("OMPI"):
        address = head.group(1)
    if not address:
        raise InputError(
            f"{launcher.name} started {hosts} processes, but does not say at which machine they "
            f"meet: expected --hosts={hosts} --host=${rank} --coordinator=ADDRESS:PORT, where "
            "ADDRESS is the machine of the first of them"
        )
    job = "".join(environment.get(name, "") for name in JOBS)
    place = _checked(_number(environment, rank), hosts, address, _port_of(job), launcher.name)
    return place if here == 1 else _with_one_device(place, environment, launcher.local_rank)


def first_node(nodes: str) -> str:
    """The first host of SLURM's short list: node[007-012,020],other3 begins with node007."""
    match = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodes)
    if match is None:
        raise InputError(f"SLURM_STEP_NODELIST: expected names of nodes, found {nodes!r}")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", match.group())


def _from_tpu(environment: Mapping[str, str]) -> ProcessInfo | None:
    """A worker of a TPU slice: variables on Kubernetes, the metadata server elsewhere."""
    names = environment.get("TPU_WORKER_HOSTNAMES", "")
    if names and environment.get("TPU_WORKER_ID", ""):
        workers = names.split(",")
        worker = _number(environment, "TPU_WORKER_ID")
        source = "TPU_WORKER_HOSTNAMES"
        return _in_slices(worker, len(workers), workers[0], environment, source)
    if not any(device.exists() for device in TPU_DEVICES):
        return None
    worker = _metadata("agent-worker-number")
    # Each entry is name:number:address, or an address.
    endpoints = _metadata("worker-network-endpoints").split(",")
    if not worker.isdecimal() or not endpoints[0]:
        return None
    address = endpoints[0].split(":")[-1]
    # Lines of NAME: 'value'.
    lines = (line.partition(":") for line in _metadata("tpu-env").splitlines())
    attributes = {name.strip(): value.strip().strip("'") for name, _, value in lines}
    attributes.update((name, environment[name]) for name in SLICES if name in environment)
    return _in_slices(int(worker), len(endpoints), address, attributes, "the TPU's metadata")


def _in_slices(
    worker: int, workers: int, address: str, environment: Mapping[str, str], source: str
) -> ProcessInfo:
    """A worker of a slice among all workers of all slices, where there are several: the slices are
    numbered, and the first worker of the first one coordinates.
    """
    slices = _number(environment, "MEGASCALE_NUM_SLICES", 1)
    if slices == 1:
        return _checked(worker, workers, address, PORT, source)
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0]
    if not first:
        raise InputError(
            f"MEGASCALE_NUM_SLICES={slices}: expected MEGASCALE_COORDINATOR_ADDRESS, the first "
            "worker of the first slice, and MEGASCALE_SLICE_ID with it"
        )
    number = _number(environment, "MEGASCALE_SLICE_ID")
    place = (worker + number * workers, slices * workers, first, PORT)
    return _checked(*place, f"{source}, {slices} slices")


def _metadata(name: str) -> str:
    """An attribute of this virtual machine, or nothing."""
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_TIMEOUT) as answer:
            return answer.read().decode().strip()
    except (urllib.error.URLError, OSError, ValueError):
        return ""


def unseen_gpus(platform: str) -> str | None:
    """Warns where JAX computes on the CPU of a machine with GPUs; None where it does not, or was
    told to.
    """
    gpus = len(list(GPU_DEVICES.glob("nvidia[0-9]*")))
    if platform != "cpu" or not gpus or "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        return None
    return (
        f"{gpus} GPU{'' if gpus == 1 else 's'} here, but JAX sees none and computes on the CPU: "
        "launch/setup.sh installs JAX for them, or pip install 'jax[cuda12]' (jax[cuda13] for "
        "drivers from 580 on)"
    )
