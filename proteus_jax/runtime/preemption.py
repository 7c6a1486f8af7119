"""A request to stop: SIGTERM and its like, heard while a step runs."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable

from proteus_jax.errors import Interrupted
from proteus_jax.runtime.process import REQUESTS


class PreemptionHandler:
    """A signal of REQUESTS, where not ignored (as by nohup), asks for an end after this step; a
    second one, later than REPEATED seconds, does not wait for it, and nor does this process longer
    than `deadline` seconds: it ends with 75. So it does at once until `waits` is set, as before the
    first step, which may compile for minutes: there is nothing to save.

    A thread hears of them. Python's own handlers wait for the main thread, which may be compiling,
    or waiting for a host that is lost.
    """

    # Beside the numbers of signals, to the thread.
    GOODBYE = b"\0"
    # In seconds: a signal to a group comes a second time from a script that passes it on.
    REPEATED = 0.5
    # Seconds until it ends whether or not what it says is read.
    UNREAD = 2.0

    def __init__(
        self,
        deadline: float,
        say: Callable[[str], None],
        before_end: Callable[[], None] = lambda: None,
    ):
        self.requested = self.waits = False
        self._deadline, self._say, self._before_end = deadline, say, before_end

    def __enter__(self) -> "PreemptionHandler":
        self._ears, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        # The number of each signal is written there the moment that it comes.
        self._wakeup_before = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, lambda *_: None)
            for number in REQUESTS
            if signal.getsignal(number) != signal.SIG_IGN
        }
        self._thread = threading.Thread(target=self._listen, daemon=True, name="signals")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._mouth, self.GOODBYE)
        self._thread.join()
        os.close(self._mouth)
        os.close(self._ears)

    def _listen(self) -> None:
        if self._hears_one(None):
            self.requested, heard = True, time.monotonic()
            if not self.waits:
                self._end("interrupted before a step was made; the same command goes on")
            # Not here: where nobody reads, this thread must not wait.
            words = "asked to stop: the run saves after this step; once more ends it at once"
            threading.Thread(target=self._say, args=(words,), daemon=True).start()
            again = self._hears_one(heard + self._deadline)
            while again and time.monotonic() < heard + self.REPEATED:
                again = self._hears_one(heard + self._deadline)
            if again is not False:
                reason = "a second request to stop"
                if not again:
                    reason = (
                        f"not saved within {self._deadline:g} s of the request to stop "
                        "(--config.preemption_timeout_s)"
                    )
                self._end(f"{reason}; the same command goes on from the last checkpoint")

    def _hears_one(self, until: float | None) -> bool | None:
        """True for a request; False for goodbye; None where neither came in time."""
        poll = select.poll()
        poll.register(self._ears, select.POLLIN)
        while True:
            left = None if until is None else max(until - time.monotonic(), 0.0) * 1000
            if not poll.poll(left):
                return None
            heard = os.read(self._ears, 1)
            if heard == self.GOODBYE:
                return False
            # Other signals may have handlers of theirs.
            if heard[0] in REQUESTS:
                return True

    def _end(self, words: str) -> None:
        code = Interrupted.EXIT_CODE
        timer = threading.Timer(self.UNREAD, os._exit, [code])
        timer.daemon = True
        timer.start()
        try:
            self._say(words)
            self._before_end()
        finally:
            os._exit(code)
