"""What a caller can get wrong about latents, their size and their options: refused before any work, by name.

Everything here is asked through `LatentFormat`, which says what the checkpoint expects.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.packing import floor_size, pixels, token_positions

if TYPE_CHECKING:
    from fluxvae.latents import LatentFormat

__all__ = ["DTYPES", "check_latents", "check_options"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FAMILIES = {
    4: "SD or SDXL (4 latent channels)",
    16: "FLUX.1, one of its borrowers, or SD3 (16 latent channels)",
    32: "FLUX.2 (32 latent channels)",
    128: "FLUX.2 in 2x2 patches (32 latent channels)",
}
_PACKED_FAMILIES = {
    64: "FLUX.1 (16 latent channels)",
    128: "FLUX.2 (32 latent channels)",
    16: "SD or SDXL (4 latent channels)",
}


def check_latents(
    format: LatentFormat,
    latents: object,
    height: object = None,
    width: object = None,
    *,
    latent_ids: object = None,
    raw: bool | None = None,
) -> tuple[int, int]:
    """Say what size these latents decode to, or why they cannot be decoded.

    Args:
        latents: packed ``(B, gh*gw, 4*C)``, or unpacked ``(B, C, lh, lw)``; for FLUX.2 also in patches
            ``(B, 4*C, gh, gw)``; float32, bfloat16 or float16; finite. On the ``meta`` device
            there are no values: the shape alone is checked.
        height, width: pixels. Needed for packed latents without ids, floored to multiples of 16 (with a
            `SizeFlooredWarning`). For others they may be left out; if given they must agree.
        latent_ids: of FLUX.2's packed latents: (B, N, 4), where each token belongs.
        raw: as for `Decoder.decode`.

    Returns:
        (height, width) in pixels of the decoded image.

    Raises:
        InvalidLatentsError: the rank, features, patch count, size, ids, dtype or a value is wrong.
        InvalidOptionError: ``raw`` is no bool, or true for a preview.
    """
    _check_raw(format, raw)
    if not isinstance(latents, torch.Tensor):
        raise InvalidLatentsError(
            f"latents: got {type(latents).__name__}, expected a torch.Tensor; "
            "torch.from_numpy(array) turns a NumPy array into one"
        )
    if latents.ndim not in (3, 4):
        raise InvalidLatentsError(
            f"latents: got {latents.ndim} dimensions, shape {tuple(latents.shape)}; expected packed latents "
            f"(batch, patches, {format.packed_features}) or unpacked ones {_unpacked(format)}"
        )
    if latents.dtype not in DTYPES:
        raise InvalidLatentsError(
            f"latents: got dtype {latents.dtype}, expected float32, bfloat16 or float16; convert with latents.float()"
        )
    if latents.numel() == 0:
        raise InvalidLatentsError(
            f"latents: got shape {tuple(latents.shape)}, which holds no values; every dimension, the batch "
            "included, must be at least 1"
        )
    if latent_ids is not None and (latents.ndim != 3 or not format.flux2):
        wanted = "packed latents only" if format.flux2 else "FLUX.2's latents only, and this checkpoint is another's"
        raise InvalidLatentsError(
            f"latent_ids: got ids with latents of shape {tuple(latents.shape)}; they are for {wanted}: leave them out"
        )
    if latents.ndim == 3:
        size = _check_packed(format, latents, height, width, latent_ids)
    else:
        size = _check_unpacked(format, latents, height, width, raw)
    if not latents.is_meta:
        _check_finite(latents)
    return size


def _unpacked(format: LatentFormat) -> str:
    scale = format.vae_scale_factor
    patches = f", or in patches (batch, {4 * format.channels}, height/{2 * scale}, width/{2 * scale})"
    return f"(batch, {format.channels}, height/{scale}, width/{scale})" + (patches if format.flux2 else "")


def _check_packed(
    format: LatentFormat, latents: torch.Tensor, height: object, width: object, latent_ids: object
) -> tuple[int, int]:
    batch, patches, features = latents.shape
    if features != format.packed_features:
        looks = f", which looks like {_PACKED_FAMILIES[features]}" if features in _PACKED_FAMILIES else ""
        ours = f", {_PACKED_FAMILIES[format.packed_features]}" if format.packed_features in _PACKED_FAMILIES else ""
        raise InvalidLatentsError(
            f"latents: got {features} features per token{looks}; expected {format.packed_features} for this "
            f"checkpoint{ours}; use the checkpoint of the model that made the latents"
        )
    multiple = format.packed_multiple
    if height is None and width is None and latent_ids is not None:
        _, (gh, gw) = token_positions(latent_ids, batch, patches)
        return gh * multiple, gw * multiple
    if height is None or width is None:
        ids = ", or latent_ids, which tell it" if format.flux2 else ""
        raise InvalidLatentsError(
            f"height and width: got height={height}, width={width}; packed latents need both, in pixels{ids}: the "
            f"shape {tuple(latents.shape)} alone does not tell a wide image from a tall one"
        )
    size = floor_size(height, width, patches, multiple)
    if latent_ids is not None:
        token_positions(latent_ids, batch, patches, (size[0] // multiple, size[1] // multiple))
    return size


def _check_unpacked(
    format: LatentFormat, latents: torch.Tensor, height: object, width: object, raw: bool | None
) -> tuple[int, int]:
    channels, rows, columns = latents.shape[1:]
    in_patches = format.flux2 and channels == 4 * format.channels
    if channels != format.channels and not in_patches:
        looks = f", which looks like {_FAMILIES[channels]}" if channels in _FAMILIES else ""
        raise InvalidLatentsError(
            f"latents: got {channels} channels, shape {tuple(latents.shape)}{looks}; expected {_unpacked(format)} "
            "for this checkpoint; use the checkpoint of the model that made the latents"
        )
    if format.flux2 and not in_patches and raw is None:
        # Both exist: Flux2KleinPipeline's output_type="latent" is raw, BriaFibo2Pipeline's is normalised.
        raise InvalidLatentsError(
            f"latents: got shape {tuple(latents.shape)}, which may be raw latents (output_type='latent' of "
            "Flux2KleinPipeline) or normalised ones (the transformer's, unpatchified); say raw=True or raw=False"
        )
    if format.batch_norm is not None and not in_patches and not raw and (rows % 2 or columns % 2):
        raise InvalidLatentsError(
            f"latents: got shape {tuple(latents.shape)}; normalised latents come in 2x2 patches, so expected an "
            "even height/8 and width/8"
        )
    scale = format.packed_multiple if in_patches else format.vae_scale_factor
    size = (rows * scale, columns * scale)
    for name, given, actual in (("height", height, size[0]), ("width", width, size[1])):
        if given is not None and pixels(name, given) != actual:
            raise InvalidLatentsError(
                f"{name}: got {given}, but unpacked latents of shape {tuple(latents.shape)} decode to "
                f"{size[0]}x{size[1]} (height x width); leave {name} out or pass {actual}"
            )
    return size


def check_options(
    format: LatentFormat,
    scaling_factor: object = None,
    shift_factor: object = None,
    batch_norm_eps: object = None,
    raw: bool | None = None,
) -> None:
    """Refuse what this checkpoint has no place for: nothing is ignored.

    Raises:
        InvalidOptionError: a factor where there are statistics, an eps where there are factors, any for a preview
            or with ``raw``; not a finite number; a scaling factor of 0; a negative eps.
    """
    _check_raw(format, raw)
    given = {"scaling_factor": scaling_factor, "shift_factor": shift_factor, "batch_norm_eps": batch_norm_eps}
    for name, value in given.items():
        if value is None:
            continue
        number = _number(name, value)
        if raw:
            raise InvalidOptionError(f"{name}: got {value} with raw=True, which rescales nothing; leave one out")
        if format.preview:
            raise InvalidOptionError(
                f"{name}: got {value}; a preview (AutoencoderTiny) takes latents as the transformer leaves them: "
                f"leave {name} out"
            )
        if (name == "batch_norm_eps") != (format.batch_norm is not None):
            has = "scaling_factor" if format.batch_norm is None else "BatchNorm statistics (FLUX.2)"
            raise InvalidOptionError(f"{name}: got {value}; this checkpoint has {has} instead: leave {name} out")
        if name == "shift_factor" and format.latents_mean is not None:
            raise InvalidOptionError(
                f"shift_factor: got {value}; this checkpoint has latents_mean instead: leave shift_factor out"
            )
        if name == "scaling_factor" and number == 0:
            raise InvalidOptionError("scaling_factor: got 0, expected a number other than 0: latents are divided by it")
        if name == "batch_norm_eps" and number < 0:
            raise InvalidOptionError(f"batch_norm_eps: got {value}, expected 0 or more: it is added to a variance")


def _check_raw(format: LatentFormat, raw: object) -> None:
    if raw is not None and not isinstance(raw, bool):
        raise InvalidOptionError(f"raw: got {raw!r}, expected True, False or None")
    if raw and format.preview:
        raise InvalidOptionError(
            "raw: got True; a preview (AutoencoderTiny) takes latents as the transformer leaves them, not the raw "
            "latents of the full VAE: pass the transformer's, or decode with the full VAE"
        )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidOptionError(f"{name}: got {value!r}, expected a finite number")
    return float(value)


def _check_finite(latents: torch.Tensor) -> None:
    finite = torch.isfinite(latents)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    where = tuple(int(i) for i in bad[0])
    raise InvalidLatentsError(
        f"latents: got {latents[where].item()} at index {list(where)} ({len(bad)} of {latents.numel()} values are NaN "
        "or Inf); expected finite values: look for the overflow in the step that made the latents"
    )
