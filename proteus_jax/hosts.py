"""Which host of a run this process is: from flags, from SLURM, or from a TPU's metadata."""

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


def unseen_gpus(platform: str) -> str | None:
    """What to say where JAX computes on the CPU of a machine with GPUs; None where it does not, or
    was told to.
    """
    found = len(list(GPU_DEVICES.glob("nvidia[0-9]*")))
    if platform != "cpu" or not found or "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        return None
    return (
        f"{found} GPU{'' if found == 1 else 's'} here, but JAX sees none and computes on the CPU: "
        "launch/setup.sh installs JAX for them, or pip install 'jax[cuda12]' (jax[cuda13] for "
        "drivers from 580 on)"
    )


class Place(NamedTuple):
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


ALONE = Place(0, 1, "", 0, "this machine alone")


def find_place(flags: Mapping[str, str], environment: Mapping[str, str] | None = None) -> Place:
    """--hosts, --host and --coordinator where they are given, then SLURM, then a TPU pod; alone
    otherwise.

    InputError where flags or a launcher's variables make no sense.
    """
    environment = os.environ if environment is None else environment
    if flags:
        return _from_flags(flags)
    # A batch script that starts without srun has the job's variables, but no step's.
    step = environment.get("SLURM_STEP_NODELIST")
    if step and _number(environment, "SLURM_NTASKS", 1) > 1:
        return _from_slurm(environment)
    return _from_tpu(environment) or ALONE


def _from_flags(flags: Mapping[str, str]) -> Place:
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


def _checked(host: int, hosts: int, address: str, port: int, source: str) -> Place:
    if hosts < 1:
        raise InputError(f"{source}: expected at least 1 host, found {hosts}")
    if not 0 <= host < hosts:
        raise InputError(
            f"{source}: expected hosts numbered from 0 to {hosts - 1}, found host {host}"
        )
    return Place(host, hosts, address, port, source) if hosts > 1 else ALONE


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise InputError(f"{name}: expected a whole number, found {text!r}")
    return int(text)


def _from_slurm(environment: Mapping[str, str]) -> Place:
    """A task of an srun; the first node coordinates."""
    nodes = environment["SLURM_STEP_NODELIST"]
    # Jobs that share a node should not share a port.
    job = int(hashlib.sha256(environment.get("SLURM_JOB_ID", "").encode()).hexdigest()[:8], 16)
    place = _checked(
        _number(environment, "SLURM_PROCID"),
        _number(environment, "SLURM_NTASKS"),
        first_node(nodes),
        20000 + job % 6000 * 2,
        "SLURM",
    )
    if _number(environment, "SLURM_NTASKS") > _number(environment, "SLURM_NNODES", 1) > 0:
        # Several tasks a node: each takes the device of its number, unless SLURM has hidden all but
        # one from it.
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        if not visible or "," in visible:
            return place._replace(local_devices=(_number(environment, "SLURM_LOCALID"),))
    return place


def first_node(nodes: str) -> str:
    """The first host of SLURM's short list: node[007-012,020],other3 begins with node007."""
    found = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodes)
    if found is None:
        raise InputError(f"SLURM_STEP_NODELIST: expected names of nodes, found {nodes!r}")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", found.group())


def _from_tpu(environment: Mapping[str, str]) -> Place | None:
    """A worker of a TPU slice: variables on Kubernetes, the metadata server elsewhere."""
    names = environment.get("TPU_WORKER_HOSTNAMES", "")
    if names and environment.get("TPU_WORKER_ID", ""):
        workers = names.split(",")
        worker = _number(environment, "TPU_WORKER_ID")
        return _checked(worker, len(workers), workers[0], PORT, "TPU_WORKER_HOSTNAMES")
    if not any(device.exists() for device in TPU_DEVICES):
        return None
    worker = _metadata("agent-worker-number")
    # Each entry is name:number:address.
    endpoints = _metadata("worker-network-endpoints").split(",")
    if not worker.isdecimal() or not endpoints[0]:
        return None
    address = endpoints[0].split(":")[-1]
    return _checked(int(worker), len(endpoints), address, PORT, "the TPU's metadata")


def _metadata(name: str) -> str:
    """An attribute of this virtual machine, or nothing."""
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_TIMEOUT) as answer:
            return answer.read().decode().strip()
    except (urllib.error.URLError, OSError, ValueError):
        return ""
