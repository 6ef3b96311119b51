"""Finds the files of a source: which files hold the weights, and which config describes them.

A caller may pass any of these as the source: ``"demo"``; a diffusers VAE folder, or its ``config.json``, its weights
file or its index; a pipeline folder; a folder with one VAE's file; a single file; the folder of a repository in the
hub's cache; a hub id.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxvae.checkpoints.files import SUFFIXES
from fluxvae.checkpoints.folders import INDEX, STANDARD_NAME, WEIGHTS, choose_weights, read_index, read_json
from fluxvae.errors import CheckpointError, InvalidOptionError

__all__ = ["ASSETS", "CLASSES", "Found", "check_config", "find"]

ASSETS = Path(__file__).parent.parent / "assets"
CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny")
"""The classes of diffusers that can be decoded with. A config.json of any other class is refused."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Found:
    """The files that a source turned out to be."""

    files: tuple[Path, ...]
    """The files that hold the weights: one file, or all shards."""
    config: dict[str, Any] | None = None
    """The content of the ``config.json`` that belongs to the weights. None where they are a single file's."""
    beside: dict[str, Any] | None = None
    """The content of a ``config.json`` that lies beside a single file. It may describe that file, or something else."""
    variant: str | None = None
    """The variant of the weights, such as ``"fp16"``; None for the weights without one."""
    index: Path | None = None
    """The index that lists the shards; None where there is none."""

    @property
    def name(self) -> Path:
        """What messages call this checkpoint: the folder that has a config, otherwise the single file."""
        return self.files[0] if self.config is None else self.files[0].parent


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
        return _file(path, subfolder, variant)
    if is_cache:
        from fluxvae.checkpoints.hub import cached_snapshot

        path = cached_snapshot(path, revision)
    if path.is_dir():
        return _folder(path, subfolder, variant)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix.lower() not in SUFFIXES:
        from fluxvae.checkpoints.hub import snapshot

        folder = snapshot(source, subfolder=subfolder, revision=revision, variant=variant)
        return _diffusers_folder(folder, variant)
    raise CheckpointError(
        f"checkpoint: nothing at {source}; expected 'demo', a diffusers VAE folder, a pipeline folder with vae/, "
        "a file of weights such as ae.safetensors, or a hub id such as black-forest-labs/FLUX.1-schnell"
    )


def _file(path: Path, subfolder: str | None, variant: str | None) -> Found:
    if subfolder is not None:
        raise InvalidOptionError(f"subfolder: got {subfolder!r} for the single file {path}; it is for folders")
    config = path.parent / "config.json"
    named = WEIGHTS.fullmatch(path.name) or INDEX.fullmatch(path.name)
    if path.name == "config.json":
        return _diffusers_folder(path.parent, variant)
    if path.name == "model_index.json":
        return _folder(path.parent, None, variant)
    if named is not None and (config.is_file() or named.re is INDEX):
        own = named["before"] or named["after"]
        if variant not in (None, own):
            raise InvalidOptionError(
                f"variant: got {variant!r} for {path}, which is {own or 'no variant'}; leave it out"
            )
        return _diffusers_folder(path.parent, own, only=named["kind"], exact=True)
    if variant is not None:
        raise InvalidOptionError(f"variant: got {variant!r} for the single file {path}; it is for folders and hub ids")
    return Found((path,), beside=_read_config(config) if config.is_file() else None)


def _folder(path: Path, subfolder: str | None, variant: str | None) -> Found:
    """Find the VAE in the given subfolder of a folder, or without one in the folder itself or its vae/.

    A config.json shows where it is. If both have one, the first whose config describes a VAE is taken; if neither does,
    the last is taken all the same, so that the error names what its config describes instead. Without any config.json,
    the one file with a VAE is taken.
    """
    candidates = [path / subfolder] if subfolder is not None else [path, path / "vae"]
    with_config = [folder for folder in candidates if (folder / "config.json").is_file()]
    for folder in with_config:
        if folder is with_config[-1] or (_read_config(folder / "config.json") or {}).get("_class_name") in CLASSES:
            return _diffusers_folder(folder, variant)
    for folder in candidates:
        if folder.is_dir() and (files := _weights_in(folder)):
            return _lone_file(folder, files, variant)
    looked = " or ".join(str(folder / "config.json") for folder in candidates)
    raise CheckpointError(
        f"checkpoint: no VAE in {path}: looked for {looked}, and for a file of weights; pass the folder that holds "
        f"config.json and {STANDARD_NAME}, or the file itself"
    )


def _weights_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _lone_file(folder: Path, files: list[Path], variant: str | None) -> Found:
    """Take the only file of weights, or the one of several that holds a VAE, which the headers tell.

    Only safetensors files are opened for this. A file of another kind counts as one that may hold a VAE.
    """
    from fluxvae.checkpoints.files import is_safetensors, open_weights
    from fluxvae.checkpoints.layouts import holds_vae

    if variant is not None:
        raise InvalidOptionError(
            f"variant: got {variant!r} for {folder}, which holds single files; it is for folders with a config.json"
        )
    if len(files) > 1:
        files = [path for path in files if not is_safetensors(path) or holds_vae(open_weights([path]).entries)] or files
    if len(files) > 1:
        raise CheckpointError(
            f"checkpoint: {folder} holds no config.json but {len(files)} files that may be a VAE: "
            f"{', '.join(path.name for path in files)}; pass the path of one of them"
        )
    return Found((files[0],))


def _diffusers_folder(folder: Path, variant: str | None, only: str | None = None, exact: bool = False) -> Found:
    config = check_config(folder / "config.json")
    names = [path.name for path in folder.iterdir() if path.is_file()]
    chosen = choose_weights(names, variant, str(folder), only=only, exact=exact)
    if chosen is None:
        others = [path for path in _weights_in(folder) if WEIGHTS.fullmatch(path.name) is None]
        if others and variant is None:
            found = _lone_file(folder, others, None)
            return Found(found.files, beside=config)
        raise CheckpointError(
            f"checkpoint: {folder / STANDARD_NAME} is missing beside its config.json, and so is every other file of "
            f"weights (there: {', '.join(sorted(names))}); download or export the VAE again (save_pretrained writes "
            "both)"
        )
    shards = chosen.shards if chosen.index is None else read_index(folder / chosen.index)
    if lost := [name for name in shards if not (folder / name).is_file()]:
        raise CheckpointError(
            f"checkpoint: {folder} lacks {len(lost)} of the {len(shards)} shards of its weights, {lost[0]} among them; "
            "download them again"
        )
    index = None if chosen.index is None else folder / chosen.index
    return Found(tuple(folder / name for name in shards), config=config, variant=chosen.variant, index=index)


def check_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json`` that must describe one of `CLASSES`.

    Raises:
        CheckpointError: the file cannot be read as JSON, or it describes another component, such as a transformer.
    """
    config = read_json(path)
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found not in CLASSES:
        raise CheckpointError(
            f"checkpoint: {path} describes {found or 'no diffusers model'}, expected {', '.join(CLASSES)}; pass the "
            "VAE's folder, not another component's"
        )
    assert isinstance(config, dict)
    return config


def _read_config(path: Path) -> dict[str, Any] | None:
    """Read a config that may be any component's; return None unless it describes one of `CLASSES`."""
    try:
        return check_config(path)
    except CheckpointError:
        return None
