"""Finds the files of a source: which files hold the weights, and which config describes them.

A caller may pass any of these as the source: ``"demo"``; a diffusers VAE folder, or its ``config.json``, its weights
file or its index; a pipeline folder; a folder with one VAE's file; a single file; the folder of a repository in the
hub's cache; a hub id.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fluxvae.checkpoints.files import SUFFIXES
from fluxvae.checkpoints.hub import cached_snapshot, snapshot
from fluxvae.checkpoints.local import Found, look_at_file, look_in_diffusers_folder, look_in_folder
from fluxvae.errors import CheckpointError, InvalidOptionError

__all__ = ["ASSETS", "find"]

ASSETS = Path(__file__).parent.parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find(
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Found:
    """Find the files of a source. Those of a hub id are downloaded into the hub's cache unless they are there already.

    Args:
        source, subfolder, revision, variant: as for `open_checkpoint`.

    Raises:
        CheckpointError: there is nothing at the source, it holds no VAE or several, or it cannot be reached.
        InvalidOptionError: a subfolder, revision or variant was given for a source that cannot have one.
    """
    path = ASSETS / "demo" if source == "demo" else Path(os.path.expanduser(source))
    is_cache = path.name.startswith("models--") and (path / "snapshots").is_dir()
    if revision is not None and (path.exists() or source == "demo") and not is_cache:
        raise InvalidOptionError(f"revision: got {revision!r} for {source}, which is local; it is for hub ids only")
    if path.is_file():
        return look_at_file(path, subfolder, variant)
    if is_cache:
        path = cached_snapshot(path, revision)
    if path.is_dir():
        return look_in_folder(path, subfolder, variant)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix.lower() not in SUFFIXES:
        folder = snapshot(source, subfolder=subfolder, revision=revision, variant=variant)
        return look_in_diffusers_folder(folder, variant)
    raise CheckpointError(
        f"checkpoint: nothing at {source}; expected 'demo', a diffusers VAE folder, a pipeline folder with vae/, "
        "a file of weights such as ae.safetensors, or a hub id such as black-forest-labs/FLUX.1-schnell"
    )
