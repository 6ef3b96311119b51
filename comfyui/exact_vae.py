"""ComfyUI's VAE, but decoding and encoding exactly, within a memory limit, with the weights that ComfyUI holds.

`ExactVAE` takes the place of a `comfy.sd.VAE` in any node that takes a VAE. It shares that VAE's weights and its memory
manager, and tells the latter what fluxvae's plan needs rather than ComfyUI's estimate, which is 9 GB for 1024x1024 in
float32: so the diffusion model may stay where it is. It never decodes in tiles, whatever it is asked.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import comfy.sd
import torch

from fluxvae import Decoder, Encoder
from fluxvae.latents.reading import Reading

from .calls import cropped, interruptible, one_frame, progress_bar, refuse_options, refuse_video
from .weights import Half

__all__ = ["ExactVAE"]

log = logging.getLogger(__name__)


class ExactVAE(comfy.sd.VAE):
    """A VAE that decodes and encodes exactly. It has all attributes of the VAE that it is made of.

    Args:
        vae: ComfyUI's VAE. It is not changed.
        memory_limit: how many bytes a call may add above the loaded weights. None: what is free when it begins.

    Raises:
        Unsupported: fluxvae does not compute this VAE.
    """

    def __init__(self, vae: comfy.sd.VAE, memory_limit: int | None) -> None:
        # Not super().__init__, which makes a network; this VAE has the other's.
        self.__dict__.update(vae.__dict__)
        self.fluxvae_original = getattr(vae, "fluxvae_original", vae)
        """The VAE before the first fluxvae node, where several follow each other."""
        self.fluxvae_decoder = Half(Decoder, self.fluxvae_original, memory_limit)
        self.fluxvae_encoder = Half(Encoder, self.fluxvae_original, memory_limit)
        self.memory_used_decode = self._needed_to_decode  # these two are attributes in comfy.sd.VAE
        self.memory_used_encode = self._needed_to_encode

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None) -> torch.Tensor:
        """Decode a LATENT's samples.

        Args:
            samples_in: (B, C, lh, lw) as samplers and VAEEncode give them, raw; of Qwen-Image and Wan
                (B, 16, 1, lh, lw), raw too; of FLUX.2 (B, 128, gh, gw), normalised.
            vae_options: must be empty; they are for VAEs of other kinds.

        Returns:
            An IMAGE (B, H, W, 3), or (B, H, W, 4) where the VAE's pictures are RGBA, float32 in [0, 1], on ComfyUI's
            intermediate device. Where the VAE and the samples have an axis of time, the IMAGE has it too,
            (B, 1, H, W, C), as ComfyUI's own VAE gives it and VAEDecode takes it away.

        Raises:
            FluxVAEError: as for `fluxvae.Decoder.decode_raw`: the memory limit is too small, for example.
        """
        refuse_options(vae_options)
        samples = one_frame(samples_in)
        scale = self.spacial_compression_decode()
        size = samples.shape[-2] * scale, samples.shape[-1] * scale
        with self.fluxvae_decoder.ready(self, *size, len(samples)) as decoder, interruptible() as cancel:
            pixels = decoder.decode_raw(
                samples.to(self.device, self.vae_dtype),
                raw=None if decoder.format.flux2 else True,  # ComfyUI's latents of FLUX.2 are normalised patches
                progress=partial(progress_bar(), 0),
                cancel=cancel,
            )
        images = pixels.to(self.output_device, self._output_dtype())
        del pixels
        for one in images.split(1):  # one by one, since some versions of ComfyUI make temporary copies here
            one.copy_(self.process_output(one))
        images = images.movedim(1, -1)
        return images[:, None] if self._has_time() and samples_in.ndim == 5 else images

    def decode_tiled(self, samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Decode exactly too, since the memory limit does what tiles are for. The sizes of tiles are not needed."""
        log.info("fluxvae: no tiles are used; the memory limit of the fluxvae node holds instead of their size")
        return self.decode(samples)

    def encode(self, pixel_samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Encode an IMAGE, one picture after another.

        Args:
            pixel_samples: (B, H, W, 3) in [0, 1]. As in ComfyUI, a size that is no multiple of 8 (FLUX.2: 16) loses its
                borders, and channels that the VAE does not take are left out; a warning is logged in either case. A VAE
                of RGBA pictures takes four channels, and three as opaque.

        Returns:
            (B, C, lh, lw), the mode of the distribution, raw; for FLUX.2 normalised patches (B, 128, gh, gw), of
            Qwen-Image and Wan (1, 16, 1, lh, lw). float32, on ComfyUI's intermediate device.

        Raises:
            FluxVAEError: as for `fluxvae.Encoder.encode`; or there are several pictures for a VAE with an axis of time.
        """
        if self._has_time() and not self.not_video:
            refuse_video(pixel_samples)
        pixels = cropped(pixel_samples, self.spacial_compression_encode(), self.output_channels).movedim(-1, 1)
        move, made = progress_bar(len(pixels)), []
        with self.fluxvae_encoder.ready(self, *pixels.shape[-2:], 1) as encoder, interruptible() as cancel:
            reading = Reading() if encoder.format.flux2 else Reading(raw=True)
            for index, one in enumerate(pixels.split(1)):
                given = self.process_input(one).to(self.device, self.vae_dtype).contiguous()
                moments = encoder.engine.encode(given, progress=partial(move, index), cancel=cancel)
                found = encoder.latents_of(moments, reading, packed=False)
                made.append(found.to(self.output_device, self._output_dtype()))
        latents = torch.cat(made)
        return latents[:, :, None] if self._has_time() else latents

    def encode_tiled(self, pixel_samples: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Encode exactly too, as `decode_tiled` decodes."""
        log.info("fluxvae: no tiles are used; the memory limit of the fluxvae node holds instead of their size")
        return self.encode(pixel_samples)

    def _needed_to_decode(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """How many bytes a decode of samples of this shape adds above the weights."""
        scale = self.spacial_compression_decode()
        pictures = math.prod((shape[0], *shape[2:-2]))  # of five dimensions the third is that of frames
        return self.fluxvae_decoder.needed(self, shape[-2] * scale, shape[-1] * scale, pictures)

    def _needed_to_encode(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """How many bytes an encode of pixels (B, C, H, W) or (B, C, F, H, W) adds above the weights.

        Pictures are encoded one by one.
        """
        return self.fluxvae_encoder.needed(self, shape[-2], shape[-1], 1)

    def _has_time(self) -> bool:
        """Return whether LATENTs of this VAE have an axis of time, (B, C, F, lh, lw), as a video's have."""
        return self.latent_dim == 3

    def _output_dtype(self) -> torch.dtype:
        """The dtype of IMAGEs and LATENTs: float32, or what a newer version of ComfyUI says."""
        return self.vae_output_dtype() if hasattr(self, "vae_output_dtype") else torch.float32
