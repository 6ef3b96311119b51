"""What ``/proc`` tells about processes, without a dependency. Linux only, as Triton is."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "Deaths",
    "Process",
    "command_line",
    "cpu_seconds",
    "exited",
    "how_it_ended",
    "in_group",
    "is_running",
    "listens",
    "until",
]

_POLL_S = 0.05
_LISTENING = "0A"  # TCP_LISTEN of the kernel's tcp_states.h
_TICKS = os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """One process; ``started`` tells it from a later one with the same id."""

    pid: int
    started: int
    cpu_s: float
    """Processor time of all its threads so far."""


def exited(pid: int) -> int | None:
    """The exit status of our child if it has ended, negative for a signal; not reaped, so its id stays taken."""
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def how_it_ended(status: int | None) -> str:
    """An exit status for people."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"ended with exit status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


def in_group(group: int) -> list[Process]:
    """The processes of a group that still run. Orphans that ended may wait long for process 1 to reap them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields is not None and int(fields[2]) == group:
            found.append(_process(int(folder.name), fields))
    return found


def is_running(process: Process) -> bool:
    """Whether this very process still runs."""
    fields = _stat(process.pid)
    return fields is not None and int(fields[19]) == process.started


def listens(pid: int, port: int) -> bool:
    """Whether it is this process that takes connections on a port, rather than another program that has it.

    True as well where the kernel does not let us look into the process: then it cannot be told.
    """
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # no IPv6 here
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed while we looked
                if os.readlink(f"/proc/{pid}/fd/{descriptor}") in sockets:
                    return True
    except PermissionError:
        return True
    except OSError:  # it ended while we looked
        return False
    return False


class Deaths:
    """Tells at once, and for almost nothing, that one of some processes has ended: by the kernel's own word.

    Args:
        pids: of processes that run, or ended and were not waited for; also those that are not our children.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._descriptors: list[int] = []
        self._poll: select.poll | None = select.poll()
        try:
            for pid in pids:
                self._descriptors.append(os.pidfd_open(pid))
                self._poll.register(self._descriptors[-1], select.POLLIN)
        except OSError:  # it is gone already; or the kernel has no such thing (before Linux 5.3)
            self.close()

    def wait(self, timeout_s: float) -> bool:
        """Wait for one; whether there was one, or it cannot be told in this way. Then this takes no less time."""
        if self._poll is None:
            time.sleep(timeout_s)
            return True
        return bool(self._poll.poll(timeout_s * 1000))

    def close(self) -> None:
        """Give the descriptors back; from now on it cannot be told."""
        self._poll = None
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def command_line(pid: int) -> str:
    """Its arguments, with spaces between; empty where it ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def cpu_seconds(process: Process) -> float:
    """Processor time it has had by now; what it was last known to have, once it is gone."""
    fields = _stat(process.pid)
    if fields is None or int(fields[19]) != process.started:
        return process.cpu_s
    return _process(process.pid, fields).cpu_s


def until(timeout_s: float) -> Iterator[None]:
    """Yield at short intervals until the time is up."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(_POLL_S)


def _process(pid: int, fields: list[str]) -> Process:
    return Process(pid, int(fields[19]), (int(fields[11]) + int(fields[12])) / _TICKS)


def _stat(pid: int) -> list[str] | None:
    """``/proc/PID/stat`` after the name: state, parent, group, ...; None where it ended."""
    with contextlib.suppress(OSError):  # it ended while we looked
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        if fields and fields[0] not in "ZX":
            return fields
    return None
