"""Single ``.safetensors`` files: FLUX.1's ``ae.safetensors`` and FLUX.2's in BFL's layout, previews; without a network.

The architecture is read from the shapes in the file's header: widths, blocks, latent channels. What no file holds comes
from here: FLUX.1's factors from the config that ships, FLUX.2's eps from diffusers' default, which is BFL's own 1e-4.

Source of FLUX.2's key names: BFL's ``flux2/autoencoder.py``, whose quantisation convolutions lie inside encoder and
decoder, and diffusers' ``scripts/convert_flux2_to_diffusers.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as load_tensors

from fluxvae.decoder_options import VAE
from fluxvae.errors import CheckpointError
from fluxvae.preview_files import is_preview, load_preview

__all__ = ["ASSETS", "LOAD_ERRORS", "first_line", "load_file", "tensor_shapes"]

ASSETS = Path(__file__).parent / "assets"
# What loading libraries raise for files that are damaged or of another model.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, IndexError, SafetensorError)
_STATISTICS = ("bn.running_mean", "bn.running_var")


def load_file(path: Path, dtype: torch.dtype | None) -> VAE:
    """Load a single file; what it is, its tensors say.

    Raises:
        CheckpointError: another kind of file or model, truncated, or incomplete.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"checkpoint: {path} is a {path.suffix or 'suffixless'} file; expected .safetensors. Other formats can "
            "run code when they are read: convert it first"
        )
    shapes = tensor_shapes(path)
    if is_preview(shapes):
        return load_preview(path, shapes, None, dtype)
    prefix = next((p for p in ("", "vae.", "first_stage_model.") if f"{p}decoder.conv_in.weight" in shapes), None)
    if prefix is None or f"{prefix}decoder.up.0.block.0.conv1.weight" not in shapes:
        raise CheckpointError(
            f"checkpoint: {path} holds {len(shapes)} tensors, but not decoder.up.0.block.0.conv1.weight; expected a "
            "VAE in BFL's layout, such as FLUX.1's ae.safetensors, or a preview such as taef2.safetensors (a diffusers "
            "VAE is loaded by its folder)"
        )
    shapes = {key.removeprefix(prefix): shape for key, shape in shapes.items()}
    channels = shapes["decoder.conv_in.weight"][1]
    flux2 = channels == 32 and all(key in shapes for key in _STATISTICS)
    if not flux2 and (channels != 16 or "post_quant_conv.weight" in shapes):
        family = {
            32: ", as FLUX.2's has, but not its bn.running_mean and bn.running_var",
            4: ", as SD's and SDXL's have",
        }
        raise CheckpointError(
            f"checkpoint: {path} is a VAE with {channels} latent channels{family.get(channels, '')}; a single file is "
            "read as FLUX.1's, with 16 and no quantisation convolutions, or as FLUX.2's, with 32 and their statistics: "
            "load others by their diffusers folder"
        )
    levels = sorted({int(m[1]) for m in (re.match(r"decoder\.up\.(\d+)\.", key) for key in shapes) if m})
    try:
        widths = [shapes[f"decoder.up.{level}.block.0.conv1.weight"][0] for level in levels]
        blocks = sum(re.fullmatch(r"decoder\.up\.0\.block\.\d+\.conv1\.weight", key) is not None for key in shapes)
        vae = (_load_flux2 if flux2 else _load_flux1)(path, prefix, widths, blocks - 1, dtype)
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"checkpoint: {path} cannot be read as {'FLUX.2' if flux2 else 'FLUX.1'}'s VAE: {first_line(error)}; "
            "download it again"
        ) from error
    missing = [
        name
        for name, tensor in vae.state_dict().items()
        if tensor.is_meta and not name.startswith(("encoder.", "quant"))
    ]
    if missing:
        raise CheckpointError(
            f"checkpoint: {path} lacks {len(missing)} of the decoder's tensors, {missing[0]} among them; download it "
            "again"
        )
    return vae


def _load_flux1(path: Path, _: str, widths: list[int], layers: int, dtype: torch.dtype | None) -> AutoencoderKL:
    return AutoencoderKL.from_single_file(
        str(path),
        config=str(ASSETS / "flux1"),
        local_files_only=True,
        torch_dtype=dtype,
        block_out_channels=widths,
        layers_per_block=layers,
    )


def _load_flux2(
    path: Path, prefix: str, widths: list[int], layers: int, dtype: torch.dtype | None
) -> AutoencoderKLFlux2:
    """diffusers reads no single file of this class; its conversion of the modules all these VAEs share does apply."""
    weights = {key.removeprefix(prefix): tensor for key, tensor in load_tensors(path).items()}
    kinds = ("UpDecoderBlock2D",) * len(widths)
    with torch.device("meta"):
        vae = AutoencoderKLFlux2(
            block_out_channels=tuple(widths),
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=kinds,
            layers_per_block=layers,
        )
    vae.encoder = vae.quant_conv = None  # of other widths than the decoder's in FLUX.2's small decoder, and unused
    decoder = {key: tensor for key, tensor in weights.items() if key.startswith("decoder.")}
    converted = convert_ldm_vae_checkpoint(decoder, vae.config)
    for part in ("weight", "bias"):
        inside = weights.get(f"decoder.post_quant_conv.{part}")
        converted[f"post_quant_conv.{part}"] = weights[f"post_quant_conv.{part}"] if inside is None else inside
    converted |= {key: weights[key] for key in _STATISTICS}
    converted["bn.num_batches_tracked"] = torch.tensor(0)  # of training only
    vae.load_state_dict(converted, strict=False, assign=True)  # what is missing stays on "meta": load_file names it
    return vae if dtype is None else vae.to(dtype)


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes from the file's header; reading it finds a truncated file before any tensor is loaded.

    Raises:
        CheckpointError: not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint: {path} is not a whole safetensors file: {first_line(error)}; it is truncated or another "
            "kind of file: download it again"
        ) from error


def first_line(error: BaseException | None) -> str:
    """Of an error's message, for one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
