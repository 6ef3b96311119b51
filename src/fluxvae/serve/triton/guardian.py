"""Outlives a server that was killed, to take away what it left: processes, shared memory, files.

    python -I -S guardian.py TAG SHM_PREFIX FOLDER < PIPE

Who started the server holds the pipe's other end, and nobody else does: it closes when that process ends, however that
was, SIGKILL included. What belongs to it is found by FLUXVAE_RUN=TAG in its environment, which children of
children inherit. Standard library only, so that it starts in milliseconds and stays small.
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
    """Have this process guarded; `end` it once nothing is left to take away.

    Args:
        tag: what ``FLUXVAE_RUN`` is in the environment of all that is to be ended.
        shm_prefix: of the shared memory to be removed.
        folder: to be removed.
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
    """Let a guardian go."""
    assert guardian.stdin is not None
    guardian.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        guardian.wait(10)


def main(tag: str, shm_prefix: str, folder: str) -> None:
    """Wait for the end of who started the server, then clean up; a clean stop leaves nothing to do."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are the other process's to act on
        signal.signal(ignored, signal.SIG_IGN)
    sys.stdin.buffer.read()
    mark = f"{RUN_VARIABLE}={tag}".encode()
    nothing = 0
    while nothing < 3:  # one may be starting another just now
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
        with contextlib.suppress(OSError):  # another user's, or it ended while we looked
            if mark in environ.read_bytes().split(b"\0"):  # an ended process has none
                found.append(int(environ.parent.name))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
