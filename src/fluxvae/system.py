"""What is asked of the operating system, and the other way where a system does not have it.

The library needs nothing that only POSIX or only Linux has. What only some systems have (``/proc``, ``fcntl``, ...) is
asked for here, and in `fluxvae.engine.memory` (`heap`, `pages`) and `fluxvae.forked`, whose subjects some systems have;
tests/test_systems.py keeps such names out of every other module. Triton is for Linux, so what starts and watches a
Triton server (`fluxvae.serve`) is exempt. docs/systems.md says what is known of each system.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "FreeMemory",
    "after_fork",
    "file_system",
    "free_memory",
    "give_way",
    "hold",
    "may_use_amx",
    "names_ignore_case",
    "peak_of_memory",
    "process_start",
]

_CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""The files with the limit and the use of this process's control group, in Linux's second and first version of them."""

_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA = 158, 0x1023, 18
"""The number of Linux's system call on x86-64, and of its ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA."""


# -- memory ----------------------------------------------------------------------------------------------------------


class FreeMemory(NamedTuple):
    """How much memory is free, and how that is known."""

    nbytes: int
    told_by: str
    """What the number is, for plans and messages: ``"free memory"`` where the system tells it."""


def free_memory() -> FreeMemory | None:
    """Find out how much memory is free now: of the machine, and of the control group that this process is in.

    Linux tells it in ``/proc/meminfo``, and Windows by ``GlobalMemoryStatusEx``. macOS only tells simply how much is
    built in, so half of that is taken, and `FreeMemory.told_by` says so.

    Returns:
        None where this system tells nothing of it.
    """
    found = _by_meminfo() or _by_windows() or _by_sysconf()
    if found is None:
        return None
    for limit, usage in _CONTROL_GROUPS:
        try:
            allowed, used = (
                Path(limit).read_text(encoding="ascii").strip(),
                int(Path(usage).read_text(encoding="ascii")),
            )
        except (OSError, ValueError):
            continue
        if allowed != "max" and (left := max(int(allowed) - used, 0)) < found.nbytes:
            found = FreeMemory(left, "free memory")
    return found


def _by_meminfo() -> FreeMemory | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return FreeMemory(int(line.split()[1]) * 1024, "free memory")
    except OSError:
        pass
    return None


class _MemoryStatus(ctypes.Structure):
    """``MEMORYSTATUSEX`` of Windows' ``sysinfoapi.h``."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total_physical", ctypes.c_uint64),
        ("available_physical", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    )


def _by_windows() -> FreeMemory | None:
    windll: Any = getattr(ctypes, "windll", None)
    if windll is None:
        return None
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    # Windows grants no more than it could page out, however much memory is free.
    return FreeMemory(min(status.available_physical, status.available_page_file), "free memory")


def _by_sysconf() -> FreeMemory | None:
    try:
        built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    if built_in <= 0:
        return None
    return FreeMemory(built_in // 2, "half of the memory built in, as this system does not tell what is free")


@contextlib.contextmanager
def peak_of_memory() -> Iterator[list[int]]:
    """Measure the memory, in bytes, that the process adds at its peak within the ``with`` block.

    Yields:
        A list that the peak is appended to at the end. It stays empty where the system does not tell it; only Linux
        can reset the peak that it keeps.
    """
    peak: list[int] = []
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM, the peak, to what is resident now
    except OSError:
        yield peak
        return
    before = _resident("VmRSS")
    yield peak
    peak.append(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


# -- files -----------------------------------------------------------------------------------------------------------


def file_system(folder: Path) -> str:
    """Return the type of the file system that ``folder`` is on, such as ``"tmpfs"``; "" where the system does not tell.

    Only Linux does, in ``/proc/mounts``.
    """
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    where = str(folder.resolve())
    best, kind = -1, ""
    for line in mounts:
        fields = line.split()
        if len(fields) < 3:
            continue
        escaped = fields[1].encode("utf-8", "surrogateescape").decode("unicode_escape")  # a space is written \040
        point = escaped.encode("latin-1").decode("utf-8", "surrogateescape")
        inside = point == "/" or where == point or where.startswith(point + "/")
        if inside and len(point) >= best:  # a later mount hides an earlier one
            best, kind = len(point), fields[2]
    return kind


def names_ignore_case(folder: Path) -> bool:
    """Whether names that differ only in case are one file in ``folder``, as they are on macOS and Windows as a rule.

    It is tried with a name that is there: one in the folder, or else the folder's own, or its parent's, ...
    """
    folder = folder.resolve()
    inside = folder.iterdir() if folder.is_dir() else ()
    for there in itertools.chain(inside, (folder, *folder.parents)):
        other = there.with_name(there.name.swapcase()) if there.name else there
        if there.exists() and other.name != there.name:
            return other.exists() and other.samefile(there)
    return False


def _module(name: str) -> Any:
    """A module of Python's own that only some systems have; None on the others."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_fcntl, _msvcrt = _module("fcntl"), _module("msvcrt")  # POSIX, Windows


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock that a file stands for. The file is made for it, and removed at the end.

    The lock is this process's own, another one of the same process waits as little as another process does, and it ends
    with the process, however that ends.

    Raises:
        BlockingIOError: another holds it.
        OSError: the file cannot be made, or this system has no locks that end with their process. Nothing is done then
            without a lock.
    """
    if _fcntl is not None:
        yield from _hold_by_flock(path)
    elif _msvcrt is not None:
        yield from _hold_by_locking(path)
    else:
        raise OSError("this system has neither fcntl nor msvcrt, so files cannot be locked")


def _hold_by_flock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:  # its holder removed the file between our open and our flock
            raise BlockingIOError
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is unlocked, or another could lock a file that is then removed
    finally:
        os.close(descriptor)


def _hold_by_locking(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            _msvcrt.locking(descriptor, _msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # Windows removes no file that is open, so one that another has opened stays
            path.unlink()


# -- processes -------------------------------------------------------------------------------------------------------


@functools.cache
def give_way() -> int:
    """The address of a C function without arguments that lets another thread have the core; 0: this system has none."""
    for library, name in ((None, "sched_yield"), ("kernel32", "SwitchToThread")):
        with contextlib.suppress(OSError, AttributeError, TypeError):
            return ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value or 0
    return 0


@functools.cache
def may_use_amx() -> bool:
    """Ask the system whether this process may use the registers of AMX, and tell it that it will.

    Linux gives a process these 8 kB a thread only when it is asked (``arch_prctl(2)``). How other systems are asked has
    not been tried, so the answer is no there, and where a sandbox refuses the call.
    """
    if not Path("/proc/self").exists():
        return False
    with contextlib.suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA) == 0)
    return False


def after_fork(call: Callable[[], object]) -> None:
    """Have ``call`` called in every process that is forked from this one; where there is no fork, do nothing."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


def process_start(pid: int) -> int | None:
    """Return when a process of this machine started, in clock ticks since the machine did.

    Returns:
        None where there is surely no such process; 0 where there is or may be one, and the system does not tell when it
        started. Linux tells it in ``/proc``. Other POSIX systems tell whether there is one. On Windows nothing is
        asked, since signal 0 is Ctrl-C there.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return int(after_name.split()[19])
    except PermissionError:
        return 0
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    if hasattr(signal, "CTRL_C_EVENT"):
        return 0
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0
