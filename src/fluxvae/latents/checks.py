"""What a caller can get wrong about the shape of latents, their size and their options: refused by name.

No torch in here: what also looks at values is `values`. Everything is asked through `LatentFormat`, which says
what the checkpoint expects.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fluxvae.errors import InvalidLatentsError, InvalidOptionError
from fluxvae.latents.layout import other_family, read_layout
from fluxvae.latents.packing import floor_size, token_positions

if TYPE_CHECKING:
    from fluxvae.latents.format import LatentFormat

__all__ = ["check_options", "check_shape", "not_finite"]


def check_shape(
    format: LatentFormat,
    shape: tuple[int, ...],
    height: object = None,
    width: object = None,
    *,
    latent_ids: Any = None,
    raw: bool | None = None,
) -> tuple[int, int]:
    """Say what size latents of this shape decode to, or why they cannot be decoded.

    Args:
        shape: as of the latents that `values.check_latents` takes.
        height, width, latent_ids, raw: as there.

    Returns:
        (height, width) in pixels of the decoded image.

    Raises:
        InvalidLatentsError: the rank, features, patch count, size or ids are wrong.
        InvalidOptionError: ``raw`` is no bool, or true for a preview.
    """
    _check_raw(format, raw)
    if 0 in shape:
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
    if layout.size is not None:
        _check_unpacked(format, shape, layout.shape, raw)
        return layout.size
    batch, patches, _ = layout.shape
    if len(shape) == 2 and getattr(latent_ids, "ndim", None) == 2:
        latent_ids = latent_ids[None]
    return _check_packed(format, shape, batch, patches, height, width, latent_ids)


def not_finite(value: float, index: tuple[int, ...], bad: int, of: int) -> InvalidLatentsError:
    """The refusal of latents with NaN or Inf among them.

    Args:
        value, index: the first.
        bad, of: how many there are, of how many values.
    """
    return InvalidLatentsError(
        f"latents: got {value} at index {list(index)} ({bad} of {of} values are NaN or Inf); expected finite values: "
        "look for the overflow in the step that made the latents"
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
    """Refuse ``raw`` where it is no bool, or true for a preview."""
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
