"""Hosts find each other before JAX does, and notice when one is gone.

jax.distributed alone aborts the process, without a name, where a peer does not come or dies, and a
collective waits for ever (docs/decisions/0010-hosts.md). So the hosts meet here first, over plain
TCP; each keeps its line to host 0 open, and what is said or breaks on it ends the run in words.

One JSON object a line: a host says hello; host 0 answers go, or what is missing or wrong. Then each
end says alive now and then, host 0 passes on who is lost, and who is done says bye.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from proteus_jax.errors import InputError, Interrupted
from proteus_jax.runtime.cluster_env import ProcessInfo
from proteus_jax.runtime.peer_line import Line

ALIVE_EVERY = 5.0
# A host that says nothing for so long is lost: a machine that vanishes closes no connection.
SILENCE = 60.0
# How long a process may take to end by itself where a peer stopped, perhaps for the same reason.
# Not longer: JAX aborts the process soon after its coordinator, host 0, is gone.
GRACE = 1.0
HELLO_TIMEOUT = 5.0
# How long the others may take to hear that this host leaves.
PARTING = 2.0


class _Peer(NamedTuple):
    host: int
    name: str
    line: Line

    def __str__(self) -> str:
        return f"host {self.host} ({self.name})"


class ProcessGroup:
    """The hosts of a run, met; watched until `leave`."""

    def __init__(self, peers: list[_Peer], own: str, say: Callable[[str], None]):
        self._peers, self._own, self._say = peers, own, say
        # How far this host's loop is, and the others' when they last said so.
        self.step = 0
        self._steps = {str(peer): 0 for peer in peers}
        # With which this process ends where another is lost.
        self.exit_code = Interrupted.EXIT_CODE
        self._leaving = threading.Event()
        self._news = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._watch, args=(peer,), daemon=True) for peer in peers
        ]
        self._threads.append(threading.Thread(target=self._say_alive, daemon=True))
        for thread in self._threads:
            thread.start()

    def leave(self, reason: str | None = None, code: int = Interrupted.EXIT_CODE) -> None:
        """Says goodbye; with a reason, that this host failed, and with which exit code."""
        self._leaving.set()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                if reason is None:
                    peer.line.say(bye=True)
                else:
                    peer.line.say(lost=f"{self._own} stopped: {reason}", code=code)
            peer.line.finish()
        for thread in self._threads:
            thread.join(PARTING)
        for peer in self._peers:
            peer.line.close()

    def steps(self, step: int) -> dict[str, int]:
        """How far each host's loop is, as far as this one knows: host 0 knows of all. `step` is its
        own.
        """
        self.step = step
        return {self._own: step, **self._steps}

    def lost_one(self, wait: float) -> bool:
        """True where another host is lost, or is found to be within `wait` seconds."""
        return self._news.wait(wait)

    def _watch(self, peer: _Peer) -> None:
        reason, grace, code = f"{peer} is gone", 0.0, Interrupted.EXIT_CODE
        heard = time.monotonic()
        while True:
            try:
                message = peer.line.hear(1.0)
            except TimeoutError:
                if self._leaving.is_set():
                    return
                if time.monotonic() - heard > SILENCE:
                    reason = f"{peer} has said nothing for {SILENCE:.0f} s"
                    break
                continue
            except (OSError, ValueError):
                break
            heard = time.monotonic()
            if message is None:
                break
            if isinstance(message.get("alive"), int):
                self._steps[str(peer)] = message["alive"]
            if "bye" in message:
                # Read to the end on both sides: a reset would take unread words with it.
                peer.line.finish()
                return
            if "lost" in message:
                reason, grace = str(message["lost"]), GRACE
                code = int(message.get("code", code))
                break
        if not self._leaving.is_set():
            self._end(reason, grace, code)

    def _end(self, reason: str, grace: float, code: int) -> None:
        """Tells everybody, and ends this process if it does not end by itself."""
        with self._lock:
            if self._news.is_set():
                return
            self.exit_code = code
            self._news.set()
        later = ""
        if code == Interrupted.EXIT_CODE:
            later = ", the same command goes on from its last checkpoint"
        self._say(f"{reason}; this run ends{later}")
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.line.say(lost=reason, code=code)
            peer.line.finish()
        time.sleep(grace)
        # The main thread may wait in a collective that never ends.
        os._exit(code)

    def _say_alive(self) -> None:
        while not self._leaving.wait(ALIVE_EVERY):
            for peer in self._peers:
                with contextlib.suppress(OSError):
                    peer.line.say(alive=self.step)


def rendezvous(
    place: ProcessInfo, about: Mapping[str, str], *, timeout: float, say: Callable[[str], None]
) -> ProcessGroup:
    """Returns when all hosts are there and agree on `about` (what each of them runs).

    Interrupted, with who came and who did not, after `timeout` seconds; InputError where they
    disagree.
    """
    own = f"host {place.host} ({socket.gethostname()})"
    if place.host == 0:
        return ProcessGroup(_receive(place, about, timeout), own, say)
    return ProcessGroup([_join(place, about, timeout)], own, say)


def _receive(place: ProcessInfo, about: Mapping[str, str], timeout: float) -> list[_Peer]:
    """Host 0: takes in the others."""
    deadline = time.monotonic() + timeout
    server = _listen(place, deadline)
    peers: dict[int, _Peer] = {}
    with server:
        while len(peers) < place.hosts - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                reason = _who_came(place, peers, timeout)
                _refuse(peers.values(), missing=reason)
                raise Interrupted(reason) from None
            line = Line(connection)
            try:
                hello, peer = _greet(line)
            except (OSError, ValueError, KeyError, TypeError):
                # Not one of ours.
                line.close()
                continue
            problem = _disagreement(place, hello, about, peer)
            if problem is None and peer.host in peers and not peers[peer.host].line.broken():
                problem = f"{peer} and {peers[peer.host]} have the same number"
            if problem is not None:
                _refuse([*peers.values(), peer], wrong=problem)
                raise InputError(problem)
            before, peers[peer.host] = peers.get(peer.host), peer
            if before is not None:
                before.line.close()
    for peer in peers.values():
        # Who is gone by now is noticed by who watches it.
        with contextlib.suppress(OSError):
            peer.line.say(go=True)
    return [peers[host] for host in sorted(peers)]


def _listen(place: ProcessInfo, deadline: float) -> socket.socket:
    """A port that the run before this one still holds is waited for."""
    while True:
        try:
            return socket.create_server(("", place.port + 1), backlog=place.hosts)
        except OSError as error:
            if time.monotonic() > deadline:
                raise Interrupted(
                    f"port {place.port + 1} of this host cannot be listened on: {error.strerror}"
                ) from None
            time.sleep(0.5)


def _greet(line: Line) -> tuple[dict[str, Any], _Peer]:
    hello = line.hear(HELLO_TIMEOUT)
    if hello is None:
        raise ValueError("nothing said")
    if not isinstance(hello["hosts"], int) or not isinstance(hello["about"], dict):
        raise ValueError("no hello")
    return hello, _Peer(int(hello["host"]), str(hello["name"]), line)


def _disagreement(
    place: ProcessInfo, hello: dict[str, Any], about: Mapping[str, str], peer: _Peer
) -> str | None:
    if hello["hosts"] != place.hosts or not 0 < peer.host < place.hosts:
        return (
            f"{peer}: expected one of {place.hosts} hosts, found number {peer.host} of "
            f"{hello['hosts']}"
        )
    for key, value in about.items():
        if hello["about"].get(key) != value:
            return (
                f"{peer} runs something else: its {key} is {hello['about'].get(key)}, that of host "
                f"0 is {value}"
            )
    return None


def _who_came(place: ProcessInfo, peers: Mapping[int, _Peer], timeout: float) -> str:
    came = ["host 0 (this one)" if not peers else "host 0"]
    came += [str(peers[host]) for host in sorted(peers)]
    missing = [str(host) for host in range(1, place.hosts) if host not in peers]
    return (
        f"after {timeout:.0f} s {len(came)} of {place.hosts} hosts are here: {', '.join(came)}; "
        f"missing: {', '.join(missing)}"
    )


def _refuse(peers: Iterable[_Peer], **reason: str) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.line.say(**reason)
        peer.line.close()


def _join(place: ProcessInfo, about: Mapping[str, str], timeout: float) -> _Peer:
    """The others: find host 0 and wait for its word."""
    deadline = time.monotonic() + timeout
    reason = "no answer"
    where = f"host 0 at {place.address}:{place.port + 1}"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((place.address, place.port + 1), timeout=5.0)
        except OSError as error:
            reason = str(error)
            time.sleep(0.5)
            continue
        line = Line(connection)
        try:
            name = socket.gethostname()
            line.say(host=place.host, hosts=place.hosts, name=name, about=dict(about))
            # Host 0 has its own clock: its word on who is missing should come before ours.
            answer = line.hear(max(deadline - time.monotonic(), 1.0) + 10.0)
        except (OSError, ValueError) as error:
            reason = str(error)
            line.close()
            continue
        if answer is None:
            reason = "it hung up"
            line.close()
            time.sleep(0.5)
            continue
        if "go" in answer:
            return _Peer(0, place.address, line)
        line.close()
        if "wrong" in answer:
            raise InputError(str(answer["wrong"]))
        raise Interrupted(str(answer.get("missing", answer)))
    raise Interrupted(
        f"after {timeout:.0f} s {where} is not here ({reason}); this is host {place.host} of "
        f"{place.hosts}"
    )
