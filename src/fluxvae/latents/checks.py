"""What can be wrong with the shape of latents, with their size and with the options: refused by name, before any work.

Nothing here needs PyTorch, unless there are position ids, so the gateway and the client check as the library does.
`values` checks the tensors themselves.

One mistake cannot be seen: if height and width are exchanged and both give the same number of patches (512x1024 and
1024x512), either is a valid reading of the same tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import layers_in, other_family, read_layout
from fluxvae.latents.packing import floor_size, token_positions
from fluxvae.latents.reading import FACTORS, Reading, check_feature_order, finite_number

if TYPE_CHECKING:
    import torch

__all__ = ["Settled", "check_options", "check_order", "check_shape", "not_finite"]


class Settled(NamedTuple):
    """What a shape and a reading say together, once both are checked."""

    shape: tuple[int, ...]
    """The shape of the latents with their batch and without frames, as in `layout.Layout`; `layout.in_shape` gives
    latents this shape. Packed layers are packed pictures here, one after the other."""
    height: int
    """The height, in pixels, of the image that is decoded: that of a packed size is floored to whole patches."""
    width: int
    places: torch.Tensor | None
    """(B, N) int64, where each token belongs, if ids say so; None where tokens come row by row or there are none."""


def check_shape(format: LatentFormat, shape: tuple[int, ...], reading: Reading) -> Settled:
    """Settle what latents of this shape decode to, or say why they cannot be decoded.

    Args:
        format: the checkpoint's.
        shape: packed ``(B, gh*gw, 4*C)``, or unpacked ``(B, C, lh, lw)``; for FLUX.2 also in patches
            ``(B, 4*C, gh, gw)``; unpacked ones also as one frame, ``(B, C, 1, lh, lw)``; one image also without its
            batch; for a checkpoint whose frames are layers also ``(B, L*gh*gw, 4*C)`` and ``(B, C, L, lh, lw)``
            (`layout`).
        reading: its height and width are needed for packed latents without ids, where a `SizeFlooredWarning` tells
            that they are floored to multiples of 16, and where only they tell C packed images from one image without
            its batch. For other latents they may be left out, but if they are given they must agree.

    Raises:
        InvalidLatentsError: the rank, the features, the number of patches, the size or the ids are wrong.
        InvalidOptionError: ``raw`` is no bool, or is true for a preview; a feature order is said of latents that
            are raw and in no patches, so that there are no features.
    """
    _check_raw(format, reading.raw)
    ids = reading.latent_ids
    if 0 in shape:
        raise InvalidLatentsError(
            f"latents: got shape {shape}, which holds no values; every dimension, the batch included, must be at least "
            "1"
        )
    if ids is not None and not format.flux2:
        raise InvalidLatentsError(
            f"latent_ids: got ids with latents of shape {shape}; they are for FLUX.2's latents only, and this "
            "checkpoint is another's: leave them out"
        )
    layout = read_layout(shape, (format,), reading.height, reading.width, with_ids=ids is not None)
    if layout.size is not None:
        _check_unpacked(format, shape, layout.shape, reading)
        return Settled(layout.shape, *layout.size, None)
    if len(shape) == 2 and ids is not None and getattr(ids, "ndim", 0) == 2:
        ids = ids[None]
    return _check_packed(format, shape, layout.shape, reading, ids)


def not_finite(value: float, index: tuple[int, ...], bad: int, of: int) -> InvalidLatentsError:
    """Return the error that refuses latents with NaN or Inf among them.

    Args:
        value, index: the first such value, and where it is.
        bad, of: how many of them there are, among how many values.
    """
    return InvalidLatentsError(
        f"latents: got {value} at index {list(index)} ({bad} of {of} values are NaN or Inf); expected finite values: "
        "look for the overflow in the step that made the latents"
    )


def _check_packed(
    format: LatentFormat, shape: tuple[int, ...], packed: tuple[int, ...], reading: Reading, ids: object
) -> Settled:
    """Settle packed latents, whose shape with their batch is ``packed``."""
    (batch, patches, _), multiple = packed, format.packed_multiple
    height, width = reading.height, reading.width
    if height is None and width is None and ids is not None:
        places, (gh, gw) = token_positions(ids, batch, patches)
        return Settled(packed, gh * multiple, gw * multiple, places)
    if height is None or width is None:
        or_ids = ", or latent_ids, which tell it" if format.flux2 else ""
        raise InvalidLatentsError(
            f"height and width: got height={height}, width={width}; packed latents need both, in pixels{or_ids}: the "
            f"shape {shape} alone does not tell a wide image from a tall one"
        )
    try:
        layers = layers_in(format, patches, height, width)
        batch, patches = batch * layers, patches // layers
        height, width = floor_size(height, width, patches, multiple)
    except InvalidLatentsError as error:
        raise InvalidLatentsError(f"{error}{other_family(shape, format, packed=True)}") from None
    if ids is None:
        return Settled((batch, patches, packed[2]), height, width, None)
    places, _ = token_positions(ids, batch, patches, (height // multiple, width // multiple))
    return Settled(packed, height, width, places)


def _check_unpacked(format: LatentFormat, shape: tuple[int, ...], images: tuple[int, ...], reading: Reading) -> None:
    _, channels, rows, columns = images
    in_patches, raw = channels != format.channels, reading.raw
    if reading.feature_order is not None and raw and not in_patches:
        raise InvalidOptionError(
            f"feature_order: got {reading.feature_order!r} with raw=True for latents of shape {shape}, which are in no "
            "patches and so have no features: leave it out"
        )
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


def check_options(format: LatentFormat, reading: Reading) -> None:
    """Refuse what is said about rescaling where this checkpoint has no place for it, so that nothing is ignored.

    Raises:
        InvalidOptionError: a factor for a checkpoint that has statistics, an eps for one that has none, or any of them
            for a preview or together with ``raw``; something that is not a finite number; a scaling factor of 0;
            a negative eps; a ``raw`` that is no bool, or is true for a preview; an unknown feature order, or any of one
            where the checkpoint is not of FLUX.2's class.
    """
    _check_raw(format, reading.raw)
    check_order(format, reading.feature_order)
    for name in FACTORS:
        value = getattr(reading, name)
        if value is None:
            continue
        number = finite_number(name, value)
        if reading.raw:
            raise InvalidOptionError(f"{name}: got {value} with raw=True, which rescales nothing; leave one out")
        if format.preview:
            raise InvalidOptionError(
                f"{name}: got {value}; a preview (AutoencoderTiny) takes latents as the transformer leaves them: "
                f"leave {name} out"
            )
        if format.frames:
            raise InvalidOptionError(
                f"{name}: got {value}; this checkpoint has latents_mean and latents_std instead: leave {name} out"
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


def check_order(format: LatentFormat, order: object) -> None:
    """Check a `Reading.feature_order` for a checkpoint; `check_options` does it too.

    Raises:
        InvalidOptionError: the order is unknown, or the checkpoint is not of FLUX.2's class, or is a preview.
    """
    check_feature_order(order)
    if order is not None and (format.preview or not format.flux2):
        whose = "a preview (AutoencoderTiny)" if format.preview else "a checkpoint that is not AutoencoderKLFlux2"
        raise InvalidOptionError(
            f"feature_order: got {order!r} for {whose}; only AutoencoderKLFlux2's latents come in two orders: leave it "
            "out"
        )


def _check_raw(format: LatentFormat, raw: object) -> None:
    if raw is not None and not isinstance(raw, bool):
        raise InvalidOptionError(f"raw: got {raw!r}, expected True, False or None")
    if raw and format.preview:
        raise InvalidOptionError(
            "raw: got True; a preview (AutoencoderTiny) takes latents as the transformer leaves them, not the raw "
            "latents of the full VAE: pass the transformer's, or decode with the full VAE"
        )
