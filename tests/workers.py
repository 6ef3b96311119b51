"""Functions that the worker processes of tests run. A spawned process must be able to import them, and quickly."""

from __future__ import annotations

from typing import Any


def decode(decoder: Any, latents: Any) -> Any:
    """The image, as bytes."""
    return decoder.decode(latents, output_type="uint8")
