"""What Griffe, which reads the docstrings for the documentation site, has to be told about this project's style.

The style is Google's, and takes three liberties that people read without a thought and Griffe does not:

- An entry may be about several arguments, ``height, width: pixels``. Each gets an entry here.
- So it may be about several errors. They have the description in common.
- What is returned is described in free words, colons included, and never begins with a type: the annotation says that.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function

_SECTION = re.compile(r"^(Args|Raises|Returns|Yields):\n((?: .*\n|\n)+)", re.MULTILINE)
_ENTRIES = re.compile(r"^(?=    \S)", re.MULTILINE)
_SEVERAL = re.compile(r"    (\w+(?:, \w+)+): ")


def translate(docstring: str) -> str:
    """Return a docstring, without the indentation of its code, as Griffe understands it."""
    return _SECTION.sub(_section, docstring.rstrip() + "\n").rstrip()


def _section(match: re.Match[str]) -> str:
    name, body = match.groups()
    if name in ("Returns", "Yields"):
        return f"{name}:\n{body.replace('    ', '    : ', 1)}"  # before the colon is the type: none
    each = _arguments if name == "Args" else _errors
    return f"{name}:\n" + "".join(each(entry) for entry in _ENTRIES.split(body))


def _arguments(entry: str) -> str:
    if not (match := _SEVERAL.match(entry)):
        return entry
    first, *others = match[1].split(", ")
    named = ", ".join(f"``{other}``" for other in others)
    about = f"    {first}: with {named}: {entry[match.end() :]}"
    return about + "".join(f"    {other}: see ``{first}``.\n" for other in others)


def _errors(entry: str) -> str:
    if not (match := _SEVERAL.match(entry)):
        return entry
    return "".join(f"    {error}: {entry[match.end() :]}" for error in match[1].split(", "))


class DocstringStyle(Extension):
    """Translates docstrings as they are loaded."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Translate the docstring of a class or function."""
        if isinstance(obj, (Class, Function)) and obj.docstring is not None:
            obj.docstring.value = translate(obj.docstring.value)
