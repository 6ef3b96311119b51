"""Names of outputs: those of the inputs, made safe to join to a folder. Pure functions."""

from __future__ import annotations

import re
from typing import Protocol

from fluxvae.errors import InvalidLatentsError

__all__ = ["Naming", "output_name", "stem", "windows_problem", "with_row"]

_LONGEST = 200
"""Bytes of one part of a name: most filesystems take 255, and a suffix comes behind it."""
_WINDOWS_DEVICES = re.compile(
    r"(con|prn|aux|nul|com[0-9\u00b9\u00b2\u00b3]|lpt[0-9\u00b9\u00b2\u00b3]|conin\$|conout\$) *(\..*)?", re.I
)
"""Names that are devices in every folder of Windows, whatever suffix they have."""


class Naming(Protocol):
    """What an output folder takes names for."""

    def key(self, name: str) -> str:
        """What tells one name from another there: two names with the same key are one file."""

    def check(self, name: str) -> None:
        """Refuse a name from `output_name` that no file can have there.

        Raises:
            InvalidLatentsError: the name is another thing there, such as a device.
        """


def output_name(name: str, suffix: str) -> str:
    """Return the output's path, without its suffix, for a name from a file or a column.

    Args:
        name: with ``/`` between folders. A suffix that is the output's own is dropped: ``cat.png`` makes ``cat.png``.
        suffix: the output's own, with its dot.

    Raises:
        InvalidLatentsError: the name is empty, absolute, hidden or too long, leads out of the folder, or has control
            characters.
    """
    kept = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    parts = kept.split("/")
    problem = None
    if any(not character.isprintable() for character in kept):
        problem = "it has characters that are not printable"
    elif "\\" in kept:
        problem = "it has a backslash, which is a separator on some systems"
    elif not all(parts):
        problem = "it is empty, or a part of it is"
    elif any(part.startswith(".") for part in parts):
        problem = "a part of it starts with a dot: hidden, or leading out of the output folder"
    elif any(len(part.encode()) > _LONGEST for part in parts):
        problem = f"a part of it is longer than {_LONGEST} bytes"
    if problem is not None:
        raise InvalidLatentsError(f"name: got {name[:80]!r}: {problem}; rename it in the source")
    return kept


def windows_problem(name: str) -> str | None:
    """Why a name from `output_name` is no file's on Windows, or another's; None where it may be used there."""
    for part in name.split("/"):
        if found := re.search(r'[<>:"|?*]', part):
            return f"it has a {found[0]}, which no name has on Windows"
        if part[-1] in ". ":
            return "a part of it ends in a dot or a space, which Windows leaves out"
        if _WINDOWS_DEVICES.fullmatch(part):
            return f"{part} is a device on Windows"
    return None


def stem(path: str) -> str:
    """Return a path without its last suffix: ``a/b.c.npy`` gives ``a/b.c``."""
    folder, slash, file = path.rpartition("/")
    base, dot, _ = file.rpartition(".")
    return f"{folder}{slash}{base if dot and base else file}"


def with_row(name: str, row: int, rows: int) -> str:
    """Return the name of one row: the source's own, and with it the row's number where there are several rows."""
    return name if rows == 1 else f"{name}_{row:0{max(4, len(str(rows - 1)))}d}"
