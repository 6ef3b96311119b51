"""Reads from ``/proc`` what is known of processes, without a further package. Works on Linux only, as Triton does."""

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


class Process(NamedTuple):
    """A process as it was found at one time."""

    pid: int
    started: int
    """When it started, in the kernel's clock ticks. It distinguishes the process from a later one with the same id."""
    cpu_s: float
    """The processor time, in seconds, that all its threads together had used by then."""


def exited(pid: int) -> int | None:
    """Return the exit status of a child of ours if it has ended; None while it runs.

    The status is negative where a signal ended the child. The child is not reaped, so its id is not used again.
    """
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def how_it_ended(status: int | None) -> str:
    """Describe an exit status in words."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"ended with exit status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


def in_group(group: int) -> list[Process]:
    """Return the processes of a group that still run.

    Those that have ended but were not reaped are left out: process 1 may take long to reap an orphan.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields is not None and int(fields[2]) == group:
            found.append(_process(int(folder.name), fields))
    return found


def is_running(process: Process) -> bool:
    """Return whether this very process still runs, rather than a later one with its id."""
    fields = _stat(process.pid)
    return fields is not None and int(fields[19]) == process.started


def listens(pid: int, port: int) -> bool:
    """Return whether it is this process that listens on a port, rather than another program that has taken it.

    The answer is true as well where the kernel does not let us look into the process, so that it cannot be known.
    """
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # without IPv6 there is no tcp6
            for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # it was closed while we looked
                if os.readlink(f"/proc/{pid}/fd/{descriptor}") in sockets:
                    return True
    except PermissionError:
        return True
    except OSError:  # the process ended while we looked
        return False
    return False


class Deaths:
    """Waits for the end of any of several processes, which the kernel announces at once and at almost no cost.

    Args:
        pids: the ids of the processes. They need not be our children. They must run still, or not be reaped yet.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._descriptors: list[int] = []
        self._poll: select.poll | None = select.poll()
        try:
            for pid in pids:
                self._descriptors.append(os.pidfd_open(pid))
                self._poll.register(self._descriptors[-1], select.POLLIN)
        except OSError:  # the process is gone already, or the kernel has no such descriptors (before Linux 5.3)
            self.close()

    def wait(self, timeout_s: float) -> bool:
        """Wait until one of the processes has ended, or the time is up.

        Returns:
            Whether one has ended. Where the kernel cannot tell, it waits for the whole time and returns true, so that
            the caller looks for itself.
        """
        if self._poll is None:
            time.sleep(timeout_s)
            return True
        return bool(self._poll.poll(timeout_s * 1000))

    def close(self) -> None:
        """Close the descriptors. From now on `wait` cannot know of an end."""
        self._poll = None
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def command_line(pid: int) -> str:
    """Return the arguments of a process, with spaces between them; empty where the process has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def cpu_seconds(process: Process) -> float:
    """Return the processor time, in seconds, that a process has used by now, or the last known one once it is gone."""
    fields = _stat(process.pid)
    if fields is None or int(fields[19]) != process.started:
        return process.cpu_s
    return _process(process.pid, fields).cpu_s


def until(timeout_s: float) -> Iterator[None]:
    """Yield at short intervals until the time is up, for loops that wait for something. A break ends the waiting."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(_POLL_S)


def _process(pid: int, fields: list[str]) -> Process:
    return Process(pid, int(fields[19]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))


def _stat(pid: int) -> list[str] | None:
    """Return the fields of ``/proc/PID/stat`` after the name (state, parent, group, ...); None where it has ended."""
    with contextlib.suppress(OSError):  # the process ended while we looked
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        if fields and fields[0] not in "ZX":
            return fields
    return None
