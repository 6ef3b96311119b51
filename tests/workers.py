"""What worker processes of tests run: importable by a spawned process, and quickly."""

from __future__ import annotations

from typing import Any


def decode(decoder: Any, latents: Any) -> Any:
    """The image, as bytes."""
    return decoder.decode(latents, output_type="uint8")
