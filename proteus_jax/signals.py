"""Signals by which a person or a scheduler asks a process to end."""

import signal

# From the keyboard, from a scheduler, from a connection that is lost; SLURM's --signal and submitit
# send the last two before they take a job's machines away.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
REQUESTS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
