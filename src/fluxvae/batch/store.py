"""Where outputs go: a folder, or any URL fsspec knows. A file there is whole, or not there at all.

Locally a file is written under a temporary name, synced and renamed. Object stores put whole objects; other remote
filesystems get a temporary name and a move. A temporary name says whose it is:
``.<hash>.<job>.<host>.<pid>.<start>.fluxvae-part``; so what dead processes left can be told from what is being written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
from pathlib import Path
from typing import Any, Protocol

from fsspec.implementations.local import LocalFileSystem

from fluxvae.batch.sources import filesystem_of

__all__ = ["LocalStore", "RemoteStore", "Store", "open_store"]

_PART = re.compile(r"\.[0-9a-f]{16}\.(?P<job>\w+)\.(?P<host>\w+)\.(?P<pid>\d+)\.(?P<start>\d+)\.fluxvae-part")
_WHOLE_OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "r2"}


class Store(Protocol):
    """An output folder."""

    root: str

    def existing(self) -> set[str]:
        """Every file in it, by its path below it; temporary ones are not among them."""

    def exists(self, name: str) -> bool:
        """Is this file there?"""

    def read(self, name: str) -> bytes | None:
        """All of a file; None: there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write one file, whole or not at all; one that is there is replaced.

        Raises:
            OSError: and nothing is left of it.
        """

    def remove(self, name: str) -> None:
        """Remove one file, if it is there."""

    def clean(self) -> int:
        """Remove temporary files of this job, and those of processes of this machine that are no more; how many."""


def open_store(url: str, job: str) -> Store:
    """The store at a path or URL; it is made when something is written.

    Args:
        job: letters and digits that tell this job from others.
    """
    filesystem, path = filesystem_of(url)
    return (
        LocalStore(Path(path), job) if isinstance(filesystem, LocalFileSystem) else RemoteStore(filesystem, path, job)
    )


class LocalStore:
    """A folder."""

    def __init__(self, root: Path, job: str) -> None:
        self.root = str(root)
        self._path, self._job = root, job

    def existing(self) -> set[str]:
        return {path for path in self._walk() if not _PART.fullmatch(path.rpartition("/")[2])}

    def exists(self, name: str) -> bool:
        return (self._path / name).is_file()

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return (self._path / name).read_bytes()
        return None

    def write(self, name: str, data: bytes) -> None:
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / _part_name(name, self._job)
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def clean(self) -> int:
        removed = 0
        for path in self._walk():
            found = _PART.fullmatch(path.rpartition("/")[2])
            if found and (found["job"] == self._job or _is_dead(found["host"], found["pid"], found["start"])):
                with contextlib.suppress(OSError):
                    (self._path / path).unlink()
                    removed += 1
        return removed

    def _walk(self) -> list[str]:
        paths = []
        for folder, _, files in os.walk(self._path):
            below = Path(folder).relative_to(self._path).as_posix()
            paths += files if below == "." else [f"{below}/{file}" for file in files]
        return paths


class RemoteStore:
    """A folder in one of fsspec's filesystems."""

    def __init__(self, filesystem: Any, path: str, job: str) -> None:
        self.root = str(filesystem.unstrip_protocol(path))
        self._fs, self._path, self._job = filesystem, path.rstrip("/"), job
        protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
        self._whole_objects = bool(protocols & _WHOLE_OBJECTS)

    def existing(self) -> set[str]:
        return {path for path in self._find() if not _PART.fullmatch(path.rpartition("/")[2])}

    def exists(self, name: str) -> bool:
        return bool(self._fs.isfile(f"{self._path}/{name}"))

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return bytes(self._fs.cat_file(f"{self._path}/{name}"))
        return None

    def write(self, name: str, data: bytes) -> None:
        path = f"{self._path}/{name}"
        folder = path.rpartition("/")[0]
        self._fs.makedirs(folder, exist_ok=True)
        if self._whole_objects:
            self._fs.pipe_file(path, data)
            return
        part = f"{folder}/{_part_name(name, self._job)}"
        try:
            self._fs.pipe_file(part, data)
            self._fs.mv(part, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(part)
            raise

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._path}/{name}")

    def clean(self) -> int:
        removed = 0
        for path in self._find():
            found = _PART.fullmatch(path.rpartition("/")[2])
            if found and (found["job"] == self._job or _is_dead(found["host"], found["pid"], found["start"])):
                self.remove(path)
                removed += 1
        return removed

    def _find(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._path)
        except FileNotFoundError:
            return []
        return [path[len(self._path) :].lstrip("/") for path in found]


# -- whose a temporary file is ---------------------------------------------------------------------------------------


def _part_name(name: str, job: str) -> str:
    """Of ``name`` while it is written by this process: of one length, however long the name is."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f".{digest}.{job}.{_host()}.{os.getpid()}.{_started(os.getpid()) or 0}.fluxvae-part"


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_dead(host: str, pid: str, start: str) -> bool:
    """A process of this machine that is no more: its number is free, or another process has it."""
    return host == _host() and str(_started(int(pid))) != start


def _started(pid: int) -> int | None:
    """When a process started, in the kernel's ticks; None: there is no such process. 0 where there is no /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0
