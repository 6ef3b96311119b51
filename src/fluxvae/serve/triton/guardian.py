"""Cleans up after a server whose starter was killed: takes away the processes, shared memory and files that are left.

    python -I -S guardian.py TAG SHM_PREFIX FOLDER < PIPE

Only the process that started the server holds the other end of the pipe. The pipe closes when that process ends, in
whatever way, SIGKILL included, and the guardian then cleans up. It finds the processes to end by FLUXVAE_RUN=TAG in
their environment, which children of children inherit too. It uses the standard library only, so that it starts in
milliseconds and stays small.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN_VARIABLE = "FLUXVAE_RUN"


def start(tag: str, shm_prefix: str, folder: str) -> subprocess.Popen[bytes]:
    """Start a guardian for this process. Call `end` with it once nothing is left to take away.

    Args:
        tag: the value of ``FLUXVAE_RUN`` in the environment of all processes that are to be ended.
        shm_prefix: how the names of the shared-memory regions begin that are to be removed.
        folder: the folder that is to be removed.

    Returns:
        The guardian's process.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, tag, shm_prefix, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def end(guardian: subprocess.Popen[bytes]) -> None:
    """End a guardian: closing its pipe lets it clean up what there may still be, and end."""
    assert guardian.stdin is not None
    guardian.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        guardian.wait(10)


def main(tag: str, shm_prefix: str, folder: str) -> None:
    """Wait until the process that started the server has ended, then clean up. After a clean stop nothing is left."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the other process acts on them, and ends
        signal.signal(ignored, signal.SIG_IGN)
    sys.stdin.buffer.read()
    mark = f"{RUN_VARIABLE}={tag}".encode()
    nothing = 0
    while nothing < 3:  # a process that was not seen in one look may just have been started by another that was
        found = _marked(mark)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        nothing = 0 if found else nothing + 1
        time.sleep(0.05)
    for region in Path("/dev/shm").glob(f"{shm_prefix}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(mark: bytes) -> list[int]:
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # the process is another user's, or ended while we looked
            if mark in environ.read_bytes().split(b"\0"):  # the environment of an ended process is empty
                found.append(int(environ.parent.name))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
