"""The reference engine: diffusers' own ``decode`` and ``encode``, which every other engine is held to."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch

from fluxvae.engine.frames import has_frames
from fluxvae.engine.module_state import check_loaded, check_not_installed
from fluxvae.engine.settings import set_aside
from fluxvae.engine.way import DECODE, ENCODE, Way
from fluxvae.errors import DecodeCancelled, InvalidOptionError, NonFiniteOutputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["ReferenceDecoder", "ReferenceEncoder", "ReferenceEngine"]


class ReferenceEngine:
    """One half of a VAE by diffusers, bit for bit what its pipelines compute.

    An image's last bits change with the batch that it travels in, as they do in diffusers itself. ``tiling`` is
    diffusers' blended tiling, which computes another function and leaves seams. ``slicing`` computes the images of a
    batch one after another.

    A decode takes about 5.8 times the feature map of the last level, which for FLUX is 128 * H * W values an image, and
    an encode about 5 times. No limit is kept.
    """

    name = "diffusers"
    way: ClassVar[Way]

    def __init__(self, vae: AutoencoderKL, *, tiling: bool = False, slicing: bool = False) -> None:
        check_not_installed(vae, self.way)
        self._vae = vae
        self._frames = has_frames(vae)
        self._tiling = tiling
        self._slicing = slicing
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Give a copy everything but the lock; it makes one of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def plan(self, height: int, width: int, batch: int = 1) -> NoReturn:
        """Raise InvalidOptionError, because diffusers does not plan its memory."""
        raise InvalidOptionError(
            "engine: got 'diffusers', which has no memory plan; a plan needs engine='exact', the one that keeps a limit"
        )

    def look(self) -> None:
        """Refuse a model whose weights were taken away, or that `fluxvae.install` has changed, since it was given."""
        check_not_installed(self._vae, self.way)
        check_loaded(self._vae, self.way)

    def prepare(self) -> float:
        """Do nothing, as there is nothing to compile; 0 seconds."""
        return 0.0

    def _compute(
        self,
        given: torch.Tensor,
        compute: Callable[[AutoencoderKL, torch.Tensor], torch.Tensor],
        progress: Callable[[int, int], None] | None,
        cancel: Callable[[], bool] | None,
    ) -> torch.Tensor:
        self.look()
        name = self.way.name
        with self._lock, self._options(), set_aside(given.device):
            if cancel is not None and cancel():
                raise DecodeCancelled(f"{name}: cancelled before it started, as its caller asked")
            if progress is not None:
                progress(0, 1)
            vae = self._of_this_call()
            made = compute(vae, given.unsqueeze(2)).squeeze(2) if self._frames else compute(vae, given)
            if progress is not None:
                progress(1, 1)
        if not bool(torch.isfinite(made).all()):
            raise NonFiniteOutputError(
                f"{name}: the {self.way.made} hold NaN or Inf in {made.dtype}; half precision can overflow in this "
                f"network: {name} with dtype='float32'"
                if made.dtype != torch.float32
                else f"{name}: the {self.way.made} hold NaN or Inf in float32; the {self.way.given} or the weights are "
                "out of range"
            )
        return made

    def _of_this_call(self) -> Any:
        """Return the VAE, or where it has an axis of time a shallow copy of it that no other call uses.

        Such a VAE keeps the frames before in attributes of its own during a call, so that two calls of the same module
        in two threads would read each other's. It also counts the layers of both halves before every call, so that a
        half that was not loaded must be a module; it is never called.
        """
        if not self._frames:
            return self._vae
        seen = copy.copy(self._vae)
        seen._modules = {name: torch.nn.Module() if part is None else part for name, part in self._vae._modules.items()}
        return seen

    @contextmanager
    def _options(self) -> Iterator[None]:
        """Set tiling and slicing as asked for this call only, because the module may be someone's ``pipe.vae``."""
        before = (self._vae.use_tiling, self._vae.use_slicing)
        self._vae.use_tiling, self._vae.use_slicing = self._tiling, self._slicing
        try:
            yield
        finally:
            self._vae.use_tiling, self._vae.use_slicing = before


class ReferenceDecoder(ReferenceEngine):
    """Raw latents to pixels by diffusers. Arguments as for `ReferenceEngine`."""

    way = DECODE

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
            (B, 3, H, W), the VAE's dtype, nominally [-1, 1], clamped only where diffusers' own class clamps it, as
            those with an axis of time do without tiling.

        Raises:
            InvalidOptionError: `fluxvae.install` has changed this VAE since, or its weights were taken away.
            DecodeCancelled: cancel() said so.
            NonFiniteOutputError: the pixels hold NaN or Inf.
        """
        return self._compute(raw, lambda vae, raw: vae.decode(raw, return_dict=False)[0], progress, cancel)


class ReferenceEncoder(ReferenceEngine):
    """Pixels to latents by diffusers. Arguments as for `ReferenceEngine`."""

    way = ENCODE

    def encode(
        self,
        pixels: torch.Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Encode pixels. Errors, progress and cancellation are those of `ReferenceDecoder.decode`.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], in the VAE's dtype, on its device.

        Returns:
            (B, 2 * C, lh, lw), the VAE's dtype: the mean and, not clamped, the log variance of each latent.
        """
        return self._compute(
            pixels, lambda vae, pixels: vae.encode(pixels, return_dict=False)[0].parameters, progress, cancel
        )
