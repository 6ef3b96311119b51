"""`Decoder` turns FLUX latents into the image that diffusers' FluxPipeline would have made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fluxvae.engine.exact import ExactDecoder
from fluxvae.engine.plan import Plan
from fluxvae.engine.preview import PreviewDecoder
from fluxvae.engine.reference import ReferenceDecoder
from fluxvae.engine.settings import set_aside
from fluxvae.engine.way import DECODE
from fluxvae.errors import MemoryLimitError
from fluxvae.forked import refuse_to_hang
from fluxvae.half import Half
from fluxvae.latents.format import PREVIEW_NOTE
from fluxvae.latents.reading import Reading
from fluxvae.latents.request import LatentRequest
from fluxvae.options import VAE, resolve_dtype
from fluxvae.pictures import OutputType, check_output_type, postprocess, postprocess_bytes

__all__ = ["Decoder"]

Progress = Callable[[int, int], None]
Cancel = Callable[[], bool]


class Decoder(Half[ExactDecoder, ReferenceDecoder, PreviewDecoder]):
    """Decodes the latents of FLUX, or of a model that borrows its VAE, with one VAE on one device.

    Args:
        vae: an ``AutoencoderKL``, an ``AutoencoderKLFlux2``, an ``AutoencoderKLQwenImage``, an ``AutoencoderKLWan`` of
            Wan 2.1 or, for approximate previews, an ``AutoencoderTiny`` that is already in memory. It is used as it is,
            without a copy. `from_pretrained` loads one.
        device: ``"auto"`` (where the module is), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a ``torch.device``.
        dtype: ``"auto"`` (the module's own), ``"float32"``, ``"bfloat16"``, ``"float16"``, or a ``torch.dtype``. A
            device or a dtype other than the module's moves the module itself, as ``Module.to`` does.
        rescale_dtype: the dtype that latents are rescaled in, before they are cast to the VAE's. ``"auto"`` is the
            VAE's dtype, as in nearly every pipeline. BriaPipeline rescales in ``"float32"`` (docs/models.md).
        engine: ``"exact"`` makes the untiled image in bounded memory, with the same bits in any batch. ``"diffusers"``
            is the reference, whose bits are the pipeline's. ``"preview"`` is for an ``AutoencoderTiny``. ``"auto"`` is
            ``"preview"`` for that class and ``"exact"`` for the others.
        kernels: which kernels the exact engine uses. ``"auto"`` is the fastest for the device; a plan names them.
        memory_limit: how much memory the exact or the preview engine may add above the loaded weights, in bytes or as
            a text such as ``"2GiB"`` or ``"0.7GB"``. None: what is free when a decode starts, less a margin.
        spill_dir: a folder on a disk, where the exact engine keeps what the limit leaves no room for.
        cuda_graphs: on a GPU, record what the exact engine asks of it as a CUDA graph for each size, and decode later
            images by that, with the same bits and little of the CPU's time. A graph holds the memory of a whole decode
            between calls, which counts against the limit.
        keep_memory: on a CPU, keep the exact engine's memory from one decode to the next, in large pages where the
            system has them. Later calls save the time that the system takes to find it anew. It counts against the
            limit.
        tiling, slicing: diffusers' own, for the reference engine. Tiling blends overlapping tiles, so its image is not
            the untiled one: it shows seams and shifts colours.

    Raises:
        InvalidOptionError: an option is unknown, or the engine cannot honour it.
    """

    way = DECODE
    engines = (ExactDecoder, ReferenceDecoder, PreviewDecoder)

    def __init__(
        self,
        vae: VAE,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        rescale_dtype: str | torch.dtype = "auto",
        engine: str = "auto",
        kernels: str = "auto",
        memory_limit: int | str | None = None,
        spill_dir: str | Path | None = None,
        cuda_graphs: bool = False,
        keep_memory: bool = False,
        tiling: bool = False,
        slicing: bool = False,
    ) -> None:
        super().__init__(
            vae, device=device, dtype=dtype, engine=engine, kernels=kernels, memory_limit=memory_limit,
            spill_dir=spill_dir, cuda_graphs=cuda_graphs, keep_memory=keep_memory, tiling=tiling,
            slicing=slicing,
        )  # fmt: skip
        self._rescale_dtype = None
        if rescale_dtype != "auto":
            self._rescale_dtype = resolve_dtype(rescale_dtype, self.device, "rescale_dtype")

    def decode(
        self,
        latents: torch.Tensor,
        *,
        height: int | None = None,
        width: int | None = None,
        latent_ids: torch.Tensor | None = None,
        output_type: OutputType = "pil",
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        batch_norm_eps: float | None = None,
        raw: bool | None = None,
        feature_order: str | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Any:
        """Decode latents to images.

        Args:
            latents: packed (B, gh*gw, 4*C) with height and width, or unpacked (B, C, lh, lw). C is 16 for FLUX.1 and 32
                for FLUX.2, whose latents may also come in patches (B, 128, gh, gw). They are float32, bfloat16 or
                float16, finite, and scaled, as the transformer leaves them. Unpacked ones may be one frame,
                (B, C, 1, lh, lw) or (C, 1, lh, lw). One image may come without its batch, (C, lh, lw) or
                (gh*gw, 4*C). ``(C, n, 4*C)`` may be C packed images or one image; height and width tell which.
                More than one frame is a video, and refused, except for a VAE whose pictures have alpha, as that of
                QwenImageLayeredPipeline has: its frames are layers, and packed (B, L*gh*gw, 64) and unpacked
                (B, 16, L, lh, lw) are B*L pictures, the layers of one image after those of another. Every layer that is
                given is decoded. That pipeline's transformer makes one more in front, the composite, which the pipeline
                does not decode: ``latents[:, gh*gw:]`` of packed ones, or ``latents[:, :, 1:]``, leaves it out.
            height, width: the size of the image in pixels, for layers that of one layer. One that is not a multiple of
                16 is floored, as in FluxPipeline, with a `SizeFlooredWarning`. If height and width are exchanged and
                both give the same number of patches, that cannot be noticed: latents of 512x1024 decode as 1024x512
                without an error, to a scrambled picture. Nor can a size that is too small be noticed where packed
                latents may be layers: those of one layer of 512x512 are four of 256x256.
            latent_ids: (B, gh*gw, 4), for FLUX.2's packed latents that do not come row by row. They say where each
                token belongs, every place exactly once, as FLUX.2's pipelines make them. Height and width may be left
                out then. For one image's (gh*gw, 4*C) they may be (gh*gw, 4).
            output_type: ``"pil"`` makes a list of pictures; ``"np"`` (B, H, W, 3) float32 in [0, 1]; ``"pt"``
                (B, 3, H, W) in [0, 1], in the VAE's dtype; ``"uint8"`` a (B, H, W, 3) uint8 array, the bytes of
                ``"pil"``. Where the VAE's pictures are RGBA (`picture_channels` is 4), they have four channels.
            scaling_factor, shift_factor, batch_norm_eps: are used instead of the checkpoint's own. They are refused
                where it has none: FLUX.2 has no factors, Qwen-Image and Wan have neither factors nor an eps, and the
                others have no eps.
            raw: whether the latents are raw already, like those of Flux2KleinPipeline's ``output_type="latent"``, so
                that nothing is rescaled. For FLUX.2's (B, 32, lh, lw) it must be said either way, because both kinds
                have that shape.
            feature_order: ``"row_column_channel"`` for Ideogram 4's latents: it has FLUX.2's VAE, but its patches and
                statistics have their 128 features in another order than FLUX.2's, ``"channel_row_column"``, which is
                meant if it is left out. Nothing in the tensor tells which. Where there are no such features, it is
                refused.
            progress: is called with the steps that are done and those that there are.
            cancel: is asked again and again during the work, which stops when it returns true.

        Returns:
            The images, always with their batch, whether or not the latents had one.

        Raises:
            InvalidLatentsError, InvalidOptionError: something is wrong with the arguments; no work was begun.
            MemoryLimitError: the memory limit is too small for this size.
            NonFiniteOutputError: the pixels would hold NaN or Inf.
            DecodeCancelled: ``cancel`` returned true.
            ForkedProcessError: the process was forked, and PyTorch would hang in it (docs/batch.md).
        """
        refuse_to_hang()
        check_output_type(output_type)
        self._begin(PREVIEW_NOTE)
        reading = Reading(
            height=height, width=width, latent_ids=latent_ids, scaling_factor=scaling_factor,
            shift_factor=shift_factor, batch_norm_eps=batch_norm_eps, raw=raw, feature_order=feature_order,
        )  # fmt: skip
        with set_aside(self.device):
            request = self.request(latents, reading)
            self._check_output(output_type, request)
            images = postprocess(self._decode(request, progress, cancel), output_type)
            if self.approximate and output_type == "pil":
                for picture in images:
                    picture.info["Comment"] = PREVIEW_NOTE  # PNG and JPEG files keep it there
            return images

    def decode_raw(
        self,
        latents: torch.Tensor,
        *,
        height: int | None = None,
        width: int | None = None,
        latent_ids: torch.Tensor | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        batch_norm_eps: float | None = None,
        raw: bool | None = None,
        feature_order: str | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> torch.Tensor:
        """Decode without post-processing, for callers that need several output types of one decode. Else as `decode`.

        Returns:
            (B, 3, H, W), or (B, 4, H, W) for RGBA, in the VAE's dtype and on its device, nominally in [-1, 1], as
            diffusers' ``decode`` leaves them: of VAEs whose ``decode`` clamps (``AutoencoderKLQwenImage`` and
            ``AutoencoderKLWan``) within it, of others not clamped. B is 1 for one image without its batch.
        """
        refuse_to_hang()
        self._begin(PREVIEW_NOTE)
        reading = Reading(
            height=height, width=width, latent_ids=latent_ids, scaling_factor=scaling_factor,
            shift_factor=shift_factor, batch_norm_eps=batch_norm_eps, raw=raw, feature_order=feature_order,
        )  # fmt: skip
        with set_aside(self.device):
            return self._decode(self.request(latents, reading), progress, cancel)

    def check(
        self,
        latents: torch.Tensor,
        *,
        height: int | None = None,
        width: int | None = None,
        latent_ids: torch.Tensor | None = None,
        raw: bool | None = None,
        feature_order: str | None = None,
    ) -> tuple[int, int]:
        """Check latents without decoding them. The arguments are those of `decode`.

        Returns:
            The (height, width), in pixels, of the image that `decode` would make.

        Raises:
            InvalidLatentsError, InvalidOptionError: as `decode` would.
        """
        reading = Reading(height=height, width=width, latent_ids=latent_ids, raw=raw, feature_order=feature_order)
        request = self.request(latents, reading)
        return request.height, request.width

    def request(self, latents: object, reading: Reading) -> LatentRequest:
        """Check latents and what is said about them for this decoder's checkpoint, and return them as one value.

        Raises:
            InvalidLatentsError, InvalidOptionError: as `decode` would.
            ForkedProcessError: as `decode` would, because every value is looked at.
        """
        refuse_to_hang()
        return LatentRequest.read(self.format, latents, reading)

    def decode_request(
        self, request: LatentRequest, *, progress: Progress | None = None, cancel: Cancel | None = None
    ) -> torch.Tensor:
        """Decode what `request` returned, which is not checked again. Otherwise as `decode_raw`."""
        refuse_to_hang()
        self._begin(PREVIEW_NOTE)
        return self._decode(request, progress, cancel)

    def _decode(self, request: LatentRequest, progress: Progress | None, cancel: Cancel | None) -> torch.Tensor:
        with set_aside(self.device):
            # Raw latents are only cast. Others are rescaled in the dtype in which the pipeline rescales them.
            rescaled = self.dtype if request.reading.raw or self._rescale_dtype is None else self._rescale_dtype
            latents = request.raw_latents(self.device, rescaled).to(self.dtype)
            return self.engine.decode(latents, progress=progress, cancel=cancel)

    def _check_output(self, output_type: OutputType, request: LatentRequest) -> None:
        """Refuse an image that the limit has no room for beside what `postprocess` makes of it.

        The engine plans for itself, and does not know what becomes of its image.
        """
        if self.memory_limit is None:
            return
        batch, height, width, itemsize = request.batch, request.height, request.width, self.dtype.itemsize
        needed = batch * self.picture_channels * height * width * itemsize
        needed += postprocess_bytes(output_type, batch, height, width, itemsize, self.picture_channels)
        if needed > self.memory_limit:
            raise MemoryLimitError(
                f"memory_limit: got {self.memory_limit} bytes; {batch} x {height}x{width} pixels as {output_type!r} "
                f"take {needed} bytes by themselves; raise the limit, decode fewer at a time, or ask for 'uint8'"
            )

    def plan(self, height: int, width: int, batch: int = 1) -> Plan:
        """Plan how ``batch`` images of this size would be decoded now. ``str(plan)`` is a table that explains itself.

        Args:
            height, width: the size of the images in pixels, multiples of 8.

        Raises:
            InvalidLatentsError: no latents decode to this size.
            MemoryLimitError: the limit is below the smallest that works.
            InvalidOptionError: the decoder has the reference engine, which does not plan.
        """
        return self._plan(height, width, batch)
