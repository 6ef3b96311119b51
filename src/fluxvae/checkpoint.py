"""Every kind of checkpoint to a diffusers ``AutoencoderKL``, or a `CheckpointError` that says what to do.

Sources: ``"demo"``, a diffusers VAE folder, a pipeline folder that holds ``vae/``, a single ``.safetensors`` file in
BFL's layout (FLUX.1's ``ae.safetensors``), or a hub id. Only safetensors are read: nothing here unpickles a file.
The encoder is dropped after loading; decoding never uses it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from fluxvae.errors import CheckpointError, InvalidOptionError

__all__ = ["ASSETS", "load_vae", "weights_file"]

ASSETS = Path(__file__).parent / "assets"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What loading libraries raise for files that are damaged or of another model.
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)


def load_vae(
    source: str | Path, *, subfolder: str | None = None, revision: str | None = None, dtype: torch.dtype | None = None
) -> AutoencoderKL:
    """Load the decoder half of a VAE, on the CPU, in evaluation mode, without gradients.

    Args:
        source: ``"demo"``; a folder with ``config.json``, or with ``vae/config.json``; a ``.safetensors`` file with
            BFL's key names; or a hub id ``"owner/name"``, downloaded once into the hub's cache.
        subfolder: where in the folder or repository the VAE lies; found by itself where it is ``vae``.
        revision: branch, tag or commit; for hub ids only.
        dtype: of the weights; as stored where left out.

    Raises:
        CheckpointError: nothing there, damaged, another model's, or out of reach.
        InvalidOptionError: subfolder or revision given where it means nothing.
    """
    found = _locate(source, subfolder, revision)
    vae = _load_file(found, dtype) if found.is_file() else _load_folder(found, dtype)
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


def _load_folder(folder: Path, dtype: torch.dtype | None) -> AutoencoderKL:
    _check_config(folder / "config.json")
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointError(
            f"checkpoint: {weights} is missing beside its config.json; download or export the VAE again "
            "(save_pretrained writes both)"
        )
    _tensor_shapes(weights)
    return _from_pretrained(folder, dtype)


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
        f"checkpoint: {where} is not in the hub's cache and the hub cannot be reached ({_first_line(failure)}); check "
        "the connection, or pass a local folder or file"
    ) from failure


def _from_pretrained(folder: Path, dtype: torch.dtype | None) -> AutoencoderKL:
    try:
        vae, info = AutoencoderKL.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"checkpoint: the weights in {folder} cannot be loaded: {_first_line(error)}; they are damaged or of "
            "another model than config.json says: download or export them again"
        ) from error
    # diffusers fills missing weights with random ones and only logs it.
    missing = [key for key in info["missing_keys"] if not key.startswith("encoder.")]
    if missing or info["mismatched_keys"]:
        wrong = missing or [str(key) for key in info["mismatched_keys"]]
        raise CheckpointError(
            f"checkpoint: the weights in {folder} lack {len(wrong)} of the decoder's tensors that config.json calls "
            f"for, {wrong[0]} among them; config and weights do not belong together"
        )
    return vae


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {path} is not readable as JSON: {error}; download it again") from error
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != "AutoencoderKL":
        raise CheckpointError(
            f"checkpoint: {path} describes {found or 'no diffusers model'}, expected AutoencoderKL; pass the VAE's "
            "folder, not another component's"
        )


def _load_file(path: Path, dtype: torch.dtype | None) -> AutoencoderKL:
    """A single file in BFL's layout, read with FLUX's config, which ships here so that no network is needed."""
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"checkpoint: {path} is a {path.suffix or 'suffixless'} file; expected .safetensors. Other formats can "
            "run code when they are read: convert it first"
        )
    shapes = _tensor_shapes(path)
    prefix = next((p for p in ("", "vae.", "first_stage_model.") if f"{p}decoder.conv_in.weight" in shapes), None)
    if prefix is None or f"{prefix}decoder.up.0.block.0.conv1.weight" not in shapes:
        raise CheckpointError(
            f"checkpoint: {path} holds {len(shapes)} tensors, but not decoder.up.0.block.0.conv1.weight; expected a "
            "VAE in BFL's layout, such as FLUX.1's ae.safetensors (a diffusers VAE is loaded by its folder)"
        )
    channels = shapes[f"{prefix}decoder.conv_in.weight"][1]
    if channels != 16 or f"{prefix}post_quant_conv.weight" in shapes:
        family = {32: ", as FLUX.2's has", 4: ", as SD's and SDXL's have"}.get(channels, "")
        raise CheckpointError(
            f"checkpoint: {path} is a VAE with {channels} latent channels{family}; a single file is read as FLUX.1's, "
            "with 16 and no quantisation convolutions: load others by their diffusers folder"
        )
    levels = sorted(
        {int(m[1]) for m in (re.match(rf"{re.escape(prefix)}decoder\.up\.(\d+)\.", k) for k in shapes) if m}
    )
    widths = [shapes[f"{prefix}decoder.up.{level}.block.0.conv1.weight"][0] for level in levels]
    blocks = sum(
        re.fullmatch(rf"{re.escape(prefix)}decoder\.up\.0\.block\.\d+\.conv1\.weight", k) is not None for k in shapes
    )
    try:
        vae = AutoencoderKL.from_single_file(
            str(path),
            config=str(ASSETS / "flux1"),
            local_files_only=True,
            torch_dtype=dtype,
            block_out_channels=widths,
            layers_per_block=blocks - 1,
        )
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"checkpoint: {path} cannot be read as FLUX.1's VAE: {_first_line(error)}; download it again"
        ) from error
    missing = [name for name, tensor in vae.decoder.state_dict().items() if tensor.is_meta]
    if missing:
        raise CheckpointError(
            f"checkpoint: {path} lacks {len(missing)} of the decoder's tensors, {missing[0]} among them; download it "
            "again"
        )
    return vae


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes from the file's header; reading it finds a truncated file before any tensor is loaded."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint: {path} is not a whole safetensors file: {_first_line(error)}; it is truncated or another "
            "kind of file: download it again"
        ) from error


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
