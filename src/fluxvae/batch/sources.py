"""Inputs to items: files, folders, globs, here or at any URL that fsspec knows."""

from __future__ import annotations

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

from fluxvae.batch.formats import FILE_SUFFIXES, Source, open_file
from fluxvae.batch.items import Entry, Failure, Item
from fluxvae.batch.names import output_name, stem, with_row
from fluxvae.batch.readings import Expected
from fluxvae.claims import check_pixels
from fluxvae.errors import FluxVAEError, InvalidLatentsError, InvalidOptionError
from fluxvae.latents.checks import check_shape
from fluxvae.latents.packing import SizeFlooredWarning
from fluxvae.latents.reading import Reading

__all__ = ["Found", "Library", "Scan", "filesystem_of", "find", "scan"]

SUFFIXES = (*FILE_SUFFIXES, ".parquet")
_SCANNERS = 8
_OPEN_SOURCES = 8
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Found:
    """One file of latents."""

    url: str
    """What fsspec opens; a plain path where it is local."""
    name: str
    """Of its output: below the folder or the glob it was found by."""


@dataclass
class Scan:
    """What a job's inputs hold."""

    items: list[Item] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    floored: int = 0
    """Items whose size is not a multiple of 16 and was floored, as FluxPipeline does."""
    skipped: int = 0
    """Files that are known to hold no latents, such as what text encoders gave, which trainers keep beside them."""


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL or path, and the path in it.

    Raises:
        InvalidOptionError: a protocol that fsspec does not know, or whose package is missing.
    """
    try:
        filesystem, path = fsspec.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise InvalidOptionError(f"{url}: cannot be opened by fsspec: {error}") from error
    return filesystem, path


def find(inputs: Sequence[str]) -> list[Found]:
    """The files of latents that these inputs name, in a fixed order, none of them twice.

    Args:
        inputs: files, folders (searched to their bottom) or globs (``**`` for any depth).

    Raises:
        InvalidOptionError: an input that names nothing, or a file that is not of latents.
    """
    found: dict[str, Found] = {}
    for given in inputs:
        filesystem, path = filesystem_of(given)
        here = list(_find_one(given, filesystem, path))
        if not here:
            raise InvalidOptionError(
                f"input: {given} holds no latents; expected files that end in {', '.join(SUFFIXES)}"
            )
        for one in here:
            found.setdefault(one.url, one)
    return list(found.values())


def _find_one(given: str, filesystem: Any, path: str) -> Iterator[Found]:
    def url(at: str) -> str:
        return at if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(at))

    # A file whose name holds a [ or a * is that file before it is a glob.
    if filesystem.isdir(path):
        root, paths = path, filesystem.find(path)
    elif filesystem.exists(path) or filesystem.lexists(path):
        if not path.lower().endswith(SUFFIXES):
            raise InvalidOptionError(f"input: got {given}, expected a folder or a file of {', '.join(SUFFIXES)}")
        root, paths = filesystem._parent(path), [path]
    elif any(character in path for character in "*?["):
        fixed = path[: min(path.index(character) for character in "*?[" if character in path)]
        root, paths = fixed.rpartition("/")[0], filesystem.glob(path)
    else:
        raise InvalidOptionError(f"input: nothing at {given}; expected a file, a folder or a glob")
    for at in sorted(paths):
        below = at[len(root) :].lstrip("/")
        if at.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in below.split("/")):
            yield Found(url(at), stem(below))


class Library:
    """Opens sources and keeps the last few open; safe to use from several threads.

    Files that are not local are fetched whole into a temporary file, except Parquet, of which only the row groups and
    columns that are asked for are read.

    Args:
        expected: what the job takes its inputs for.
    """

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._open: OrderedDict[str, Source] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, url: str) -> Source:
        """Open one source.

        Raises:
            InvalidLatentsError: unreadable, damaged, refused, or without latents.
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
            if isinstance(filesystem, LocalFileSystem) and Path(path).exists() and not Path(path).is_file():
                raise InvalidLatentsError(f"{name}: is a pipe, a device or a folder; expected a file of latents")
            return _parquet(name, path, filesystem, expected)
        if isinstance(filesystem, LocalFileSystem):
            return open_file(Path(path), expected)
        with tempfile.TemporaryDirectory(prefix="fluxvae-") as folder:
            local = Path(folder) / name
            _check_room(name, filesystem.size(path), folder)
            filesystem.get_file(path, str(local))
            return open_file(local, expected)  # what is mapped of it stays when its name goes
    except FluxVAEError:
        raise
    except Exception as error:  # every filesystem has errors of its own
        raise InvalidLatentsError(f"{name}: cannot be read: {error}") from error


def _check_room(name: str, size: int | None, folder: str) -> None:
    free = shutil.disk_usage(folder).free
    if size is not None and size > free:
        raise InvalidLatentsError(
            f"{name}: got {size} bytes to fetch, more than the {free} that are free in {folder}; make room there, or "
            "set TMPDIR to a larger place"
        )


def _parquet(name: str, path: str, filesystem: Any, expected: Expected) -> Source:
    try:
        from fluxvae.batch.parquet import ParquetSource
    except ImportError as error:
        raise InvalidOptionError(
            f"input: {name}: Parquet needs pyarrow ({error}); pip install 'fluxvae[batch]'"
        ) from error
    return ParquetSource(name, path, filesystem, expected)


def scan(found: Sequence[Found], suffix: str, expected: Expected) -> Scan:
    """Every image there is to make, and everything that is wrong with the inputs as far as their metadata tell.

    Args:
        found: by `find`.
        suffix: of the outputs, with its dot.
        expected: what the job takes its inputs for; shapes are checked against the checkpoint's format.
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
                    if name in taken:
                        raise InvalidLatentsError(
                            f"name: {name}{suffix} is also the output of {taken[name]}; rename one of them, or decode "
                            "them into folders of their own"
                        )
                    reading, floored = _settled(one.name, entry, expected)
                except FluxVAEError as error:
                    result.failures.append(Failure.of(error, one.url, entry.row, name))
                    continue
                taken[name] = one.url
                result.items.append(Item(one.url, entry.row, name, reading))
                result.floored += floored
    return result


def _named(name: str, entry: Entry, plain: int) -> str:
    """The output's name: the file's, with what tells an entry from the others of its file."""
    return f"{name}_{entry.label}" if entry.label else with_row(name, entry.row, plain)


def _entries(found: Found, expected: Expected) -> list[Entry] | FluxVAEError:
    try:
        return _open(found.url, expected).entries()
    except FluxVAEError as error:
        return error
    except Exception as error:  # a bad file must not stop the others, whatever a library makes of it
        return InvalidLatentsError(f"{found.name}: cannot be read: {type(error).__name__}: {error}")


def _settled(name: str, entry: Entry, expected: Expected) -> tuple[Reading, bool]:
    """Return how the entry is to be read, as `Item.reading`, and whether its size had to be floored."""
    format, said = expected.format, expected.reading.over(entry.reading)
    h, w, ids = said.height, said.width, said.latent_ids
    if said.raw is None and entry.ask is not None:
        raise InvalidLatentsError(f"raw: {entry.ask}: pass --raw or --no-raw")
    if said.raw is not None and not isinstance(said.raw, bool):
        raise InvalidLatentsError(f"raw: got {said.raw!r}, expected true or false, or nothing")
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
    else:  # it is known when the values are read, and is checked then
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
        warnings.simplefilter("ignore", SizeFlooredWarning)  # such items are counted, and told of once
        _, height, width, _ = check_shape(format, shape, said)
    floored = not unpacked and h is not None and (height, width) != (h, w)
    return replace(said, height=height, width=width, latent_ids=None), floored


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise InvalidLatentsError(f"{name}: got {value!r}, expected a whole number of pixels above 0")
    return value
