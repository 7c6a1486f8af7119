"""Machines by name, whether they are here or not: v5e:4x4, h100:8, or what this host has."""

import math
import re
from typing import NamedTuple

import jax

from proteus_jax.errors import InputError
from proteus_jax.models.flops import Device, known_device


class Topology(NamedTuple):
    """A number of equal devices over a number of hosts; `device` is None where it is not known."""

    name: str
    platform: str
    device: Device | None
    devices: int
    hosts: int

    @property
    def description(self) -> str:
        """A description such as "16 x TPU v5e on 4 hosts"."""
        kind = self.device.name if self.device else self.platform
        return f"{self.devices} x {kind} on {self.hosts} host{'' if self.hosts == 1 else 's'}"


# Kind, and devices of a host in the usual machine types.
_TPUS = {"v4": ("TPU v4", 4), "v5e": ("TPU v5e", 4), "v5p": ("TPU v5", 4), "v6e": ("TPU v6", 4)}
_GPUS = {
    "a100": "NVIDIA A100",
    "h100": "NVIDIA H100",
    "h200": "NVIDIA H200",
    "l4": "NVIDIA L4",
}


def named_topology(text: str) -> Topology:
    """v5e:4x4 (a TPU slice), h100:8 (GPUs of one host), h100:4x8 (hosts x GPUs).

    InputError names what is known.
    """
    name, _, shape = text.lower().partition(":")
    known = (*_TPUS, *_GPUS)
    if name not in known or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", shape):
        raise InputError(
            f"--topology: expected a kind out of {', '.join(known)} and a shape, as v5e:4x4 or "
            f"h100:8, found {text!r}"
        )
    lengths = [int(length) for length in shape.split("x")]
    devices = math.prod(lengths)
    if name in _TPUS:
        kind, each = _TPUS[name]
        return Topology(text.lower(), "tpu", known_device(kind), devices, max(1, devices // each))
    hosts = lengths[0] if len(lengths) > 1 else 1
    return Topology(text.lower(), "gpu", known_device(_GPUS[name]), devices, hosts)


def local_topology() -> Topology:
    """The devices that JAX finds on this machine."""
    kind = jax.devices()[0].device_kind
    return Topology(
        "", jax.default_backend(), known_device(kind), jax.device_count(), jax.process_count()
    )
