"""Every kind of checkpoint to one of diffusers' autoencoders, or a `CheckpointError` that says what to do.

Sources: ``"demo"``, a diffusers VAE folder, a pipeline folder that holds ``vae/``, a single ``.safetensors`` file in
BFL's layout or of a preview (`checkpoint_files`), or a hub id. Only safetensors are read: nothing here unpickles a
file. The encoder is dropped after loading; decoding never uses it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fluxvae.checkpoint_files import ASSETS, LOAD_ERRORS, first_line, load_file, tensor_shapes
from fluxvae.decoder_options import VAE
from fluxvae.errors import CheckpointError, InvalidOptionError
from fluxvae.preview_files import load_preview

__all__ = ["ASSETS", "load_vae", "weights_file"]

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CLASSES = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny)}
_UNUSED = ("encoder.", "quant_conv.", "bn.num_batches_tracked")
"""Tensors that decoding does without."""


def load_vae(
    source: str | Path, *, subfolder: str | None = None, revision: str | None = None, dtype: torch.dtype | None = None
) -> VAE:
    """Load the decoder half of a VAE, on the CPU, in evaluation mode, without gradients.

    Args:
        source: ``"demo"``; a folder with ``config.json``, or with ``vae/config.json``; a ``.safetensors`` file with
            BFL's key names, FLUX.1's or FLUX.2's, or a preview's such as ``taef2.safetensors``; or a hub id
            ``"owner/name"``, downloaded once into the hub's cache.
        subfolder: where in the folder or repository the VAE lies; found by itself where it is ``vae``.
        revision: branch, tag or commit; for hub ids only.
        dtype: of the weights; as stored where left out.

    Raises:
        CheckpointError: nothing there, damaged, another model's, or out of reach.
        InvalidOptionError: subfolder or revision given where it means nothing.
    """
    found = _locate(source, subfolder, revision)
    vae = load_file(found, dtype) if found.is_file() else _load_folder(found, dtype)
    vae.encoder = None  # never used for decoding, and nearly half of the weights
    return vae.eval().requires_grad_(False)


def weights_file(source: str | Path, *, subfolder: str | None = None, revision: str | None = None) -> Path:
    """The file whose weights `load_vae` loads: what a checkpoint's hash is of.

    Raises:
        CheckpointError: nothing there, or out of reach.
        InvalidOptionError: subfolder or revision given where it means nothing.
    """
    found = _locate(source, subfolder, revision)
    return found if found.is_file() else found / WEIGHTS_NAME


def _locate(source: str | Path, subfolder: str | None, revision: str | None) -> Path:
    """The single file, or the folder that holds config and weights; downloaded if need be."""
    path = ASSETS / "demo" if source == "demo" else Path(source)
    if revision is not None and (path.exists() or source == "demo"):
        raise InvalidOptionError(f"revision: got {revision!r} for {source}, which is local; it is for hub ids only")
    if path.is_file():
        if subfolder is not None:
            raise InvalidOptionError(f"subfolder: got {subfolder!r} for the single file {path}; it is for folders")
        return path
    if path.is_dir():
        return _vae_folder(path, subfolder)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and not source.endswith(".safetensors"):
        return _download(source, subfolder, revision)
    raise CheckpointError(
        f"checkpoint: nothing at {source}; expected 'demo', a diffusers VAE folder, a pipeline folder with vae/, "
        "a .safetensors file, or a hub id such as black-forest-labs/FLUX.1-schnell"
    )


def _vae_folder(path: Path, subfolder: str | None) -> Path:
    candidates = [path / subfolder] if subfolder is not None else [path, path / "vae"]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    looked = " or ".join(str(folder / "config.json") for folder in candidates)
    raise CheckpointError(
        f"checkpoint: no VAE in {path}: looked for {looked}; pass the folder that holds config.json and {WEIGHTS_NAME}"
    )


def _load_folder(folder: Path, dtype: torch.dtype | None) -> VAE:
    kind = _check_config(folder / "config.json")
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointError(
            f"checkpoint: {weights} is missing beside its config.json; download or export the VAE again "
            "(save_pretrained writes both)"
        )
    shapes = tensor_shapes(weights)
    if kind is AutoencoderTiny:
        return load_preview(weights, shapes, AutoencoderTiny.load_config(folder), dtype)
    return _from_pretrained(kind, folder, dtype)


def _download(source: str, subfolder: str | None, revision: str | None) -> Path:
    """Fetch config and weights into the hub's cache, or find them there; returns their folder."""
    where = f"{source}@{revision}" if revision else source
    failure: Exception | None = None
    for folder in [subfolder] if subfolder is not None else [None, "vae"]:
        try:
            config = hf_hub_download(source, "config.json", subfolder=folder, revision=revision)
            _check_config(Path(config))
            hf_hub_download(source, WEIGHTS_NAME, subfolder=folder, revision=revision)
        except EntryNotFoundError as error:  # no such file there, or (its subclass) offline and not in the cache
            failure = error
        except GatedRepoError as error:
            raise CheckpointError(
                f"checkpoint: {where} is gated; accept its licence on its page and log in with `hf auth login`"
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"checkpoint: the hub has no repository {where}, or it is private; check the name, or log in with "
                "`hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"checkpoint: {where} has no such revision; expected a branch, tag or commit of the repository"
            ) from error
        except (OSError, HfHubHTTPError) as error:
            failure = error
        else:
            return Path(config).parent
    if isinstance(failure, EntryNotFoundError) and not isinstance(failure, LocalEntryNotFoundError):
        raise CheckpointError(
            f"checkpoint: {where} holds no VAE: no config.json with {WEIGHTS_NAME} in it or in its vae/; name the "
            "folder with subfolder="
        ) from failure
    raise CheckpointError(
        f"checkpoint: {where} is not in the hub's cache and the hub cannot be reached ({first_line(failure)}); check "
        "the connection, or pass a local folder or file"
    ) from failure


def _from_pretrained(kind: Any, folder: Path, dtype: torch.dtype | None) -> VAE:
    try:
        vae: VAE
        vae, info = kind.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"checkpoint: the weights in {folder} cannot be loaded: {first_line(error)}; they are damaged or of "
            "another model than config.json says: download or export them again"
        ) from error
    # diffusers fills missing weights with random ones, drops those it has no place for, and only logs it.
    if unknown := [key for key in info["unexpected_keys"] if key.startswith(("decoder.", "post_quant_conv."))]:
        raise CheckpointError(
            f"checkpoint: {kind.__name__} as config.json describes it has no place for {len(unknown)} of the decoder's "
            f"tensors in {folder}, {unknown[0]} among them; config and weights do not belong together"
        )
    missing = [key for key in info["missing_keys"] if not key.startswith(_UNUSED)]
    if missing or info["mismatched_keys"]:
        wrong = missing or [str(key) for key in info["mismatched_keys"]]
        raise CheckpointError(
            f"checkpoint: the weights in {folder} lack {len(wrong)} of the decoder's tensors that config.json calls "
            f"for, {wrong[0]} among them; config and weights do not belong together"
        )
    return vae


def _check_config(path: Path) -> Any:
    """The diffusers class that config.json names."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {path} is not readable as JSON: {error}; download it again") from error
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found not in _CLASSES:
        raise CheckpointError(
            f"checkpoint: {path} describes {found or 'no diffusers model'}, expected {', '.join(_CLASSES)}; pass the "
            "VAE's folder, not another component's"
        )
    return _CLASSES[found]
