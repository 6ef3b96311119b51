"""Latents as tensors: that they are plain ones of a dtype that is taken, that all values are finite, and their shape.

Refused before any work, by name. The shape alone: `checks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fluxvae.errors import InvalidLatentsError
from fluxvae.latents.checks import check_shape, not_finite
from fluxvae.latents.layout import unpacked_shape

if TYPE_CHECKING:
    from fluxvae.latents.format import LatentFormat

__all__ = ["check_latents", "plain"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
            batch (`layout`); float32, bfloat16 or float16; finite. On the ``meta`` device
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
    if not isinstance(latents, torch.Tensor):
        raise InvalidLatentsError(_no_tensor(format, latents))
    plain(latents)
    if latents.dtype not in _DTYPES:
        raise InvalidLatentsError(
            f"latents: got dtype {latents.dtype}, expected float32, bfloat16 or float16; convert with latents.float()"
        )
    size = check_shape(format, tuple(latents.shape), height, width, latent_ids=latent_ids, raw=raw)
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


def _check_finite(latents: torch.Tensor) -> None:
    finite = torch.isfinite(latents)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    where = tuple(int(i) for i in bad[0])
    raise not_finite(latents[where].item(), where, len(bad), latents.numel())
