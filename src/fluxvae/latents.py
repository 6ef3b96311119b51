"""Packed latents to raw latents: the arithmetic of FLUX's last step before the VAE, as pure functions.

    packed latents (B, gh*gw, 4*C)  --unpack-->  latents (B, C, lh, lw)  --rescale-->  raw latents

Everything a caller can get wrong about latents and their size is refused here, before any work, by
`InvalidLatentsError`. One mistake cannot be seen: height and width exchanged when both give the same number
of patches (512x1024 and 1024x512) are both valid readings of the same tensor.

Source of the layout: diffusers' ``FluxPipeline._pack_latents`` and ``_unpack_latents``; BFL's ``sampling.unpack``.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fluxvae.errors import InvalidLatentsError, InvalidOptionError

__all__ = ["LatentFormat", "SizeFlooredWarning", "pack_latents", "unpack_latents"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FAMILIES = {
    64: "FLUX.1 (16 latent channels)",
    128: "FLUX.2 (32 latent channels)",
    16: "SD or SDXL (4 latent channels)",
}


class SizeFlooredWarning(UserWarning):
    """The size asked for is not a multiple of 16: the next smaller one was decoded, as FluxPipeline does."""


@dataclass(frozen=True)
class LatentFormat:
    """How the latents of one checkpoint become raw latents: read from its config, the same for every decode.

    ``raw = latents / scaling_factor + shift_factor`` (no addition where the checkpoint has no shift).
    FLUX.1: 16 channels, 0.3611, 0.1159.
    """

    channels: int = 16
    vae_scale_factor: int = 8
    """Pixels per latent, each way."""
    scaling_factor: float = 0.3611
    shift_factor: float | None = 0.1159

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LatentFormat:
        """Read the format from an ``AutoencoderKL``'s config."""
        return cls(
            channels=config["latent_channels"],
            vae_scale_factor=2 ** (len(config["block_out_channels"]) - 1),
            scaling_factor=config["scaling_factor"],
            shift_factor=config.get("shift_factor"),
        )

    @property
    def packed_features(self) -> int:
        """Features of one packed token: a 2x2 patch of every channel."""
        return 4 * self.channels

    @property
    def packed_multiple(self) -> int:
        """Pixels per packed token, each way: 16 for FLUX.1."""
        return 2 * self.vae_scale_factor

    def check(self, latents: object, height: object = None, width: object = None) -> tuple[int, int]:
        """Say what size these latents decode to, or why they cannot be decoded.

        Args:
            latents: packed ``(B, gh*gw, 4*C)``, or unpacked ``(B, C, lh, lw)``; float32, bfloat16 or float16; finite.
                On the ``meta`` device they have no values: the shape alone is checked.
            height, width: pixels. Needed for packed latents, floored to multiples of 16 (with a
                `SizeFlooredWarning`). For unpacked latents they may be left out; if given they must agree.

        Returns:
            (height, width) in pixels of the decoded image.

        Raises:
            InvalidLatentsError: the rank, features, patch count, size, dtype or a value is wrong.
        """
        if not isinstance(latents, torch.Tensor):
            raise InvalidLatentsError(
                f"latents: got {type(latents).__name__}, expected a torch.Tensor; "
                "torch.from_numpy(array) turns a NumPy array into one"
            )
        if latents.ndim not in (3, 4):
            raise InvalidLatentsError(
                f"latents: got {latents.ndim} dimensions, shape {tuple(latents.shape)}; expected packed latents "
                f"(batch, patches, {self.packed_features}) or unpacked ones (batch, {self.channels}, "
                "height/8, width/8)"
            )
        if latents.dtype not in DTYPES:
            raise InvalidLatentsError(
                f"latents: got dtype {latents.dtype}, expected float32, bfloat16 or float16; convert with "
                "latents.float()"
            )
        if latents.numel() == 0:
            raise InvalidLatentsError(
                f"latents: got shape {tuple(latents.shape)}, which holds no values; every dimension, the batch "
                "included, must be at least 1"
            )
        packed = latents.ndim == 3
        size = (self._check_packed if packed else self._check_unpacked)(latents, height, width)
        if not latents.is_meta:
            _check_finite(latents)
        return size

    def _check_packed(self, latents: torch.Tensor, height: object, width: object) -> tuple[int, int]:
        patches, features = latents.shape[1:]
        if features != self.packed_features:
            looks = f", which looks like {_FAMILIES[features]}" if features in _FAMILIES else ""
            ours = f", {_FAMILIES[self.packed_features]}" if self.packed_features in _FAMILIES else ""
            raise InvalidLatentsError(
                f"latents: got {features} features per token{looks}; expected {self.packed_features} for this "
                f"checkpoint{ours}; use the checkpoint of the model that made the latents"
            )
        if height is None or width is None:
            raise InvalidLatentsError(
                f"height and width: got height={height}, width={width}; packed latents need both, in pixels: the "
                f"shape {tuple(latents.shape)} alone does not tell a wide image from a tall one"
            )
        return floor_size(height, width, patches, self.packed_multiple)

    def _check_unpacked(self, latents: torch.Tensor, height: object, width: object) -> tuple[int, int]:
        channels, lh, lw = latents.shape[1:]
        if channels != self.channels:
            raise InvalidLatentsError(
                f"latents: got {channels} channels, shape {tuple(latents.shape)}; expected (batch, {self.channels}, "
                "height/8, width/8) for this checkpoint"
            )
        size = (lh * self.vae_scale_factor, lw * self.vae_scale_factor)
        for name, given, actual in (("height", height, size[0]), ("width", width, size[1])):
            if given is not None and _pixels(name, given) != actual:
                raise InvalidLatentsError(
                    f"{name}: got {given}, but unpacked latents of shape {tuple(latents.shape)} decode to "
                    f"{size[0]}x{size[1]} (height x width); leave {name} out or pass {actual}"
                )
        return size

    def to_raw(
        self, latents: torch.Tensor, scaling_factor: float | None = None, shift_factor: float | None = None
    ) -> torch.Tensor:
        """``latents / scaling_factor + shift_factor``, in the dtype of ``latents``, as the pipelines compute it.

        Args:
            latents: (B, C, lh, lw), scaled.
            scaling_factor, shift_factor: instead of the checkpoint's own.

        Raises:
            InvalidOptionError: a factor is not a finite number, or scaling_factor is 0.
        """
        scaling = _factor("scaling_factor", self.scaling_factor if scaling_factor is None else scaling_factor)
        if scaling == 0:
            raise InvalidOptionError("scaling_factor: got 0, expected a number other than 0: latents are divided by it")
        raw = latents / scaling
        shift = self.shift_factor if shift_factor is None else shift_factor
        return raw if shift is None else raw + _factor("shift_factor", shift)


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Pack 2x2 patches of latents into tokens, row by row: what the transformer works on.

    Args:
        latents: (B, C, lh, lw), lh and lw even.

    Returns:
        (B, lh/2 * lw/2, 4*C), same dtype; feature ``4*c + 2*dy + dx`` of token ``gw*y + x`` is
        ``latents[b, c, 2*y + dy, 2*x + dx]``.

    Raises:
        InvalidLatentsError: not four dimensions, or an odd height or width.
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
    """Undo `pack_latents`: tokens back to a latent image.

    Args:
        packed: (B, gh*gw, 4*C).
        height, width: pixels; floored to multiples of ``2 * vae_scale_factor`` with a `SizeFlooredWarning`.
        vae_scale_factor: pixels per latent, each way.

    Returns:
        (B, C, 2*gh, 2*gw), same dtype, contiguous.

    Raises:
        InvalidLatentsError: not three dimensions, features not a multiple of 4, or a patch count that is not
            ``(height // 16) * (width // 16)``.
    """
    if packed.ndim != 3 or packed.shape[2] % 4 or packed.numel() == 0:
        raise InvalidLatentsError(
            f"latents: got shape {tuple(packed.shape)}, expected packed latents (batch, patches, 4 * channels)"
        )
    b, patches, features = packed.shape
    multiple = 2 * vae_scale_factor
    height, width = floor_size(height, width, patches, multiple)
    gh, gw = height // multiple, width // multiple
    latents = packed.reshape(b, gh, gw, features // 4, 2, 2)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(b, features // 4, 2 * gh, 2 * gw)


def floor_size(height: object, width: object, patches: int, multiple: int) -> tuple[int, int]:
    """The size FluxPipeline decodes when asked for ``height`` x ``width``: floored to the packed grid.

    Args:
        height, width: pixels, positive integers.
        patches: tokens the latents hold; must equal ``(height // multiple) * (width // multiple)``.
        multiple: pixels per token, each way (16).

    Returns:
        (height, width), multiples of ``multiple``. Warns with `SizeFlooredWarning` where that changed them.

    Raises:
        InvalidLatentsError: not positive integers, or a grid that does not have ``patches`` cells.
    """
    h, w = _pixels("height", height), _pixels("width", width)
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


def _pixels(name: str, value: object) -> int:
    """A height or width as a positive int; bools, floats and strings are refused, NumPy integers are not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        pixels = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidLatentsError(
            f"{name}: got {value!r} ({type(value).__name__}), expected a whole number of pixels"
        ) from None
    if pixels <= 0:
        raise InvalidLatentsError(f"{name}: got {pixels}, expected a positive number of pixels")
    return pixels


def _factor(name: str, value: object) -> float:
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
