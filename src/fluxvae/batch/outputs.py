"""Turns one decoded image, or one picture's latents, into the bytes of a file that says where they come from."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from fluxvae.batch.items import Item
from fluxvae.batch.store import Store
from fluxvae.errors import FluxVAEError
from fluxvae.latents.format import PREVIEW_NOTE
from fluxvae.pictures import FORMATS, OutputType, encode

__all__ = ["METADATA_KEYS", "OutputError", "metadata_of", "output_type_of", "to_bytes", "write_output"]

METADATA_KEYS = ("source", "row", "height", "width", "checkpoint", "checkpoint_sha256", "engine", "dtype", "fluxvae")


class OutputError(FluxVAEError):
    """An output could not be written."""


def write_output(store: Store, name: str, data: bytes) -> None:
    """Write one file of the output folder, whole or not at all.

    Raises:
        OutputError: it cannot be written; the message says what to do.
    """
    try:
        store.write(name, data)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room there, then run again with --resume" if full else "see to the output folder"
        raise OutputError(
            f"out: {name} ({len(data)} bytes) cannot be written to {store.root}: {error.strerror or error}; {advice}"
        ) from error


def metadata_of(item: Item, record: Mapping[str, Any]) -> dict[str, str]:
    """Return what is embedded in the file: `METADATA_KEYS`, and ``approximate`` where the image is a preview.

    Args:
        record: what the whole job has in common.
    """
    height, width = item.size
    own = {"source": item.source, "row": str(item.row), "height": str(height), "width": str(width)}
    own |= {key: str(record[key]) for key in METADATA_KEYS if key not in own}
    return own | ({"approximate": PREVIEW_NOTE} if record["approximate"] else {})


def output_type_of(format: str) -> OutputType:
    """Return the output type that the decoder is asked for to make files of this format."""
    if format in FORMATS:
        return "uint8"
    return "np" if format == "npy" else "pt"


def to_bytes(image: Any, format: str, quality: int | None, metadata: Mapping[str, str]) -> bytes:
    """Encode one image, given as `output_type_of(format)` without a batch axis, as the bytes of a file.

    Returns:
        - png, jpeg, webp: the picture, with the metadata (PNG text chunks, or JSON in EXIF's ImageDescription);
        - npy: (H, W, 3) float32 in [0, 1]; the format has no place for metadata, ``job.json`` beside it has;
        - safetensors: ``image`` (3, H, W) in [0, 1], in the decoder's dtype, with the metadata.

        RGBA pictures have four channels in each of them. JPEG has no place for these.
    """
    if format in FORMATS:
        return encode(image, format, quality, metadata)
    if format == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(image), allow_pickle=False)
        return buffer.getvalue()
    assert isinstance(image, torch.Tensor)
    return bytes(save({"image": image.contiguous().cpu()}, dict(metadata)))


def read_record(data: bytes | None) -> dict[str, Any] | None:
    """Return ``job.json`` as it was written; None where there is none, or only a beginning of one."""
    try:
        record = json.loads(data or b"")
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
