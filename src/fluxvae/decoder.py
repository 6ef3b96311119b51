"""`Decoder`: packed FLUX latents in, the image diffusers' FluxPipeline would have made out."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fluxvae.checkpoints import open_checkpoint
from fluxvae.engine.exact import ExactEngine
from fluxvae.engine.module_state import check_loaded, unwrapped
from fluxvae.engine.plan import Plan, check_size, parse_memory_limit
from fluxvae.engine.preview import ApproximateWarning, PreviewEngine
from fluxvae.engine.reference import ReferenceEngine
from fluxvae.engine.settings import set_aside
from fluxvae.errors import InvalidOptionError, MemoryLimitError
from fluxvae.forked import refuse_to_hang
from fluxvae.latents.format import PREVIEW_NOTE, LatentFormat
from fluxvae.latents.reading import Reading
from fluxvae.latents.request import LatentRequest
from fluxvae.options import VAE, check_engine_options, is_a, resolve_device, resolve_dtype, resolve_engine
from fluxvae.pictures import OutputType, check_output_type, postprocess, postprocess_bytes

__all__ = ["Decoder"]

Progress = Callable[[int, int], None]
Cancel = Callable[[], bool]


class Decoder:
    """Decodes FLUX latents, or those of a model that borrows its VAE, with one VAE on one device.

    Args:
        vae: an ``AutoencoderKL``, ``AutoencoderKLFlux2``, or (an approximate preview) ``AutoencoderTiny`` already in
            memory; it is used as it is, without a copy. `from_pretrained` loads one.
        device: ``"auto"`` (where the module is), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a ``torch.device``.
        dtype: ``"auto"`` (the module's own), ``"float32"``, ``"bfloat16"``, ``"float16"``, or a ``torch.dtype``. A
            device or dtype other than the module's moves the module itself, as ``Module.to`` does.
        rescale_dtype: what latents are cast to before they are rescaled, and from there to the VAE's dtype. ``"auto"``
            is the VAE's, as in nearly every pipeline; BriaPipeline rescales in ``"float32"`` (docs/models.md).
        engine: ``"exact"``, the untiled image in bounded memory, the same bits in any batch; ``"diffusers"``, the
            reference, whose bits are the pipeline's; ``"preview"``, for an ``AutoencoderTiny``. ``"auto"`` is
            ``"preview"`` for that, else ``"exact"``.
        kernels: of the exact engine: ``"auto"`` is the fastest for the device; a plan names it.
        memory_limit: of the exact and preview engines: bytes, or ``"2GiB"`` or ``"0.7GB"``: what a decode may
            add above the loaded weights. None: what is free when it starts, less a margin.
        spill_dir: of the exact engine: a folder on a disk for what the limit leaves no room for.
        tiling, slicing: of the reference engine: diffusers' own. Tiling blends overlapping tiles and is not the
            untiled image: it shows seams and shifts colours.

    Raises:
        InvalidOptionError: an option that is unknown or that the engine cannot honour.
    """

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
        tiling: bool = False,
        slicing: bool = False,
    ) -> None:
        vae = unwrapped(vae)
        if not is_a(vae, "AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny"):
            raise InvalidOptionError(
                f"vae: got {type(vae).__name__}, expected diffusers' AutoencoderKL, AutoencoderKLFlux2 or "
                "AutoencoderTiny; Decoder.from_pretrained loads one"
            )
        refuse_to_hang()
        check_loaded(vae)
        engine = resolve_engine(engine, vae)
        given = {
            "kernels": kernels,
            "memory_limit": memory_limit,
            "spill_dir": spill_dir,
            "tiling": tiling,
            "slicing": slicing,
        }
        check_engine_options(engine, given)
        where = vae.device if device == "auto" else resolve_device(device)
        precision = vae.dtype if dtype == "auto" else resolve_dtype(dtype, where)
        if (device, dtype) != ("auto", "auto"):
            torch.nn.Module.to(vae, device=where, dtype=precision)  # diffusers' own logs what nobody can act on
        self._rescale_dtype = None if rescale_dtype == "auto" else resolve_dtype(rescale_dtype, where, "rescale_dtype")
        self.format = LatentFormat.from_vae(vae)
        """How latents become raw latents: read from the checkpoint."""
        self.assumed = ""
        """What `from_pretrained` had to assume about a single file; empty: nothing. Plans print it."""
        self.vae = vae
        self.memory_limit = None if memory_limit is None else parse_memory_limit(memory_limit)
        """Bytes a decode may add above the loaded weights; None: what is free."""
        self.engine: ExactEngine | ReferenceEngine | PreviewEngine
        if engine == "exact":
            self.engine = ExactEngine(vae, kernels=kernels, memory_limit=self.memory_limit, spill_dir=spill_dir)
        elif engine == "preview":
            self.engine = PreviewEngine(vae, memory_limit=self.memory_limit)
        else:
            self.engine = ReferenceEngine(vae, tiling=tiling, slicing=slicing)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        family: str | None = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        batch_norm_eps: float | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **options: Any,
    ) -> Decoder:
        """Load a VAE and make a decoder of it.

        Args:
            source: ``"demo"`` (ships in the package); a diffusers VAE folder, or its ``config.json`` or weights file;
                a pipeline folder that holds ``vae/``; a single file with diffusers' or BFL's names of tensors, behind
                any prefix, of a VAE or of everything: safetensors, or ``.pt``, ``.ckpt``, ``.bin`` that hold tensors
                only; 8-bit floats, scaled or not; a folder that holds one such file; a hub id (docs/models.md).
            subfolder: of the folder or repository; found by itself where it is ``vae``.
            revision: of the hub id: branch, tag or commit.
            variant: of the folder or repository: ``"fp16"``, ``"bf16"``. Left out, the weights without a variant, or
                the only one there.
            family: whose VAE a single file holds: ``"flux1"``, ``"sd3"``, ``"sd"``, ``"sdxl"``, ``"playground-v2.5"``,
                ``"sd-x4-upscaler"``, ``"flux2"``, ``"ernie"``. No tensor tells FLUX.1's from SD3's, SD's from SDXL's
                or FLUX.2's from ERNIE's; left out, the first of each pair is assumed with an
                `AssumedFamilyWarning`, and a plan says so. Of a folder: instead of what its config says.
            scaling_factor, shift_factor, batch_norm_eps: of the checkpoint's latents, instead of its family's or its
                config's; both factors (of SD's kind: the first) settle a single file too.
            device: ``"auto"`` is CUDA where there is a GPU, else the CPU.
            dtype: ``"auto"`` is bfloat16 on CUDA, float32 on a CPU.
            options: as for `Decoder`.

        Raises:
            CheckpointError: the weights are missing, damaged, foreign or out of reach.
            InvalidOptionError: an option that is unknown or that the engine cannot honour, or a family that does not
                fit the tensors.
        """
        refuse_to_hang()
        where = resolve_device(device)
        precision = resolve_dtype(dtype, where)
        with set_aside(where):
            checkpoint = open_checkpoint(
                source,
                subfolder=subfolder,
                revision=revision,
                variant=variant,
                family=family,
                scaling_factor=scaling_factor,
                shift_factor=shift_factor,
                batch_norm_eps=batch_norm_eps,
            )
            checkpoint.warn()
            # Module's own method: that of diffusers logs a line about dtypes, which are settled here.
            vae = torch.nn.Module.to(checkpoint.load(precision), device=where)
            decoder = cls(vae, **options)
        decoder.assumed = checkpoint.assumed
        return decoder

    @property
    def device(self) -> torch.device:
        """Where the VAE is, and where latents are moved."""
        device: torch.device = self.vae.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The VAE's dtype, that of what it decodes and gives."""
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @property
    def approximate(self) -> bool:
        """The images are previews by an ``AutoencoderTiny``, not those of the full VAE."""
        return self.format.preview

    def prepare(self) -> float:
        """Compile the kernels and load the libraries' code now rather than in the first decode; seconds it took.

        On a CPU that is some seconds once per machine (Numba keeps the result), then about one per process. The code,
        20 to 65 MB, counts against no memory limit: a first decode that was not prepared for adds it once. On a GPU
        every kernel is also tried on a small map: a plan names those that do not work there.
        """
        with set_aside(self.device):
            return self.engine.prepare()

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
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Any:
        """Decode latents to images.

        Args:
            latents: packed (B, gh*gw, 4*C) with height and width, or unpacked (B, C, lh, lw); C is 16 for FLUX.1 and
                32 for FLUX.2, whose latents may also come in patches (B, 128, gh, gw); float32, bfloat16 or float16;
                finite; scaled, as the transformer leaves them. Unpacked ones may be one frame, (B, C, 1, lh, lw) or
                (C, 1, lh, lw); one image may come without its batch, (C, lh, lw) or (gh*gw, 4*C): what comes out has
                a batch of 1. ``(C, n, 4*C)`` may be C packed images or one image: height and width tell which.
            height, width: pixels. A size that is not a multiple of 16 is floored, as FluxPipeline does, with a
                `SizeFlooredWarning`. Height and width exchanged cannot be noticed where both give the same number of
                patches: 512x1024 latents decode as 1024x512 without an error, to a scrambled picture.
            latent_ids: (B, gh*gw, 4), of FLUX.2's packed latents in any other order than row by row: where each token
                belongs, as its pipelines make them; every place exactly once. Height and width may be left out then.
                (gh*gw, 4) does for one image's (gh*gw, 4*C).
            output_type: ``"pil"``: list of pictures; ``"np"``: (B, H, W, 3) float32 in [0, 1]; ``"pt"``: (B, 3, H, W)
                in [0, 1], the VAE's dtype; ``"uint8"``: (B, H, W, 3) uint8 array, the bytes of ``"pil"``.
            scaling_factor, shift_factor, batch_norm_eps: instead of the checkpoint's own; refused where it has none
                (FLUX.2 has no factors, the others no eps).
            raw: the latents are raw already, as Flux2KleinPipeline's ``output_type="latent"``: nothing is rescaled. For
                FLUX.2's (B, 32, lh, lw) it must be said, either way: both kinds have that shape.
            progress: called with (done, total).
            cancel: asked as the work goes on; true stops it.

        Returns:
            The images, always with their batch, whether or not the latents had one.

        Raises:
            InvalidLatentsError, InvalidOptionError: before any work.
            NonFiniteOutputError: the pixels would hold NaN or Inf.
            DecodeCancelled: cancel() said so.
            ForkedProcessError: the process was forked, and PyTorch would hang in it (docs/batch.md).
        """
        refuse_to_hang()
        check_output_type(output_type)
        self._begin()
        reading = Reading(
            height=height,
            width=width,
            latent_ids=latent_ids,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            batch_norm_eps=batch_norm_eps,
            raw=raw,
        )
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
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> torch.Tensor:
        """As `decode`, without post-processing: for callers that need several output types of one decode.

        Returns:
            (B, 3, H, W), the VAE's dtype, on its device, nominally [-1, 1], not clamped; B is 1 for one image
            without its batch.
        """
        refuse_to_hang()
        self._begin()
        reading = Reading(
            height=height,
            width=width,
            latent_ids=latent_ids,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            batch_norm_eps=batch_norm_eps,
            raw=raw,
        )
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
    ) -> tuple[int, int]:
        """Validate one request without decoding it: arguments as `decode`.

        Returns:
            (height, width) in pixels that `decode` would give.

        Raises:
            InvalidLatentsError: as `decode` would.
        """
        reading = Reading(height=height, width=width, latent_ids=latent_ids, raw=raw)
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
        self._begin()
        return self._decode(request, progress, cancel)

    def _begin(self) -> None:
        """Do what comes before every decode: warn of a preview, and see whether the model can still decode."""
        if self.approximate:
            warnings.warn(f"decode: {PREVIEW_NOTE}", ApproximateWarning, stacklevel=3)  # the caller of a public method
        self.engine.look()

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
        needed = batch * 3 * height * width * itemsize
        needed += postprocess_bytes(output_type, batch, height, width, itemsize)
        if needed > self.memory_limit:
            raise MemoryLimitError(
                f"memory_limit: got {self.memory_limit} bytes; {batch} x {height}x{width} pixels as {output_type!r} "
                f"take {needed} bytes by themselves; raise the limit, decode fewer at a time, or ask for 'uint8'"
            )

    def plan(self, height: int, width: int, batch: int = 1) -> Plan:
        """How ``batch`` images of this size would be decoded now; ``str(plan)`` is a table that explains itself.

        Args:
            height, width: pixels, multiples of 8.

        Raises:
            InvalidLatentsError: a size that no latents decode to.
            MemoryLimitError: the limit is below the smallest that works.
            InvalidOptionError: the reference engine does not plan.
        """
        scale = self.format.vae_scale_factor
        check_size(height, width, batch, scale)
        plan = self.engine.plan(height // scale, width // scale, batch)
        notes = "; ".join(note for note in (plan.kernels_note, self.assumed) if note)
        return dataclasses.replace(plan, kernels_note=notes)
