"""The thread that keeps one child of the supervisor running: it starts the child, watches it, and starts it again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fluxvae.serve.supervisor.services import Service
from fluxvae.serve.triton.ports import PortTakenError
from fluxvae.serve.triton.server import TritonServerError

__all__ = ["Keeper"]

_TICK_S = 0.1
_WATCH_S = 0.25
"""After how many seconds at most the order to stop is noticed. The end of the child is noticed at once where the kernel
can announce it (see `processes.Deaths`), and otherwise as late as this."""
_LOOK_EVERY_S = 1.0
"""Seconds between two looks for troubles other than the child's end, such as that it no longer answers. Looking more
often would cost an idle server a noticeable part of a core."""
_DELAYS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before the restart after the first failure, the second, and so on; the last value serves all later ones."""
_PORT_DELAY_S = 1.0
"""Seconds before the next try, at least, where another program has the child's port."""
_STEADY_S = 60.0
"""A child that served for this many seconds is steady: its earlier failures no longer lengthen the delay."""


class Keeper:
    """Keeps one child running, in a thread.

    A child that fails at its first start is not started again, and `failure` says why; only a port that another program
    has taken is waited for. Later, whatever goes wrong is reported, the child is killed, and it is started again after
    a delay that grows with each failure.

    Args:
        service: the child.
        stop: the event that ends the thread. Whoever sets it must then stop the child.
        report: is called with lines for people to read.
        ready_timeout_s: how long the child may take until it serves, at each start; also how long a port is waited for
            that another program has taken.
    """

    def __init__(
        self, service: Service, stop: threading.Event, report: Callable[[str], None], ready_timeout_s: float
    ) -> None:
        self.service = service
        self.serving = threading.Event()
        """Set while the child serves, as far as is known."""
        self.failure: Exception | None = None
        """The reason why the child could not be started the first time, or can no longer be kept running."""
        self._stop = stop
        self._report = report
        self._ready_timeout_s = ready_timeout_s
        self._thread = threading.Thread(target=self._run, name=service.name, daemon=True)

    def start(self) -> None:
        """Start the thread, which starts the child."""
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended, which it does after the event ``stop`` was set."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._keep()
        except Exception as error:  # kept for the thread that waits for this child or tends it, which raises it
            self.failure = error

    def _keep(self) -> None:
        failures, started_once = 0, False
        wait_until: float | None = None  # when to give up waiting for a port that another program has taken
        while not self._stop.is_set():
            launched = time.monotonic()
            try:
                if not self._start():
                    return
                if started_once:
                    self._report(f"{self.service.name}: back in service after {time.monotonic() - launched:.1f} s")
                started_once, wait_until = True, None
                since = time.monotonic()
                self.serving.set()
                reason = self._watch()
                if reason is None:
                    return
                failures = 0 if time.monotonic() - since > _STEADY_S else failures
            except PortTakenError as error:
                wait_until = wait_until or launched + self._ready_timeout_s
                if time.monotonic() >= wait_until:
                    raise TritonServerError(f"{error} (it was waited for as long as --ready-timeout allows)") from error
                reason = str(error)
            except Exception as error:
                if not started_once:
                    raise
                reason = str(error)
            self.serving.clear()
            delay = _DELAYS_S[min(failures, len(_DELAYS_S) - 1)]
            if wait_until is not None:
                delay = min(max(delay, _PORT_DELAY_S), max(wait_until - time.monotonic(), 0.0))
            failures += 1
            self._report(f"{self.service.name}: {reason}; restarting{f' in {delay:.3g} s' if delay else ''}")
            self.service.stop(lambda: True)
            self._stop.wait(delay)

    def _start(self) -> bool:
        """Launch the child and wait until it serves. Return False where the order to stop came first."""
        self.service.launch()
        deadline = time.monotonic() + self._ready_timeout_s
        while not self.service.started():
            if self._stop.wait(_TICK_S):
                return False
            if time.monotonic() > deadline:
                raise TritonServerError(
                    f"{self.service.name} was not ready within {self._ready_timeout_s:g} s; allow more with "
                    "--ready-timeout"
                )
        return True

    def _watch(self) -> str | None:
        """Watch the child that serves, and return what is wrong with it; None once the order to stop has come."""
        look_at = 0.0
        while not self._stop.is_set():
            if not self.service.wait_for_end(_WATCH_S) and time.monotonic() < look_at:
                continue
            look_at = time.monotonic() + _LOOK_EVERY_S
            if reason := self.service.trouble():
                return reason
            if notice := self.service.notice():
                self._report(f"{self.service.name}: {notice}")
        return None
