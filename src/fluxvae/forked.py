"""Refuses to compute in a forked process in which PyTorch would wait for ever.

PyTorch's threads do not survive ``os.fork()``, and the first operation that wants them waits for them without end.
OpenMP keeps a team of threads for every thread that has run a parallel operation. The child of a fork inherits the
record of that team, but none of its threads. Measured with PyTorch 2.13 and its libgomp: the child hangs if, and only
if, the thread that forked had run a parallel operation before, and the same thread (which is the child's main thread)
runs another with more than one thread. After ``torch.set_num_threads(1)``, and in threads that the child starts itself,
everything works.

OpenMP cannot be asked whether the process has inherited such a team, so it is tried out, once in every forked process:
a child of the child runs one small parallel operation, which either ends at once or has to be killed. There is one case
in which this shows nothing: a main thread that has started a team of its own after the fork. A child of the child would
lack the threads of that team too, and hang although this process does not. But the threads of such a team can be seen
in ``/proc``, so that is looked at first.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from pathlib import Path

import torch

from fluxvae.errors import ForkedProcessError
from fluxvae.system import after_fork

__all__ = ["refuse_to_hang"]

_PATIENCE_S = 4.0
"""How long the trial may take, in seconds. Its operation takes less than a millisecond where it works at all."""

_FORKED_NOT_EXECUTED = 0x40
"""PF_FORKNOEXEC of Linux's ``include/linux/sched.h``, among the flags in ``/proc/self/stat``."""


def _born_by_fork() -> bool:
    """Return whether this process was forked before it imported fluxvae, so that `_after_fork` was not called."""
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:  # only Linux has this file
        return False
    return bool(int(after_name.split()[6]) & _FORKED_NOT_EXECUTED)


_untried = _born_by_fork()
_hangs = False


def _after_fork() -> None:
    global _untried, _hangs
    _untried, _hangs = True, False


after_fork(_after_fork)


def refuse_to_hang() -> None:
    """Raise an error instead of hanging. To be called before PyTorch computes anything on the CPU.

    In a process that was not forked this costs next to nothing. In one that was, the first call tries out whether
    PyTorch works (see the module), and later calls remember the result.

    Raises:
        ForkedProcessError: this is a forked process in which PyTorch's operations would wait for ever.
    """
    global _untried, _hangs
    if not (_untried or _hangs) or torch.get_num_threads() == 1:
        return
    if threading.current_thread() is not threading.main_thread():
        return  # this thread was started after the fork, so it has a team of its own
    if _untried:
        _hangs = not (_has_a_team() or _works_in_a_child())
        _untried = False
    if _hangs:
        raise ForkedProcessError(
            "fork: this process was forked from one in which PyTorch had computed with several threads; they do not "
            "survive a fork, and the next operation of PyTorch would wait for them for ever. Start the process by "
            "multiprocessing's 'spawn' (a Decoder can be pickled), or call torch.set_num_threads(1) in it before "
            "anything is loaded or decoded"
        )


def _works_in_a_child() -> bool:
    """Fork a child that runs a parallel operation, and return whether it came to an end."""
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork in a process with several threads, which is done here on purpose.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            torch.zeros(1 << 18, dtype=torch.float32, device="cpu").add_(1)
        finally:
            os._exit(0)
    deadline = time.monotonic() + _PATIENCE_S
    try:
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return False
            time.sleep(0.002)
    except ChildProcessError:  # the child has ended: SIGCHLD is ignored, or somebody else has waited for it
        pass
    return True


def _has_a_team() -> bool:
    """Return whether the main thread has run a parallel operation in this process, so that it has a team of its own.

    Where Python knows no thread but the main one, any thread of OpenMP can only belong to the main thread's team.
    """
    if threading.active_count() > 1:
        return False
    deadline = time.monotonic() + 0.2
    while True:
        waiting, running = _threads_of_openmp()
        if waiting or not running or time.monotonic() > deadline:
            return waiting > 0
        time.sleep(0.005)  # after an operation OpenMP's threads spin for a while before they wait


def _threads_of_openmp() -> tuple[int, int]:
    """Return how many threads wait inside libgomp, and how many run, of which it cannot be told whose they are.

    Both are 0 where Linux does not show it. The main thread is not counted.
    """
    waiting = running = 0
    try:
        areas = [
            [int(end, 16) for end in line.split(maxsplit=1)[0].split("-")]
            for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
            if "libgomp" in line
        ]
        for task in Path("/proc/self/task").iterdir():
            if int(task.name) == threading.main_thread().native_id:
                continue
            state = (task / "syscall").read_text(encoding="utf-8")
            if state.startswith("running"):
                running += 1
            elif any(start <= int(state.split()[-1], 16) < end for start, end in areas):
                waiting += 1
    except OSError:
        return 0, 0
    return waiting, running
