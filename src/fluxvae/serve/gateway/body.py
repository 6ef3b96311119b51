"""Reads the two forms of a request's body: the latents' raw bytes, or JSON that holds them in base64.

    Content-Type                               body
    tensor/binary, application/octet-stream    the bytes
    tensor/base64, application/json            {"inputs": "<base64>", "parameters": {...}}

The second form is what kijai's ComfyUI-HFRemoteVae and the first clients of the hosted endpoints send. ``parameters``
may be left out; it holds what would otherwise be in the query string, by the same names.

The text in ``inputs`` is cut out before the JSON is parsed, and the rest has to be small. Otherwise a body that
consists of brackets would become objects of many times its size.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.serve.gateway.errors import UnsupportedMedia

__all__ = [
    "Form",
    "as_float32",
    "base64_answer",
    "largest_json",
    "media_type",
    "read_form",
    "read_json",
    "refuse_compressed",
]

_LARGEST_REST = 64 * 2**10
"""How many bytes of a JSON body there may be beside the text in its ``inputs``."""
_INPUTS = re.compile(rb'"inputs"\s*:\s*"([^"\\]*)"')
_EXPECTED = '{"inputs": "the latents\' bytes in base64", "parameters": {...}}'
_PIECE = 3 * 2**18  # bytes that are encoded at a time: a multiple of 3, so that no padding comes between the pieces


class Form(Enum):
    """How a body holds the latents."""

    BINARY = "binary"
    BASE64 = "base64"


_FORMS = {
    "tensor/binary": Form.BINARY,
    "application/octet-stream": Form.BINARY,
    "tensor/base64": Form.BASE64,
    "application/json": Form.BASE64,
}


def read_form(headers: Mapping[str, str]) -> Form:
    """Return the form of the body that the headers announce.

    Raises:
        UnsupportedMedia: they announce another type, or a compressed body.
    """
    content_type = headers.get("content-type", "")
    form = _FORMS.get(media_type(content_type))
    if form is None:
        raise UnsupportedMedia(
            f"Content-Type: got {content_type[:80]!r}, expected 'tensor/binary': the latents' raw bytes; or "
            f"'tensor/base64': {_EXPECTED}"
        )
    refuse_compressed(headers)
    return form


def media_type(content_type: str) -> str:
    """Return what a ``Content-Type`` says without its parameters, in lower case; ``""`` where it says nothing."""
    return content_type.partition(";")[0].strip().lower()


def refuse_compressed(headers: Mapping[str, str]) -> None:
    """Refuse a body that was compressed on its way, whatever it holds.

    Raises:
        UnsupportedMedia: the headers say that it was.
    """
    if encoding := headers.get("content-encoding"):
        raise UnsupportedMedia(f"Content-Encoding: got {encoding[:80]!r}, expected none: send the bytes as they are")


def largest_json(nbytes: int) -> int:
    """Return how many bytes a JSON body with ``nbytes`` bytes of latents may have at most."""
    return 4 * -(-nbytes // 3) + _LARGEST_REST


def read_json(body: bytearray | bytes) -> tuple[bytes, list[tuple[str, str]]]:
    """Return the latents' bytes in a JSON body, and its parameters as (name, value) pairs like those of a query string.

    Raises:
        InvalidLatentsError: the body is not JSON of this form, or its ``inputs`` are not base64.
        InvalidOptionError: a parameter is neither a text, nor a number, a truth value, null or a list of these.
    """
    found = _INPUTS.search(body)
    rest = _rest(body, found)
    if not isinstance(rest, dict) or found is None or rest.pop("inputs", None) != "":
        raise InvalidLatentsError(f"body: got JSON without the text 'inputs'; expected {_EXPECTED}")
    parameters = rest.pop("parameters", None)
    if rest:
        raise InvalidLatentsError(f"body: got {next(iter(rest))[:80]!r} beside 'inputs'; expected {_EXPECTED}")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidOptionError(f"parameters: got {str(parameters)[:80]}, expected an object of names and values")
    try:
        latents = base64.b64decode(memoryview(body)[slice(*found.span(1))], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidLatentsError(
            f"inputs: got text that is no base64 ({error}); expected the latents' bytes in the standard alphabet, "
            "padded, without line breaks"
        ) from None
    return latents, [pair for name, value in (parameters or {}).items() for pair in _as_query(name, value)]


def base64_answer(data: memoryview, shape: tuple[int, ...], dtype: str) -> tuple[int, Any]:
    """Make the body that the hosted endpoints gave to clients that accept ``tensor/base64``.

    It is ``{"inputs": base64, "parameters": {"shape": [...], "dtype": ...}}``.

    Args:
        data: the tensor's bytes.
        shape, dtype: the tensor's.

    Returns:
        How many bytes the body has, and an iterator over its pieces, which encodes one at a time to save memory.
    """
    before = b'{"inputs": "'
    after = b'", "parameters": ' + json.dumps({"shape": list(shape), "dtype": dtype}).encode() + b"}"

    def pieces() -> Any:
        yield before
        for start in range(0, len(data), _PIECE):
            yield base64.b64encode(data[start : start + _PIECE])
        yield after

    return len(before) + 4 * -(-len(data) // 3) + len(after), pieces()


def _rest(body: bytearray | bytes, found: re.Match[bytes] | None) -> Any:
    """Parse the JSON of a body, from which the text in ``inputs`` was cut out: there it is empty."""
    start, end = found.span(1) if found is not None else (0, 0)
    if len(body) - (end - start) > _LARGEST_REST:
        raise InvalidLatentsError(
            f"body: got {len(body) - (end - start)} bytes beside the text 'inputs', expected at most {_LARGEST_REST}: "
            f"{_EXPECTED}"
        )
    try:
        return json.loads(bytes(body[:start] + body[end:]), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InvalidLatentsError(
            f"body: got what is no JSON ({str(error)[:100]}); expected {_EXPECTED}, or raw bytes with Content-Type "
            "'tensor/binary'"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of a JSON object. A name that is there twice is refused, rather than one of them dropped."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if sum(other == name for other, _ in pairs) > 1)
        raise InvalidLatentsError(f"body: got {twice[:80]!r} twice in one JSON object; expected {_EXPECTED}")
    return found


def _as_query(name: str, value: Any) -> list[tuple[str, str]]:
    """Return one parameter as a query string has it: a list is repeated, and null counts as left out."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    for one in values:
        if not isinstance(one, (str, bool, int, float)):
            raise InvalidOptionError(f"{name[:80]}: got {str(one)[:80]}, expected a text, a number or a truth value")
    return [(name, one if isinstance(one, str) else repr(one)) for one in values]


def as_float32(body: bytearray | bytes, dtype: str) -> NDArray[np.float32]:
    """Return the values of raw, little-endian float32, float16 or bfloat16; those of float32 without a copy."""
    if dtype == "bfloat16":  # NumPy does not have it; it is the upper half of a float32
        halves = np.frombuffer(body, "<u2").astype(np.uint32)
        halves <<= 16
        return halves.view(np.float32)
    return np.frombuffer(body, "<f4" if dtype == "float32" else "<f2").astype(np.float32, copy=False)
