"""From one process to many: meet, start JAX on all hosts, and end without hanging."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

import jax

from proteus_jax.errors import DEFECT, InputError, exit_code
from proteus_jax.runtime.cluster_env import ProcessInfo
from proteus_jax.runtime.rendezvous import GRACE, ProcessGroup, rendezvous

# A failed collective is often the first sign of a lost host; its name follows.
NEWS_TIMEOUT = 15.0
# What C may call has to live as long as the process.
_HANDLERS: list[object] = []


@contextlib.contextmanager
def initialize_distributed(
    place: ProcessInfo,
    about: Mapping[str, str],
    *,
    timeout: float,
    progress: Callable[[str], None],
    say: Callable[[str], None],
) -> Iterator[ProcessGroup | None]:
    """The block runs once all hosts have met and JAX knows them, and is given their company; alone
    it just runs.

    `progress` tells what is waited for, `say` of a host that is lost meanwhile: this process then
    ends with the exit code of the one that failed, or 75 where that is gone without a word.
    Interrupted where not all hosts came within `timeout` seconds.
    """
    if place.hosts == 1:
        _start_devices()
        yield None
        return
    if place.host == 0:
        progress(f"waiting for {place.hosts} hosts to meet here, at port {place.port + 1}")
    group = rendezvous(place, about, timeout=timeout, say=say)
    try:
        with _exit_in_place_of_abort(group):
            # It would take SIGTERM from us and keep it to itself.
            jax.config.update("jax_enable_preemption_service", False)
            jax.distributed.initialize(
                f"{place.address}:{place.port}",
                num_processes=place.hosts,
                process_id=place.host,
                local_device_ids=place.local_devices,
                # JAX's own detection would take one device of each node under SLURM.
                cluster_detection_method="deactivate",
            )
            _start_devices()
            _refuse_uneven_hosts()
            yield group
            jax.distributed.shutdown()
    except BaseException as error:
        # What ends one host ends all of them, with the same code: a launcher must not start them
        # again where that would be the same.
        code = exit_code(error)
        if code == DEFECT and group.lost_one(NEWS_TIMEOUT):
            # The company says who, and ends this process.
            threading.Event().wait(2 * GRACE)
        group.leave(str(error).strip().partition("\n")[0] or type(error).__name__, code)
        raise
    group.leave()


def _start_devices() -> None:
    """InputError where JAX cannot start the devices that are asked for, or that are in use."""
    try:
        jax.devices()
    except Exception as error:
        platform = os.environ.get("JAX_PLATFORMS", "")
        what = f"JAX_PLATFORMS={platform}" if platform else "the devices of this machine"
        reason = (str(error).strip().splitlines() or ["its plugin is not installed"])[0][:300]
        raise InputError(
            f"{what}: JAX cannot start it ({reason}); launch/setup.sh installs JAX for the devices "
            "that are here, and JAX_PLATFORMS=cpu does without them"
        ) from None


def _refuse_uneven_hosts() -> None:
    """InputError, on all hosts alike, where they do not have as many devices of one kind."""
    kinds_by_host: dict[int, list[str]] = {}
    for device in jax.devices():
        kinds_by_host.setdefault(device.process_index, []).append(device.device_kind)
    if len({tuple(kinds) for kinds in kinds_by_host.values()}) > 1:
        counts = [
            f"host {n}: {len(kinds)} {kinds[0]}" for n, kinds in sorted(kinds_by_host.items())
        ]
        raise InputError(
            f"expected as many devices of one kind on each host, found {', '.join(counts)}"
        )


@contextlib.contextmanager
def _exit_in_place_of_abort(group: ProcessGroup) -> Iterator[None]:
    """JAX's client aborts the process when its coordinator is gone, perhaps before we have said so.

    abort() calls the handler of SIGABRT on the thread that it runs on, outside Python: there it can
    wait for the news of a lost host and exit as that does. Without news the abort goes on.
    """

    def exit_with_news(_: int) -> None:
        if group.lost_one(NEWS_TIMEOUT):
            os._exit(group.exit_code)

    library, handler = ctypes.CDLL(None), ctypes.CFUNCTYPE(None, ctypes.c_int)(exit_with_news)
    library.signal(signal.SIGABRT, handler)
    _HANDLERS.append(handler)
    # Not in a finally: on the way out of a failure this process may be aborted as well, and shall
    # have the time to say what it failed of.
    yield
    library.signal(signal.SIGABRT, None)


def end_at_once_if_several(code: int) -> None:
    """After a failure on one of several hosts: JAX would wait for the others when Python ends."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
