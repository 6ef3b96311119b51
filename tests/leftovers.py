"""Lists what a decode must not leave behind: open files and threads."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator


def open_files() -> set[tuple[str, str]]:
    """(descriptor, what it is open on) of this process."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed the folder
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
    return found


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Fails if there are files or threads at the end that were not there at the start.

    Others may be gone by then: what earlier tests left to the garbage collector goes whenever it likes.
    """
    files, threads = open_files(), set(threading.enumerate())
    yield
    assert not open_files() - files
    assert not set(threading.enumerate()) - threads
