"""The reference engine: diffusers' ``AutoencoderKL.decode`` itself, which every other engine is held to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from fluxvae.engine.module_state import check_loaded, check_not_installed
from fluxvae.engine.settings import set_aside
from fluxvae.errors import DecodeCancelled, InvalidOptionError, NonFiniteOutputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["ReferenceEngine"]


class ReferenceEngine:
    """Raw latents to pixels by diffusers, bit for bit what ``FluxPipeline`` computes.

    An image's last bits change with the batch that it travels in, as they do in diffusers itself. ``tiling`` is
    diffusers' blended tiling, which computes another function and leaves seams. ``slicing`` decodes the images of a
    batch one after another.

    A decode takes about 5.8 times the feature map of the last level, which for FLUX is 128 * H * W values an image. No
    limit is kept.
    """

    name = "diffusers"

    def __init__(self, vae: AutoencoderKL, *, tiling: bool = False, slicing: bool = False) -> None:
        check_not_installed(vae)
        self._vae = vae
        self._tiling = tiling
        self._slicing = slicing
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Give a copy everything but the lock; it makes one of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def plan(self, latent_height: int, latent_width: int, batch: int = 1) -> NoReturn:
        """Raise InvalidOptionError, because diffusers does not plan its memory."""
        raise InvalidOptionError(
            "engine: got 'diffusers', which has no memory plan; a plan needs engine='exact', the one that keeps a limit"
        )

    def look(self) -> None:
        """Refuse a model whose weights were taken away, or that `fluxvae.install` has changed, since it was given."""
        check_not_installed(self._vae)
        check_loaded(self._vae)

    def prepare(self) -> float:
        """Do nothing, as there is nothing to compile; 0 seconds."""
        return 0.0

    def decode(
        self,
        raw: torch.Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Decode raw latents.

        Args:
            raw: (B, C, lh, lw), in the VAE's dtype, on its device.
            progress: called with (0, 1) before and (1, 1) after: diffusers' decode is one opaque step.
            cancel: asked once, before the work starts.

        Returns:
            (B, 3, H, W), the VAE's dtype, nominally [-1, 1], not clamped.

        Raises:
            InvalidOptionError: `fluxvae.install` has changed this VAE since, or its weights were taken away.
            DecodeCancelled: cancel() said so.
            NonFiniteOutputError: the pixels hold NaN or Inf.
        """
        self.look()
        with self._lock, self._options(), set_aside(raw.device):
            if cancel is not None and cancel():
                raise DecodeCancelled("decode: cancelled before it started, as its caller asked")
            if progress is not None:
                progress(0, 1)
            image: torch.Tensor = self._vae.decode(raw, return_dict=False)[0]
            if progress is not None:
                progress(1, 1)
        if not bool(torch.isfinite(image).all()):
            raise NonFiniteOutputError(
                f"decode: the pixels hold NaN or Inf in {image.dtype}; half precision can overflow in this network: "
                "decode with dtype='float32'"
                if image.dtype != torch.float32
                else "decode: the pixels hold NaN or Inf in float32; the latents or the weights are out of range"
            )
        return image

    @contextmanager
    def _options(self) -> Iterator[None]:
        """Set tiling and slicing as asked for this decode only, because the module may be someone's ``pipe.vae``."""
        before = (self._vae.use_tiling, self._vae.use_slicing)
        self._vae.use_tiling, self._vae.use_slicing = self._tiling, self._slicing
        try:
            yield
        finally:
            self._vae.use_tiling, self._vae.use_slicing = before
