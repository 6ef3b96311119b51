"""Finds the files of latents that a job's inputs name, opens them, and lists the images to make from them.

Inputs are files, folders and globs, on this machine or at any URL that fsspec can open.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fluxvae.batch.formats import Source, TensorSource
from fluxvae.batch.headers import READERS
from fluxvae.batch.items import Entry, Failure, Item
from fluxvae.batch.names import Naming, output_name, stem, with_row
from fluxvae.batch.readings import Expected
from fluxvae.claims import check_pixels, is_special
from fluxvae.errors import FluxVAEError, InvalidLatentsError, InvalidOptionError
from fluxvae.extras import needs
from fluxvae.latents.checks import check_order, check_shape
from fluxvae.latents.packing import SizeFlooredWarning
from fluxvae.latents.reading import Reading

__all__ = ["Found", "Library", "Scan", "filesystem_of", "find", "scan"]

SUFFIXES = (*READERS, ".parquet")
_SCANNERS = 8
_OPEN_SOURCES = 8
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Found:
    """One file that an input names."""

    url: str
    """What fsspec opens: a path where the file is on this machine, else a URL."""
    name: str
    """The name of its output without a suffix, relative to the folder or glob by which the file was found."""


@dataclass
class Scan:
    """What a job's inputs hold, as far as their metadata tell."""

    items: list[Item] = field(default_factory=list)
    """The images to make."""
    failures: list[Failure] = field(default_factory=list)
    """The files and images that cannot be decoded, each with the reason."""
    floored: int = 0
    """How many items have a height or width that was floored to a multiple of 16, as FluxPipeline does."""
    skipped: int = 0
    """How many files are known to hold no latents, such as what text encoders gave, which trainers keep beside
    latents."""


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return fsspec's filesystem for a URL or path, and the path within it.

    Raises:
        InvalidOptionError: fsspec does not know the protocol, or the package that it needs for it is missing.
    """
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise InvalidOptionError(f"{url}: cannot be opened by fsspec: {error}") from error
    return filesystem, path


def find(inputs: Sequence[str], suffixes: tuple[str, ...] = SUFFIXES, what: str = "latents") -> list[Found]:
    """Find the files that the inputs name, in a fixed order and each of them once.

    Args:
        inputs: files, folders (with all folders below them) or globs (in which ``**`` stands for any depth).
        suffixes: those of the files that are wanted, in lower case.
        what: is in such files, for messages.

    Raises:
        InvalidOptionError: an input names nothing, or a folder or glob without such files, or a file whose suffix is
            not one of them.
    """
    found: dict[str, Found] = {}
    for given in inputs:
        filesystem, path = filesystem_of(given)
        here = list(_find_one(given, filesystem, path, suffixes))
        if not here:
            raise InvalidOptionError(
                f"input: {given} holds no {what}; expected files that end in {', '.join(suffixes)}"
            )
        for one in here:
            found.setdefault(one.url, one)
    return list(found.values())


def _find_one(given: str, filesystem: Any, path: str, suffixes: tuple[str, ...]) -> Iterator[Found]:
    def url(at: str) -> str:
        return at if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(at))

    # A path that exists is taken as it is, even if its name holds a [ or a *. Only what does not exist can be a glob.
    if filesystem.isdir(path):
        root, paths = path, filesystem.find(path)
    elif filesystem.exists(path) or filesystem.lexists(path):
        if not path.lower().endswith(suffixes):
            raise InvalidOptionError(f"input: got {given}, expected a folder or a file of {', '.join(suffixes)}")
        root, paths = filesystem._parent(path), [path]
    elif any(character in path for character in "*?["):
        fixed = path[: min(path.index(character) for character in "*?[" if character in path)]
        root, paths = fixed.rpartition("/")[0], filesystem.glob(path)
    else:
        raise InvalidOptionError(f"input: nothing at {given}; expected a file, a folder or a glob")
    for at in sorted(paths):
        below = at[len(root) :].lstrip("/")
        if at.lower().endswith(suffixes) and not any(part.startswith(".") for part in below.split("/")):
            yield Found(url(at), stem(below))


class Library:
    """Opens files of latents and keeps the last few open. Several threads may use it at the same time.

    A file that is not on this machine is fetched as a whole into a temporary file. Parquet is the exception: only the
    row groups and columns that are asked for are read, wherever the file is.

    Args:
        expected: how the job reads its inputs.
    """

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._open: OrderedDict[str, Source] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, url: str) -> Source:
        """Open one file, unless it is still open.

        Args:
            url: its path or URL, as `Found.url` has it.

        Raises:
            InvalidLatentsError: the file cannot be read, is damaged, is refused because it is unsafe to read, or holds
                no latents.
        """
        with self._lock:
            if url in self._open:
                self._open.move_to_end(url)
                return self._open[url]
        source = _open(url, self._expected)
        with self._lock:
            self._open[url] = source
            while len(self._open) > _OPEN_SOURCES:
                self._open.popitem(last=False)
        return source


def _open(url: str, expected: Expected) -> Source:
    filesystem, path = filesystem_of(url)
    name = path.rpartition("/")[2]
    try:
        if path.lower().endswith(".parquet"):
            if isinstance(filesystem, LocalFileSystem) and is_special(Path(path)):
                raise InvalidLatentsError(f"{name}: is a pipe, a device or a folder; expected a file of latents")
            return _parquet(name, path, filesystem, expected)
        if isinstance(filesystem, LocalFileSystem):
            return TensorSource(Path(path), expected)
        folder = tempfile.mkdtemp(prefix="fluxvae-")
        try:
            local = Path(folder) / name
            _check_room(name, filesystem.size(path), folder)
            filesystem.get_file(path, str(local))
            return TensorSource(local, expected)  # what is mapped of it can be read even after its name is removed
        finally:
            _remove(folder)
    except FluxVAEError:
        raise
    except Exception as error:  # each of fsspec's filesystems raises errors of its own
        raise InvalidLatentsError(f"{name}: cannot be read: {error}") from error


_to_remove: set[str] = set()
"""Folders of fetched files that could not be removed yet: Windows removes no file that is mapped."""


def _remove(*folders: str) -> None:
    """Remove these folders, and those that could not be removed before, as far as the system does it now."""
    _to_remove.update(folders)
    for folder in list(_to_remove):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
            _to_remove.discard(folder)


atexit.register(_remove)


def _check_room(name: str, size: int | None, folder: str) -> None:
    """Refuse to fetch a file of ``size`` bytes (None: unknown) into a folder whose disk has no room for it."""
    free = shutil.disk_usage(folder).free
    if size is not None and size > free:
        raise InvalidLatentsError(
            f"{name}: got {size} bytes to fetch, more than the {free} that are free in {folder}; make room there, or "
            "set TMPDIR to a larger place"
        )


def _parquet(name: str, path: str, filesystem: Any, expected: Expected) -> Source:
    with needs("batch", f"input: {name}: Parquet"):
        from fluxvae.batch.parquet import ParquetSource
    return ParquetSource(name, path, filesystem, expected)


def scan(found: Sequence[Found], suffix: str, expected: Expected, naming: Naming) -> Scan:
    """List the images to make, and everything that the files' metadata show to be wrong with them.

    Args:
        found: the files, as `find` returns them.
        suffix: the suffix of the outputs, with its dot.
        expected: how the job reads its inputs; shapes are checked against its format, which is the checkpoint's.
        naming: what the output folder takes names for.
    """
    result = Scan()
    taken: dict[str, str] = {}
    with ThreadPoolExecutor(_SCANNERS) as threads:
        for one, entries in zip(found, threads.map(lambda one: _entries(one, expected), found), strict=True):
            if isinstance(entries, FluxVAEError):
                result.failures.append(Failure.of(entries, one.url))
                continue
            result.skipped += not entries
            plain = sum(not entry.label for entry in entries)
            for entry in entries:
                name = None
                try:
                    wanted = str(entry.name) if entry.name is not None else _named(one.name, entry, plain)
                    name = output_name(wanted, suffix)
                    naming.check(name)
                    key = naming.key(name)
                    if key in taken:
                        raise InvalidLatentsError(
                            f"name: {name}{suffix} is also the output of {taken[key]}; rename one of them, or decode "
                            "them into folders of their own"
                        )
                    reading, floored = _settled(one.name, entry, expected)
                except FluxVAEError as error:
                    result.failures.append(Failure.of(error, one.url, entry.row, name))
                    continue
                taken[key] = one.url
                result.items.append(Item(one.url, entry.row, name, reading))
                result.floored += floored
    return result


def _named(name: str, entry: Entry, plain: int) -> str:
    """Return the output's name: the file's, with what distinguishes the entry from others in its file.

    Args:
        name: the file's name, as `Found.name` has it.
        entry: the entry.
        plain: how many entries of the file have no label of their own, and so are told apart by their numbers.
    """
    return f"{name}_{entry.label}" if entry.label else with_row(name, entry.row, plain)


def _entries(found: Found, expected: Expected) -> list[Entry] | FluxVAEError:
    try:
        return _open(found.url, expected).entries()
    except FluxVAEError as error:
        return error
    except Exception as error:  # whatever a library raises for a bad file, the other files are still decoded
        return InvalidLatentsError(f"{found.name}: cannot be read: {type(error).__name__}: {error}")


def _settled(name: str, entry: Entry, expected: Expected) -> tuple[Reading, bool]:
    """Check an entry. Return how it is to be read, as `Item.reading`, and whether its size had to be floored.

    Raises:
        InvalidLatentsError: the size, or whether the latents are raw, is not known; or the latents do not fit either.
    """
    format, said = expected.format, expected.reading.over(entry.reading)
    h, w, ids = said.height, said.width, said.latent_ids
    if said.raw is None and entry.ask is not None:
        raise InvalidLatentsError(f"raw: {entry.ask}: pass --raw or --no-raw")
    if said.raw is not None and not isinstance(said.raw, bool):
        raise InvalidLatentsError(f"raw: got {said.raw!r}, expected true or false, or nothing")
    check_order(format, said.feature_order)
    unpacked = entry.shape is not None and len(entry.shape) == 4
    if (h is None or w is None) and not unpacked and ids is None:
        raise InvalidLatentsError(
            f"height and width: got height={h}, width={w}; packed latents need both, and the file does not tell them: "
            "pass --height and --width, or keep them beside the latents (safetensors metadata, npz or pt keys, "
            "Parquet columns)"
        )
    if entry.shape is not None:
        shape = entry.shape
    elif ids is not None and ids.ndim == 3:
        shape = (1, ids.shape[1], format.packed_features)
    else:  # only the values tell the shape, which is checked when they are read; until then the size implies one
        multiple = format.packed_multiple
        patches = (_whole("height", h) // multiple) * (_whole("width", w) // multiple)
        shape = (1, patches, format.packed_features)
    check_pixels(
        name, shape, format.channels, format.vae_scale_factor, expected.max_pixels, "pass --max-pixels if it is meant"
    )
    if unpacked and format.flux2 and said.raw is None and shape[1] == format.channels:
        raise InvalidLatentsError(
            f"latents: got shape {shape}, which may be raw latents (Flux2KleinPipeline's output_type='latent') or "
            "normalised ones: pass --raw or --no-raw, or keep 'raw' (true or false) beside the latents"
        )
    if entry.dtype not in _DTYPES:
        raise InvalidLatentsError(f"latents: got dtype {entry.dtype}, expected {', '.join(_DTYPES)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SizeFlooredWarning)  # counted in Scan.floored, and told all at once
        _, height, width, _ = check_shape(format, shape, said)
    floored = not unpacked and h is not None and (height, width) != (h, w)
    return replace(said, height=height, width=width, latent_ids=None), floored


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise InvalidLatentsError(f"{name}: got {value!r}, expected a whole number of pixels above 0")
    return value
