"""Where outputs go: a folder, or any URL that fsspec can write to. A file there is whole, or it is not there at all.

On this machine a file is written under a temporary name, synced to the disk, and renamed. In an object store an object
appears only once it is complete. On other remote filesystems a file is written under a temporary name and then moved.

A temporary name, ``.<hash>.<job>.<host>.<pid>.<start>.fluxvae-part``, says which job and which process writes the file.
So what processes left that are dead can be told from what is being written, and only that is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import unicodedata
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from fsspec.implementations.local import LocalFileSystem

from fluxvae.batch.names import windows_problem
from fluxvae.batch.sources import filesystem_of
from fluxvae.errors import InvalidLatentsError
from fluxvae.system import names_ignore_case, process_start

__all__ = ["LocalStore", "RemoteStore", "Store", "open_store"]

_PART = re.compile(r"\.[0-9a-f]{16}\.(?P<job>\w+)\.(?P<host>\w+)\.(?P<pid>\d+)\.(?P<start>\d+)\.fluxvae-part")
_WINDOWS = os.name == "nt"
_WHOLE_OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "r2"}
"""fsspec's protocols of object stores, which never show a part of an object."""


class Store(Protocol):
    """An output folder. Its files are named by their paths relative to it, with ``/`` between folders."""

    root: str
    """The folder's path or URL."""

    def existing(self) -> set[str]:
        """Return the names of all files in the folder but temporary ones."""

    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""

    def url_of(self, name: str) -> str:
        """Return the path or URL of a file, as `sources.find` writes those of inputs."""

    def key(self, name: str) -> str:
        """See `names.Naming`."""

    def check(self, name: str) -> None:
        """See `names.Naming`."""

    def read(self, name: str) -> bytes | None:
        """Read a whole file; None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write one file, whole or not at all. A file of this name is replaced.

        Raises:
            OSError: the file could not be written, and nothing of it is left.
        """

    def remove(self, name: str) -> None:
        """Remove one file if there is one of this name."""

    def clean(self) -> int:
        """Remove the temporary files of this job, and those of processes of this machine that no longer run.

        Returns:
            How many files were removed.
        """


def open_store(url: str, job: str) -> Store:
    """Return the output folder at a path or URL. It need not exist: it is made when the first file is written.

    Args:
        url: the path or URL.
        job: letters and digits that distinguish this job from others, for the names of its temporary files.

    Raises:
        InvalidOptionError: fsspec cannot open the URL.
    """
    filesystem, path = filesystem_of(url)
    return (
        LocalStore(Path(path), job) if isinstance(filesystem, LocalFileSystem) else RemoteStore(filesystem, path, job)
    )


class LocalStore:
    """An output folder on this machine; see `Store`."""

    def __init__(self, root: Path, job: str) -> None:
        self.root = str(root)
        self._path, self._job = root, job

    def existing(self) -> set[str]:
        return {path for path in self._walk() if not _PART.fullmatch(path.rpartition("/")[2])}

    def exists(self, name: str) -> bool:
        return (self._path / name).is_file()

    def url_of(self, name: str) -> str:
        return (self._path / name).as_posix()

    def key(self, name: str) -> str:
        # Folders that ignore case also take an accent for the same whether it is part of its letter or follows it.
        return unicodedata.normalize("NFC", name).casefold() if self._ignores_case else name

    @cached_property
    def _ignores_case(self) -> bool:
        return names_ignore_case(self._path)

    def check(self, name: str) -> None:
        problem = windows_problem(name) if _WINDOWS else None
        if problem is not None:
            raise InvalidLatentsError(f"name: got {name[:80]!r}: {problem}; rename it in the source")

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
    """An output folder in one of fsspec's filesystems; see `Store`."""

    def __init__(self, filesystem: Any, path: str, job: str) -> None:
        self.root = str(filesystem.unstrip_protocol(path))
        self._fs, self._path, self._job = filesystem, path.rstrip("/"), job
        protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
        self._whole_objects = bool(protocols & _WHOLE_OBJECTS)

    def existing(self) -> set[str]:
        return {path for path in self._find() if not _PART.fullmatch(path.rpartition("/")[2])}

    def exists(self, name: str) -> bool:
        return bool(self._fs.isfile(f"{self._path}/{name}"))

    def url_of(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def key(self, name: str) -> str:
        return name

    def check(self, name: str) -> None:
        pass

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
    """Return the temporary name under which this process writes the file ``name``.

    It holds a hash instead of the name, so that it is no longer for a long name and never too long for the filesystem.
    """
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f".{digest}.{job}.{_host()}.{os.getpid()}.{process_start(os.getpid()) or 0}.fluxvae-part"


def _host() -> str:
    """Return a short hash of this machine's name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_dead(host: str, pid: str, start: str) -> bool:
    """Return whether a process of this machine has surely ended.

    It has where no process has its number, or one that started at another time. Where the system does not tell when
    processes started, or (Windows) whether there is one, files of other jobs stay.
    """
    started = process_start(int(pid))
    return host == _host() and (started is None or (started != 0 and str(started) != start))
