"""A connection between two hosts that carries lines of JSON."""

import contextlib
import json
import socket
import threading
from typing import Any

LONGEST_LINE = 65536


class Line:
    """Messages over one connection."""

    def __init__(self, connection: socket.socket):
        self._connection, self._rest = connection, b""
        self._sending = threading.Lock()

    def say(self, **message: Any) -> None:
        """OSError where the other end is gone."""
        with self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def hear(self, timeout: float) -> dict[str, Any] | None:
        """The next message; None where the other end is gone. TimeoutError, ValueError."""
        self._connection.settimeout(timeout)
        while b"\n" not in self._rest:
            received = self._connection.recv(4096)
            if not received:
                return None
            self._rest += received
            if len(self._rest) > LONGEST_LINE:
                raise ValueError("no message")
        line, _, self._rest = self._rest.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("no message")
        return message

    def broken(self) -> bool:
        """True where the other end is known to be gone."""
        try:
            return not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def finish(self) -> None:
        """No more will be said; the other end may still be heard."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Ends the connection; whoever waits on the other side hears of it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
