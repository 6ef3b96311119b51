"""Finds the files of a source that lies on this machine: a file, a VAE's folder, or a pipeline's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxvae.checkpoints.files import SUFFIXES
from fluxvae.checkpoints.folders import INDEX, STANDARD_NAME, WEIGHTS, choose_weights, read_index, read_json
from fluxvae.checkpoints.strangers import TAKEN, told_by_config
from fluxvae.errors import CheckpointError, InvalidOptionError

__all__ = ["CLASSES", "Found", "check_config", "look_at_file", "look_in_diffusers_folder", "look_in_folder"]

CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderKLWan", "AutoencoderTiny")
"""The classes of diffusers that can be decoded with. A config.json of any other class is refused."""


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


def look_at_file(path: Path, subfolder: str | None, variant: str | None) -> Found:
    """Tell what a file is: one of a diffusers folder's, or a checkpoint by itself."""
    if subfolder is not None:
        raise InvalidOptionError(f"subfolder: got {subfolder!r} for the single file {path}; it is for folders")
    config = path.parent / "config.json"
    named = WEIGHTS.fullmatch(path.name) or INDEX.fullmatch(path.name)
    if path.name == "config.json":
        return look_in_diffusers_folder(path.parent, variant)
    if path.name == "model_index.json":
        return look_in_folder(path.parent, None, variant)
    if named is not None and (config.is_file() or named.re is INDEX):
        own = named["before"] or named["after"]
        if variant not in (None, own):
            raise InvalidOptionError(
                f"variant: got {variant!r} for {path}, which is {own or 'no variant'}; leave it out"
            )
        return look_in_diffusers_folder(path.parent, own, only=named["kind"], exact=True)
    if variant is not None:
        raise InvalidOptionError(f"variant: got {variant!r} for the single file {path}; it is for folders and hub ids")
    return Found((path,), beside=_read_config(config) if config.is_file() else None)


def look_in_folder(path: Path, subfolder: str | None, variant: str | None) -> Found:
    """Find the VAE in the given subfolder of a folder, or without one in the folder itself or its vae/.

    A config.json shows where it is. If both have one, the first whose config describes a VAE is taken; if neither does,
    the last is taken all the same, so that the error names what its config describes instead. Without any config.json,
    the one file with a VAE is taken.
    """
    candidates = [path / subfolder] if subfolder is not None else [path, path / "vae"]
    with_config = [folder for folder in candidates if (folder / "config.json").is_file()]
    for folder in with_config:
        if folder is with_config[-1] or (_read_config(folder / "config.json") or {}).get("_class_name") in CLASSES:
            return look_in_diffusers_folder(folder, variant)
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


def look_in_diffusers_folder(folder: Path, variant: str | None, only: str | None = None, exact: bool = False) -> Found:
    """Find the weights beside a ``config.json``; ``only`` and ``exact`` are as for `choose_weights`."""
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
        CheckpointError: the file cannot be read as JSON, or it describes another component, such as a transformer, or
            a VAE that is not decoded here, such as Wan 2.2's, which has a class with Wan 2.1's.
    """
    config = read_json(path)
    if isinstance(config, dict) and (what := told_by_config(config)):
        raise CheckpointError(
            f"checkpoint: {path} describes {config['_class_name']}, {what}; it is not decoded here: {TAKEN}"
        )
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
