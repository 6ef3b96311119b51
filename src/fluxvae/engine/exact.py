"""The exact engine: it decodes and encodes whole images strip by strip, within the memory that its caller allows."""

from __future__ import annotations

import torch

from fluxvae.engine.bounded import ExactEngine, OutOfMemoryWarning, PrecisionRetryWarning
from fluxvae.engine.clock import Cancel, Progress
from fluxvae.engine.way import DECODE, ENCODE

__all__ = ["ExactDecoder", "ExactEncoder", "ExactEngine", "OutOfMemoryWarning", "PrecisionRetryWarning"]


class ExactDecoder(ExactEngine):
    """Raw latents to pixels: the function that diffusers' untiled decode computes. Arguments as for `ExactEngine`."""

    way = DECODE

    def decode(
        self, raw: torch.Tensor, *, progress: Progress | None = None, cancel: Cancel | None = None
    ) -> torch.Tensor:
        """Decode raw latents.

        Args:
            raw: (B, C, lh, lw), on the VAE's device, in its dtype.
            progress: called with (done, total) at the start and after every block of rows.
            cancel: asked before every block; true stops the decode.

        Returns:
            (B, C, H, W), the same device and dtype: ``vae.decode(raw).sample``. C is the network's: 3, or 4 for RGBA.
            The values are nominally in [-1, 1], and clamped to it only where diffusers' decode does that itself.

        Raises:
            MemoryLimitError: before any work, if the limit is too small for this size.
            UnavailableError: memory ran out although the limit allowed what was planned, as happens on a GPU that
                others use too. The decode is first repeated within three quarters of what was planned, again and again,
                with an `OutOfMemoryWarning` each time; this error means that the smallest plan did not fit either.
            NonFiniteOutputError: the result has NaN or Inf in float32. A decode in half precision is first repeated in
                float32, with a `PrecisionRetryWarning`.
            DecodeCancelled: ``cancel()`` returned true.
        """
        made = self._compute(raw, progress, cancel)
        return made.clamp_(-1.0, 1.0) if self.network.clamps else made


class ExactEncoder(ExactEngine):
    """Pixels to latents: the function that diffusers' untiled encode computes. Arguments as for `ExactEngine`."""

    way = ENCODE

    def encode(
        self, pixels: torch.Tensor, *, progress: Progress | None = None, cancel: Cancel | None = None
    ) -> torch.Tensor:
        """Encode pixels. Errors, progress and cancellation are those of `ExactDecoder.decode`.

        Args:
            pixels: (B, C, H, W) in [-1, 1], on the VAE's device, in its dtype. C is the network's: 3, or 4 for RGBA. A
                size that is no multiple of the pixels per latent is rounded down at every level, as in diffusers.

        Returns:
            (B, 2 * C, H // 8, W // 8), the same device and dtype: the mean and, not clamped, the log variance of each
            latent. They are the ``parameters`` of ``vae.encode(pixels).latent_dist``.
        """
        return self._compute(pixels, progress, cancel)
