"""`Encoder` turns pictures into the latents that diffusers' pipelines would have made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fluxvae.engine.exact import ExactEncoder
from fluxvae.engine.plan import Plan
from fluxvae.engine.preview import PreviewEncoder
from fluxvae.engine.reference import ReferenceEncoder
from fluxvae.engine.settings import set_aside
from fluxvae.engine.way import ENCODE
from fluxvae.errors import InvalidOptionError, NonFiniteOutputError
from fluxvae.forked import refuse_to_hang
from fluxvae.half import Half
from fluxvae.latents.checks import check_options
from fluxvae.latents.format import PREVIEW_LATENTS_NOTE
from fluxvae.latents.packing import pack_latents
from fluxvae.latents.reading import Reading
from fluxvae.options import VAE
from fluxvae.pixels import Images, check_images, to_pixels

__all__ = ["Encoder"]

Progress = Callable[[int, int], None]
Cancel = Callable[[], bool]


class Encoder(Half[ExactEncoder, ReferenceEncoder, PreviewEncoder]):
    """Encodes pictures for FLUX, or for a model that borrows its VAE, with one VAE on one device.

    Args:
        vae: an ``AutoencoderKL``, an ``AutoencoderKLFlux2``, an ``AutoencoderKLQwenImage``, an ``AutoencoderKLWan`` of
            Wan 2.1 or, for approximate latents, an ``AutoencoderTiny`` that is already in memory. It is used as it is,
            without a copy. `from_pretrained` loads one.
        device, dtype: as for `fluxvae.Decoder`.
        engine: ``"exact"`` computes what diffusers computes without tiles, in bounded memory, with the same bits in any
            batch. ``"diffusers"`` is the reference, whose bits are the pipeline's. ``"preview"`` is for an
            ``AutoencoderTiny``. ``"auto"`` is ``"preview"`` for that class and ``"exact"`` for the others.
        kernels: which kernels the exact engine uses. ``"auto"`` is the fastest for the device; a plan names them.
        memory_limit: how much memory the exact or the preview engine may add above the loaded weights, in bytes or as
            a text such as ``"2GiB"`` or ``"0.7GB"``; the pixels that the pictures become count, the pictures do not.
            None: what is free when a call starts, less a margin.
        spill_dir: a folder on a disk, where the exact engine keeps what the limit leaves no room for.
        cuda_graphs: on a GPU, record what the exact engine asks of it as a CUDA graph for each size, and encode later
            images by that, with the same bits and little of the CPU's time. A graph holds the memory of a whole encode
            between calls, which counts against the limit.
        keep_memory: on a CPU, keep the exact engine's memory from one encode to the next, in large pages where the
            system has them. Later calls save the time that the system takes to find it anew. It counts against the
            limit.
        tiling, slicing: diffusers' own, for the reference engine. Tiling changes the latents: with 512-pixel tiles by
            about a sixth of their size for a photograph of 1024 pixels.

    Raises:
        InvalidOptionError: an option is unknown, or the engine cannot honour it.
    """

    way = ENCODE
    engines = (ExactEncoder, ReferenceEncoder, PreviewEncoder)

    def __init__(
        self,
        vae: VAE,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
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

    def encode(
        self,
        images: Any,
        *,
        packed: bool = True,
        sample: torch.Generator | Sequence[torch.Generator] | None = None,
        resize: bool = False,
        raw: bool = False,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        batch_norm_eps: float | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> torch.Tensor:
        """Encode pictures to latents.

        Args:
            images: a PIL image or a list of them; an array (B, H, W, 3) or (H, W, 3), uint8 or floats in [0, 1]; a
                tensor (B, 3, H, W) or (3, H, W) of floats in [0, 1]. All have one size, whose height and width are
                multiples of 16 (of 8 where ``packed`` is false and the latents do not come in patches). A PIL image is
                taken as its pixels lie, as in the pipelines: `PIL.ImageOps.exif_transpose` turns a photograph upright.
                Where the VAE's pictures are RGBA (`picture_channels` is 4), they may have four channels, which are
                taken as they are, not premultiplied; those of three are opaque, with an alpha of 255 as by
                ``convert("RGBA")``. Other VAEs refuse transparency.
            packed: whether the latents come as tokens, (B, gh*gw, 4*C), as FLUX's transformers take them.
            sample: None takes the mode of the distribution, as FLUX's editing pipelines do. A generator draws from it,
                as the image-to-image pipelines do; a list of them has one for each picture.
            resize: make a size that does not fit smaller, as ``VaeImageProcessor.preprocess`` does. The latents are of
                the size below.
            raw: whether the latents are the VAE's own, without the model's scaling.
            scaling_factor, shift_factor, batch_norm_eps: are used instead of the checkpoint's own, as in
                `fluxvae.Decoder.decode`.
            progress: is called with the steps that are done and those that there are.
            cancel: is asked again and again during the work, which stops when it returns true.

        Returns:
            What the model's pipeline would hand to its transformer, in the VAE's dtype and on its device: packed
            latents; or (B, C, lh, lw), for FLUX.2 in patches (B, 4*C, gh, gw), where ``packed`` is false. Raw latents
            that are not packed are (B, C, lh, lw) for every model. ``latents.unsqueeze(2)`` gives them the axis of time
            that some of Qwen-Image's relatives want, (B, C, 1, lh, lw).

        Raises:
            InvalidImagesError, InvalidOptionError: something is wrong with the arguments; no work was begun.
            MemoryLimitError: the memory limit is too small for this size.
            NonFiniteOutputError: the latents would hold NaN or Inf.
            DecodeCancelled: ``cancel`` returned true.
            ForkedProcessError: the process was forked, and PyTorch would hang in it (docs/batch.md).
        """
        refuse_to_hang()
        for name, value in (("packed", packed), ("raw", raw)):
            if not isinstance(value, bool):
                raise InvalidOptionError(f"{name}: got {value!r}, expected True or False")
        if raw and self.approximate:
            raise InvalidOptionError(
                "raw: got True for an AutoencoderTiny, whose latents are those of the transformer; leave it out"
            )
        factors = {"scaling_factor": scaling_factor, "shift_factor": shift_factor, "batch_norm_eps": batch_norm_eps}
        reading = Reading(raw=raw or None, **factors)  # type: ignore[arg-type]
        check_options(self.format, reading)
        with set_aside(self.device):
            multiple = self.format.multiple(packed=packed, raw=raw)
            checked = check_images(images, multiple, self.picture_channels, resize=resize)
            generators = self._generators(sample, checked.batch)
            found = self._drawn(checked, generators, progress, cancel)
            return self._scaled(found, reading, packed=packed, drawn=sample is not None)

    def moments(
        self,
        images: Any,
        *,
        resize: bool = False,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pictures to the distribution of their raw latents. Arguments and errors are those of `encode`.

        Returns:
            The mean and the log variance, each (B, C, lh, lw) in float32, on the VAE's device. The log variance is
            clamped to [-30, 20], as diffusers clamps it.

        Raises:
            InvalidOptionError: it is a preview, which gives latents and no distribution.
        """
        refuse_to_hang()
        if self.approximate:
            raise InvalidOptionError(
                "moments: an AutoencoderTiny gives latents without a variance; use encode, or the full VAE"
            )
        with set_aside(self.device):
            multiple = self.format.multiple(packed=False, raw=True)
            checked = check_images(images, multiple, self.picture_channels, resize=resize)
            found = _distribution(self.encode_images(checked, progress=progress, cancel=cancel))
            return found.mean.float(), found.logvar.float()

    def encode_images(
        self, images: Images, *, progress: Progress | None = None, cancel: Cancel | None = None
    ) -> torch.Tensor:
        """Encode images that were checked, which is the first half of `encode`: a server does it for several requests.

        Args:
            images: what `fluxvae.pixels.check_images` or `fluxvae.pixels.check_pixels` returned for `picture_channels`.
            progress, cancel: as for `encode`.

        Returns:
            The moments of the raw latents, (B, 2*C, lh, lw), as diffusers' ``DiagonalGaussianDistribution`` takes them:
            the mean, and the log variance before it is clamped. Of a preview the latents themselves, (B, C, lh, lw).

        Raises:
            MemoryLimitError, NonFiniteOutputError, DecodeCancelled, ForkedProcessError: as for `encode`.
        """
        with set_aside(self.device):
            self._begin(PREVIEW_LATENTS_NOTE)
            if self.engine.name != "diffusers":
                # This refuses a limit that is too small before any work.
                self.engine.plan(images.height, images.width, images.batch)
            return self.engine.encode(to_pixels(images, self.dtype, self.device), progress=progress, cancel=cancel)

    def latents_of(
        self, moments: torch.Tensor, reading: Reading, *, packed: bool, sample: torch.Generator | None = None
    ) -> torch.Tensor:
        """Turn moments, (B, 2*C, lh, lw), into latents as `encode` returns them, which is its second half.

        Args:
            moments: what `encode_images` returned, or rows of it.
            reading: its factors and ``raw``.
            packed: whether the latents come as tokens.
            sample: draws from the distribution, with one draw for all rows; None takes the mode.
        """
        with set_aside(self.device):
            return self._scaled(self._draw(moments, sample), reading, packed=packed, drawn=sample is not None)

    def plan(self, height: int, width: int, batch: int = 1) -> Plan:
        """Plan how ``batch`` pictures of this size would be encoded now. ``str(plan)`` is a table.

        Args:
            height, width: the size of the pictures in pixels, multiples of 8.

        Raises:
            InvalidLatentsError: no latents stand for this size.
            MemoryLimitError: the limit is below the smallest that works.
            InvalidOptionError: the encoder has the reference engine, which does not plan.
        """
        return self._plan(height, width, batch)

    def _generators(self, sample: object, batch: int) -> list[torch.Generator | None]:
        """The generators that are drawn with: one for the whole batch, or one for each of its pictures."""
        if sample is not None and self.approximate:
            raise InvalidOptionError(
                "sample: got a generator for an AutoencoderTiny, which gives latents and no distribution; leave it out"
            )
        if sample is None or isinstance(sample, torch.Generator):
            return [sample]
        given = list(sample) if isinstance(sample, (list, tuple)) else None
        if given is None or not all(isinstance(one, torch.Generator) for one in given):
            raise InvalidOptionError(
                f"sample: got {type(sample).__name__}, expected a torch.Generator or a list of them"
            )
        if len(given) != batch:
            raise InvalidOptionError(f"sample: got {len(given)} generators for {batch} pictures, expected one for each")
        return given

    def _drawn(
        self,
        images: Images,
        generators: list[torch.Generator | None],
        progress: Progress | None,
        cancel: Cancel | None,
    ) -> torch.Tensor:
        """The raw latents (B, C, lh, lw). With a generator for each picture, each is encoded alone, as in diffusers."""
        if len(generators) == 1:
            return self._draw(self.encode_images(images, progress=progress, cancel=cancel), generators[0])
        drawn = []
        for index, generator in enumerate(generators):
            one = replace(images, values=images.values[index : index + 1])
            shown = None if progress is None else _Part(progress, index, len(generators))
            drawn.append(self._draw(self.encode_images(one, progress=shown, cancel=cancel), generator))
        return torch.cat(drawn)

    def _draw(self, found: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        if self.approximate:
            return found
        distribution = _distribution(found)
        latents: torch.Tensor = distribution.mode() if generator is None else distribution.sample(generator)
        return latents

    def _scaled(self, raw: torch.Tensor, reading: Reading, *, packed: bool, drawn: bool) -> torch.Tensor:
        """Raw latents (B, C, lh, lw) with the model's scaling, and packed where that is asked for."""
        latents = self.format.from_raw(raw, reading, drawn=drawn)
        if not torch.isfinite(latents).all():  # the engine's own are, so this is a factor's doing
            raise NonFiniteOutputError(
                f"latents: got NaN or Inf by scaling them with {reading.parameters() or 'its own factors'}; "
                "the raw ones are finite: ask for raw=True, or for other factors"
            )
        if not packed:
            return latents
        if latents.shape[1] == 4 * self.format.channels:  # in patches, whose channels are in the order of a token's
            return latents.flatten(2).transpose(1, 2).contiguous()
        return pack_latents(latents)


class _Part:
    """The progress of one picture of several, as a part of the whole."""

    def __init__(self, progress: Progress, index: int, count: int) -> None:
        self._progress, self._index, self._count = progress, index, count

    def __call__(self, done: int, total: int) -> None:
        self._progress(self._index * total + done, self._count * total)


def _distribution(moments: torch.Tensor) -> Any:
    """diffusers' distribution of these moments (B, 2*C, lh, lw)."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution(moments)
