"""What can be wrong with latents as a tensor: its class, its dtype, and values that are not finite.

`checks` checks the shape and what is said about it.
"""

from __future__ import annotations

import torch

from fluxvae.errors import InvalidLatentsError
from fluxvae.latents.checks import not_finite
from fluxvae.latents.format import LatentFormat
from fluxvae.latents.layout import unpacked_shape

__all__ = ["check_finite", "plain", "plain_latents"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain_latents(format: LatentFormat, latents: object) -> torch.Tensor:
    """Return what a caller gave as latents as a `plain` tensor; its shape and its values are still unchecked.

    Args:
        format: the checkpoint's; errors tell the shapes that it takes.
        latents: float32, bfloat16 or float16.

    Raises:
        InvalidLatentsError: it is no tensor, one of another dtype, or one that cannot be made plain.
    """
    if not isinstance(latents, torch.Tensor):
        raise InvalidLatentsError(_no_tensor(format, latents))
    values = plain(latents)
    if values.dtype not in _DTYPES:
        raise InvalidLatentsError(
            f"latents: got dtype {values.dtype}, expected float32, bfloat16 or float16; convert with latents.float()"
        )
    return values


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
    """Return the values of ``latents`` as a tensor of PyTorch's own class, without gradients.

    Nothing is copied where memory holds the values as they read. Compiled kernels read memory as it is, so a tensor
    must hold its values itself, densely.

    Raises:
        InvalidLatentsError: the tensor does not.
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


def check_finite(latents: torch.Tensor) -> None:
    """Refuse NaN and Inf. A tensor on the ``meta`` device has no values, and passes.

    Raises:
        InvalidLatentsError: names the first such value, and how many there are.
    """
    if latents.is_meta:
        return
    finite = torch.isfinite(latents)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    where = tuple(int(i) for i in bad[0])
    raise not_finite(latents[where].item(), where, len(bad), latents.numel())
