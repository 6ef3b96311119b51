"""`Decoder` turns FLUX latents into the image that diffusers' FluxPipeline would have made of them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fluxvae.checkpoints import open_checkpoint
from fluxvae.engine.exact import ExactEngine
from fluxvae.engine.layers.reading import unwrapped
from fluxvae.engine.module_state import check_loaded
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
    """Decodes the latents of FLUX, or of a model that borrows its VAE, with one VAE on one device.

    Args:
        vae: an ``AutoencoderKL``, an ``AutoencoderKLFlux2`` or, for approximate previews, an ``AutoencoderTiny`` that
            is already in memory. It is used as it is, without a copy. `from_pretrained` loads one.
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
        tiling, slicing: diffusers' own, for the reference engine. Tiling blends overlapping tiles, so its image is not
            the untiled one: it shows seams and shifts colours.

    Raises:
        InvalidOptionError: an option is unknown, or the engine cannot honour it.
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
            torch.nn.Module.to(vae, device=where, dtype=precision)  # that of diffusers logs a line about dtypes
        self._rescale_dtype = None if rescale_dtype == "auto" else resolve_dtype(rescale_dtype, where, "rescale_dtype")
        self.format = LatentFormat.from_vae(vae)
        """How latents become raw latents, as the checkpoint says."""
        self.assumed = ""
        """What `from_pretrained` had to assume about a single file, which plans print. It is empty where that was
        nothing."""
        self.vae = vae
        self.memory_limit = None if memory_limit is None else parse_memory_limit(memory_limit)
        """How many bytes a decode may add above the loaded weights. None: what is free."""
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
            source: one of these (docs/models.md):
                ``"demo"``, which ships in the package;
                a diffusers VAE folder, its ``config.json`` or its weights file;
                a pipeline folder that holds ``vae/``;
                a single file of a VAE or of a whole model, whose tensors have diffusers' or BFL's names behind any
                prefix: safetensors, or a ``.pt``, ``.ckpt`` or ``.bin`` that holds only tensors, also as 8-bit floats,
                scaled or not;
                a folder that holds one such file;
                a hub id.
            subfolder: where the VAE is in the folder or repository. ``vae`` is found without it.
            revision: the branch, tag or commit of the hub id.
            variant: ``"fp16"`` or ``"bf16"``, of the folder or repository. If it is left out, the weights without a
                variant are meant, or the only ones that are there.
            family: whose VAE a single file holds: ``"flux1"``, ``"sd3"``, ``"sd"``, ``"sdxl"``, ``"playground-v2.5"``,
                ``"sd-x4-upscaler"``, ``"flux2"`` or ``"ernie"``. No tensor tells FLUX.1's from SD3's, SD's from SDXL's
                or FLUX.2's from ERNIE's. If it is left out, the first of such a pair is assumed with an
                `AssumedFamilyWarning`, and a plan says so. For a folder it is used instead of what the config says.
            scaling_factor, shift_factor, batch_norm_eps: belong to the checkpoint's latents, and are used instead of
                its family's or its config's. Both factors (for VAEs of SD's kind the first) settle a single file too.
            device: ``"auto"`` is CUDA where there is a GPU, and the CPU elsewhere.
            dtype: ``"auto"`` is bfloat16 on CUDA, and float32 on a CPU.
            options: as for `Decoder`.

        Raises:
            CheckpointError: the weights are missing, damaged, foreign or out of reach.
            InvalidOptionError: an option is unknown, or the engine cannot honour it, or the family does not fit the
                tensors.
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
            # The method is that of torch.nn.Module, because diffusers' own logs a line about dtypes.
            vae = torch.nn.Module.to(checkpoint.load(precision), device=where)
            decoder = cls(vae, **options)
        decoder.assumed = checkpoint.assumed
        return decoder

    @property
    def device(self) -> torch.device:
        """Where the VAE is, and where latents are moved to."""
        device: torch.device = self.vae.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the VAE, in which it takes raw latents and returns images."""
        dtype: torch.dtype = self.vae.dtype
        return dtype

    @property
    def approximate(self) -> bool:
        """Whether the images are previews by an ``AutoencoderTiny`` rather than those of the full VAE."""
        return self.format.preview

    def prepare(self) -> float:
        """Compile the kernels and load the libraries' code now rather than in the first decode.

        On a CPU this takes some seconds once per machine, because Numba keeps the result, and then about one second per
        process. The code, 20 to 65 MB, counts against no memory limit; a first decode that was not prepared for adds
        it. On a GPU every kernel is also tried on a small map, and a plan names those that do not work there.

        Returns:
            The seconds that it took.
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
            latents: packed (B, gh*gw, 4*C) with height and width, or unpacked (B, C, lh, lw). C is 16 for FLUX.1 and 32
                for FLUX.2, whose latents may also come in patches (B, 128, gh, gw). They are float32, bfloat16 or
                float16, finite, and scaled, as the transformer leaves them. Unpacked ones may be one frame,
                (B, C, 1, lh, lw) or (C, 1, lh, lw). One image may come without its batch, (C, lh, lw) or
                (gh*gw, 4*C). ``(C, n, 4*C)`` may be C packed images or one image; height and width tell which.
            height, width: the size of the image in pixels. One that is not a multiple of 16 is floored, as in
                FluxPipeline, with a `SizeFlooredWarning`. If height and width are exchanged and both give the same
                number of patches, that cannot be noticed: latents of 512x1024 decode as 1024x512 without an error, to a
                scrambled picture.
            latent_ids: (B, gh*gw, 4), for FLUX.2's packed latents that do not come row by row. They say where each
                token belongs, every place exactly once, as FLUX.2's pipelines make them. Height and width may be left
                out then. For one image's (gh*gw, 4*C) they may be (gh*gw, 4).
            output_type: ``"pil"`` makes a list of pictures; ``"np"`` (B, H, W, 3) float32 in [0, 1]; ``"pt"``
                (B, 3, H, W) in [0, 1], in the VAE's dtype; ``"uint8"`` a (B, H, W, 3) uint8 array, the bytes of
                ``"pil"``.
            scaling_factor, shift_factor, batch_norm_eps: are used instead of the checkpoint's own. They are refused
                where it has none: FLUX.2 has no factors, and the others have no eps.
            raw: whether the latents are raw already, like those of Flux2KleinPipeline's ``output_type="latent"``, so
                that nothing is rescaled. For FLUX.2's (B, 32, lh, lw) it must be said either way, because both kinds
                have that shape.
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
        self._begin()
        reading = Reading(
            height=height, width=width, latent_ids=latent_ids, scaling_factor=scaling_factor,
            shift_factor=shift_factor, batch_norm_eps=batch_norm_eps, raw=raw,
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
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> torch.Tensor:
        """Decode without post-processing, for callers that need several output types of one decode. Else as `decode`.

        Returns:
            (B, 3, H, W), in the VAE's dtype and on its device, nominally in [-1, 1], not clamped. B is 1 for one image
            without its batch.
        """
        refuse_to_hang()
        self._begin()
        reading = Reading(
            height=height, width=width, latent_ids=latent_ids, scaling_factor=scaling_factor,
            shift_factor=shift_factor, batch_norm_eps=batch_norm_eps, raw=raw,
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
    ) -> tuple[int, int]:
        """Check latents without decoding them. The arguments are those of `decode`.

        Returns:
            The (height, width), in pixels, of the image that `decode` would make.

        Raises:
            InvalidLatentsError, InvalidOptionError: as `decode` would.
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
        """Plan how ``batch`` images of this size would be decoded now. ``str(plan)`` is a table that explains itself.

        Args:
            height, width: the size of the images in pixels, multiples of 8.

        Raises:
            InvalidLatentsError: no latents decode to this size.
            MemoryLimitError: the limit is below the smallest that works.
            InvalidOptionError: the decoder has the reference engine, which does not plan.
        """
        scale = self.format.vae_scale_factor
        check_size(height, width, batch, scale)
        plan = self.engine.plan(height // scale, width // scale, batch)
        notes = "; ".join(note for note in (plan.kernels_note, self.assumed) if note)
        return dataclasses.replace(plan, kernels_note=notes)
