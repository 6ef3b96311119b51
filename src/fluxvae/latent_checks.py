"""What a caller can get wrong about latents, their size and their options: refused before any work, by name.

Everything here is asked through `LatentFormat`, which says what the checkpoint expects.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latent_layout import other_family, read_layout, unpacked_shape
from fluxvae.packing import floor_size, token_positions

if TYPE_CHECKING:
    from fluxvae.latents import LatentFormat

__all__ = ["DTYPES", "check_latents", "check_options", "plain"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
            ``(B, 4*C, gh, gw)``; unpacked ones also as one frame, ``(B, C, 1, lh, lw)``; one image also without its
            batch (`latent_layout`); float32, bfloat16 or float16; finite. On the ``meta`` device
            there are no values: the shape alone is checked.
        height, width: pixels. Needed for packed latents without ids, floored to multiples of 16 (with a
            `SizeFlooredWarning`), and where they alone tell C packed images from one image without its batch. For
            others they may be left out; if given they must agree.
        latent_ids: of FLUX.2's packed latents: (B, N, 4), where each token belongs; (N, 4) with one image's (N, 4*C).
        raw: as for `Decoder.decode`.

    Returns:
        (height, width) in pixels of the decoded image.

    Raises:
        InvalidLatentsError: the rank, features, patch count, size, ids, dtype or a value is wrong.
        InvalidOptionError: ``raw`` is no bool, or true for a preview.
    """
    _check_raw(format, raw)
    if not isinstance(latents, torch.Tensor):
        raise InvalidLatentsError(_no_tensor(format, latents))
    plain(latents)
    if latents.dtype not in DTYPES:
        raise InvalidLatentsError(
            f"latents: got dtype {latents.dtype}, expected float32, bfloat16 or float16; convert with latents.float()"
        )
    shape = tuple(latents.shape)
    if latents.numel() == 0:
        raise InvalidLatentsError(
            f"latents: got shape {shape}, which holds no values; every dimension, the batch included, must be at least "
            "1"
        )
    if latent_ids is not None and not format.flux2:
        raise InvalidLatentsError(
            f"latent_ids: got ids with latents of shape {shape}; they are for FLUX.2's latents only, and this "
            "checkpoint is another's: leave them out"
        )
    layout = read_layout(shape, (format,), height, width, with_ids=latent_ids is not None)
    if layout.size is None:
        batch, patches, _ = layout.shape
        if latents.ndim == 2 and isinstance(latent_ids, torch.Tensor) and latent_ids.ndim == 2:
            latent_ids = latent_ids[None]
        size = _check_packed(format, shape, batch, patches, height, width, latent_ids)
    else:
        size = layout.size
        _check_unpacked(format, shape, layout.shape, raw)
    if not latents.is_meta:
        _check_finite(latents)
    return size


def _no_tensor(format: LatentFormat, latents: object) -> str:
    if isinstance(latents, (list, tuple)):
        shapes = sorted({tuple(one.shape) for one in latents if isinstance(one, torch.Tensor)})
        of = f" of tensors of shape {', '.join(map(str, shapes[:3]))}" if shapes else ""
        return (
            f"latents: got a {type(latents).__name__} of {len(latents)}{of}, expected one torch.Tensor: packed (batch, "
            f"patches, {format.packed_features}) or unpacked {unpacked_shape(format)}; torch.stack(latents) makes one "
            "of images without a batch, torch.cat(latents) of those with one, where all have one size"
        )
    return (
        f"latents: got {type(latents).__name__}, expected a torch.Tensor; "
        "torch.from_numpy(array) turns a NumPy array into one"
    )


def _check_packed(
    format: LatentFormat,
    shape: tuple[int, ...],
    batch: int,
    patches: int,
    height: object,
    width: object,
    latent_ids: object,
) -> tuple[int, int]:
    multiple = format.packed_multiple
    if height is None and width is None and latent_ids is not None:
        _, (gh, gw) = token_positions(latent_ids, batch, patches)
        return gh * multiple, gw * multiple
    if height is None or width is None:
        ids = ", or latent_ids, which tell it" if format.flux2 else ""
        raise InvalidLatentsError(
            f"height and width: got height={height}, width={width}; packed latents need both, in pixels{ids}: the "
            f"shape {shape} alone does not tell a wide image from a tall one"
        )
    try:
        size = floor_size(height, width, patches, multiple)
    except InvalidLatentsError as error:
        raise InvalidLatentsError(f"{error}{other_family(shape, format, packed=True)}") from None
    if latent_ids is not None:
        token_positions(latent_ids, batch, patches, (size[0] // multiple, size[1] // multiple))
    return size


def _check_unpacked(format: LatentFormat, shape: tuple[int, ...], images: tuple[int, ...], raw: bool | None) -> None:
    _, channels, rows, columns = images
    in_patches = channels != format.channels
    if format.flux2 and not in_patches and raw is None:
        # Both exist: Flux2KleinPipeline's output_type="latent" is raw, BriaFibo2Pipeline's is normalised.
        raise InvalidLatentsError(
            f"latents: got shape {shape}, which may be raw latents (output_type='latent' of "
            "Flux2KleinPipeline) or normalised ones (the transformer's, unpatchified); say raw=True or raw=False"
        )
    if format.batch_norm is not None and not in_patches and not raw and (rows % 2 or columns % 2):
        raise InvalidLatentsError(
            f"latents: got shape {shape}; normalised latents come in 2x2 patches, so expected an "
            "even height/8 and width/8"
        )


def plain(latents: torch.Tensor) -> torch.Tensor:
    """The values of ``latents`` as a tensor of PyTorch's own class, without a copy where they lie as they read.

    Raises:
        InvalidLatentsError: a tensor that does not hold its values itself, densely: compiled kernels read memory as it
            is.
    """
    kind = type(latents).__name__
    if type(latents).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # FakeTensor, DTensor, quantised ones
        raise InvalidLatentsError(
            f"latents: got a {kind}, which stands for values that are elsewhere or nowhere; expected a plain "
            "torch.Tensor: a DTensor becomes one by full_tensor(), a quantised one by dequantize()"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(latents):
        raise InvalidLatentsError(
            "latents: got a tensor inside torch.vmap, grad or another transform of torch.func, which a decode cannot "
            "take part in; decode outside of it: a batch needs no vmap"
        )
    if latents.layout != torch.strided or latents.is_nested:
        layout = "nested" if latents.is_nested else str(latents.layout).removeprefix("torch.")
        raise InvalidLatentsError(f"latents: got a {layout} tensor, expected a dense one: latents.to_dense() makes one")
    return latents.detach().as_subclass(torch.Tensor).resolve_neg()


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
