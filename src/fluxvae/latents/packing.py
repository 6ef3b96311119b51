"""Tokens to latent images and back: the layouts of FLUX.1 and FLUX.2, as pure functions.

Both families cut latents into 2x2 patches and put the four values of a patch and channel side by side, in the order
(channel, row, column). FLUX.1's pipelines keep tokens in rows; FLUX.2's name each token's place by position ids.
Ideogram 4 has FLUX.2's VAE, and the values of a patch in the order (row, column, channel).

Source of the layouts: diffusers' ``FluxPipeline._pack_latents`` and ``_unpack_latents``, ``Flux2Pipeline``'s
``_unpack_latents_with_ids`` and ``_unpatchify_latents``, ``Ideogram4Pipeline.__call__``; BFL's ``sampling.unpack``.
"""

from __future__ import annotations

import operator
import warnings
from typing import TYPE_CHECKING

from fluxvae.errors import InvalidLatentsError

if TYPE_CHECKING:
    import torch

__all__ = [
    "FEATURE_ORDERS",
    "SizeFlooredWarning",
    "floor_size",
    "pack_latents",
    "patchify",
    "pixels",
    "sort_tokens",
    "token_positions",
    "unpack_latents",
    "unpack_rows",
    "unpatchify",
]

FEATURE_ORDERS = ("channel_row_column", "row_column_channel")
"""The orders in which the 4*C features of a 2x2 patch may come. The first is that of all models but Ideogram 4."""


class SizeFlooredWarning(UserWarning):
    """The size asked for is not a multiple of 16, so the next smaller one is decoded, as FluxPipeline does."""


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Pack 2x2 patches of latents into tokens, row by row. The transformer works on such tokens.

    Args:
        latents: (B, C, lh, lw), where lh and lw are even.

    Returns:
        (B, lh/2 * lw/2, 4*C) in the same dtype; feature ``4*c + 2*dy + dx`` of token ``gw*y + x`` is
        ``latents[b, c, 2*y + dy, 2*x + dx]``.

    Raises:
        InvalidLatentsError: there are not four dimensions, or lh or lw is odd.
    """
    if latents.ndim != 4 or latents.shape[2] % 2 or latents.shape[3] % 2 or latents.numel() == 0:
        raise InvalidLatentsError(
            f"latents: got shape {tuple(latents.shape)}, expected (batch, channels, height/8, width/8) with even "
            "height/8 and width/8; odd latents cannot be packed, decode them unpacked"
        )
    b, c, lh, lw = latents.shape
    patches = latents.reshape(b, c, lh // 2, 2, lw // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (lh // 2) * (lw // 2), 4 * c)


def unpack_latents(packed: torch.Tensor, height: int, width: int, *, vae_scale_factor: int = 8) -> torch.Tensor:
    """Undo `pack_latents`: turn tokens back into a latent image.

    Args:
        packed: (B, gh*gw, 4*C).
        height, width: the size of the image in pixels. It is floored to multiples of ``2 * vae_scale_factor``, with a
            `SizeFlooredWarning`.
        vae_scale_factor: how many pixels there are for each latent, in each direction.

    Returns:
        (B, C, 2*gh, 2*gw) in the same dtype, contiguous.

    Raises:
        InvalidLatentsError: there are not three dimensions, the number of features is not a multiple of 4, or the
            number of patches is not ``(height // 16) * (width // 16)``.
    """
    if packed.ndim != 3 or packed.shape[2] % 4 or packed.numel() == 0:
        raise InvalidLatentsError(
            f"latents: got shape {tuple(packed.shape)}, expected packed latents (batch, patches, 4 * channels)"
        )
    multiple = 2 * vae_scale_factor
    height, width = floor_size(height, width, packed.shape[1], multiple)
    return unpack_rows(packed, height // multiple, width // multiple)


def unpack_rows(packed: torch.Tensor, gh: int, gw: int, *, feature_order: str | None = None) -> torch.Tensor:
    """Turn tokens (B, gh*gw, 4*C) that come row by row into a latent image (B, C, 2*gh, 2*gw), contiguous.

    Args:
        feature_order: one of `FEATURE_ORDERS`; None is the first.
    """
    b, _, features = packed.shape
    return unpatchify(packed.mT.reshape(b, features, gh, gw), feature_order=feature_order)


def patchify(latents: torch.Tensor, *, feature_order: str | None = None) -> torch.Tensor:
    """Put 2x2 patches into channels: (B, C, 2*gh, 2*gw) to (B, 4*C, gh, gw).

    Args:
        feature_order: which channel ``latents[b, c, 2*y + dy, 2*x + dx]`` becomes: ``"channel_row_column"``, or None,
            ``4*c + 2*dy + dx``; ``"row_column_channel"`` ``(2*dy + dx)*C + c``.
    """
    b, c, lh, lw = latents.shape
    patches = latents.reshape(b, c, lh // 2, 2, lw // 2, 2)
    order = (0, 3, 5, 1, 2, 4) if feature_order == FEATURE_ORDERS[1] else (0, 1, 3, 5, 2, 4)
    return patches.permute(order).reshape(b, 4 * c, lh // 2, lw // 2)


def unpatchify(patches: torch.Tensor, *, feature_order: str | None = None) -> torch.Tensor:
    """Undo `patchify`: (B, 4*C, gh, gw) to (B, C, 2*gh, 2*gw) in the same dtype, contiguous."""
    b, features, gh, gw = patches.shape
    c = features // 4
    if feature_order == FEATURE_ORDERS[1]:
        latents = patches.reshape(b, 2, 2, c, gh, gw).permute(0, 3, 4, 1, 5, 2)
    else:
        latents = patches.reshape(b, c, 2, 2, gh, gw).permute(0, 1, 4, 2, 5, 3)
    # reshape alone would return a view of one patch, channels last, for which convolutions have other last bits.
    return latents.reshape(b, c, 2 * gh, 2 * gw).contiguous()


def sort_tokens(packed: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Bring tokens that come in any order into the order row by row.

    Args:
        packed: (B, N, F).
        places: (B, N) int64, where each token belongs, as `token_positions` returns it; every place occurs once.

    Returns:
        (B, N, F), with token ``i`` of image ``b`` at ``places[b, i]``.
    """
    import torch  # not at the top of the module, because sizes and formats are read without PyTorch

    index = places.to(packed.device).unsqueeze(2).expand_as(packed)
    return torch.empty_like(packed).scatter_(1, index, packed)


def token_positions(
    latent_ids: object, batch: int, tokens: int, grid: tuple[int, int] | None = None
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Read position ids, and check that they name every cell of the grid exactly once in every image.

    Args:
        latent_ids: (B, N, 4) whole numbers (t, row, column, l), as ``Flux2Pipeline._prepare_latent_ids`` makes them;
            t and l are 0 in what it decodes.
        batch, tokens: B and N of the latents.
        grid: the (gh, gw) that the size calls for. None: the grid is as large as the ids say, as in `Flux2Pipeline`.

    Returns:
        (B, N) int64, ``gw * row + column``, and the grid.

    Raises:
        InvalidLatentsError: the ids have another shape or dtype, lie outside the grid, or name a place twice or not at
            all.
    """
    import torch

    if not isinstance(latent_ids, torch.Tensor):
        raise InvalidLatentsError(f"latent_ids: got {type(latent_ids).__name__}, expected a torch.Tensor")
    if tuple(latent_ids.shape) != (batch, tokens, 4):
        raise InvalidLatentsError(
            f"latent_ids: got shape {tuple(latent_ids.shape)}, expected ({batch}, {tokens}, 4): for each token of each "
            "image (t, row, column, l), as Flux2Pipeline prepares them"
        )
    if latent_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise InvalidLatentsError(
            f"latent_ids: got dtype {latent_ids.dtype}, expected whole numbers; convert with latent_ids.long()"
        )
    ids = latent_ids.long()
    if bool(ids[..., ::3].any()):
        raise InvalidLatentsError(
            "latent_ids: got a t or l other than 0, which a reference image's tokens have; expected the tokens of the "
            "picture alone"
        )
    rows, columns = ids[..., 1], ids[..., 2]
    gh, gw = grid if grid is not None else (int(rows.max()) + 1, int(columns.max()) + 1)
    outside = (rows < 0) | (rows >= gh) | (columns < 0) | (columns >= gw)
    if bool(outside.any()):
        b, n = outside.nonzero()[0].tolist()
        raise InvalidLatentsError(
            f"latent_ids: got row {int(rows[b, n])}, column {int(columns[b, n])} for token {n} of image {b}, outside "
            f"the grid of {gh} x {gw} patches; expected ids from 0, and the height and width the latents were made for"
        )
    if gh * gw != tokens:
        raise InvalidLatentsError(
            f"latent_ids: got ids up to row {gh - 1}, column {gw - 1}, a grid of {gh} x {gw} = {gh * gw} patches, for "
            f"{tokens} tokens; expected every place exactly once"
        )
    places = rows * gw + columns
    for b, image in enumerate(places):
        counts = torch.bincount(image, minlength=tokens)
        if bool((counts != 1).any()):
            twice = int((counts > 1).nonzero()[0])
            raise InvalidLatentsError(
                f"latent_ids: got row {twice // gw}, column {twice % gw} for {int(counts[twice])} tokens of image {b}; "
                "expected every place exactly once"
            )
    return places, (gh, gw)


def floor_size(height: object, width: object, patches: int, multiple: int) -> tuple[int, int]:
    """Return the size that FluxPipeline decodes when it is asked for ``height`` x ``width``: floored to whole patches.

    Args:
        height, width: pixels, positive integers.
        patches: how many tokens the latents hold; this must be ``(height // multiple) * (width // multiple)``.
        multiple: how many pixels there are for each token, in each direction: 16 for FLUX.

    Returns:
        (height, width), multiples of ``multiple``. Where that changed them, a `SizeFlooredWarning` says so.

    Raises:
        InvalidLatentsError: they are not positive integers, or their grid does not have ``patches`` cells.
    """
    h, w = pixels("height", height), pixels("width", width)
    gh, gw = h // multiple, w // multiple
    if gh * gw != patches:
        raise InvalidLatentsError(
            f"height and width: got {h}x{w} (height x width), a grid of {gh} x {gw} = {gh * gw} patches of "
            f"{multiple} pixels, but the latents hold {patches}; pass the height and width the latents were made for"
        )
    floored = (gh * multiple, gw * multiple)
    if floored != (h, w):
        warnings.warn(
            f"height and width: got {h}x{w} (height x width), which are not multiples of {multiple}; decoding "
            f"{floored[0]}x{floored[1]}, as FluxPipeline does",
            SizeFlooredWarning,
            stacklevel=2,
        )
    return floored


def pixels(name: str, value: object) -> int:
    """Return a height or a width as a positive int.

    Raises:
        InvalidLatentsError: it is a bool, a float or a text, or it is not positive. NumPy's integers are taken.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidLatentsError(
            f"{name}: got {value!r} ({type(value).__name__}), expected a whole number of pixels"
        ) from None
    if count <= 0:
        raise InvalidLatentsError(f"{name}: got {count}, expected a positive number of pixels")
    return count
