"""The preview engine: an ``AutoencoderTiny`` (TAEF1, TAEF2), which is fast, small and approximate by design.

It is a network of its own that was distilled from the VAE, not the VAE in fewer steps. Whatever shows one of its images
says that it is a preview.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fluxvae.devices import computes_directly
from fluxvae.engine.calls import RUNTIME_BYTES, Geometry, LayerPlan, Step
from fluxvae.engine.memory.free import available_memory
from fluxvae.engine.memory.heap import trim_heap
from fluxvae.engine.module_state import check_loaded
from fluxvae.engine.plan import Plan, size_in_words
from fluxvae.engine.planner import limit_of
from fluxvae.engine.settings import set_aside
from fluxvae.engine.way import DECODE, ENCODE, Way
from fluxvae.errors import DecodeCancelled, InvalidOptionError, MemoryLimitError, NonFiniteOutputError
from fluxvae.latents.format import PREVIEW_LATENTS_NOTE, PREVIEW_NOTE

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

__all__ = ["ApproximateWarning", "PreviewDecoder", "PreviewEncoder", "PreviewEngine"]


LIVE_MAPS = 4.25
"""How many maps of the full resolution a call takes at its peak: a block's input, a convolution's input and output, and
the map that it adds them into. From 512 to 1024 pixels, 4.00 to 4.02 were measured in float32, and two in bfloat16,
which oneDNN convolves without a copy."""

HOLES = 4
"""How many such maps glibc may keep besides, if they are small enough to lie in its heap, because it seldom puts
an aligned block where one of the same size was freed. From 64 to 384 pixels, none to three were measured, which changed
from run to run. Giving them back before every layer, and not only before every block, would take 80 % more time."""

MMAP_THRESHOLD = 32 << 20
"""Bytes (glibc's DEFAULT_MMAP_THRESHOLD_MAX): what is larger never lies in the heap."""


class ApproximateWarning(UserWarning):
    """The image, or the latents, are a preview by an ``AutoencoderTiny``, not those of the full VAE."""


class PreviewEngine:
    """One half of diffusers' ``AutoencoderTiny``, which is approximate, one image at a time.

    An image's bits do not depend on its batch. Nothing is tiled or spilled: a limit that does not hold one image is
    refused before any work.

    Args:
        vae: read, never copied or changed.
        memory_limit: bytes a call may add above the loaded weights; None: what is free, less a tenth.

    Raises:
        InvalidOptionError: float16 or bfloat16 on a processor that has no arithmetic for it.
    """

    name = "preview"
    way: ClassVar[Way]

    def __init__(self, vae: AutoencoderTiny, *, memory_limit: int | None = None) -> None:
        if not computes_directly(vae.dtype, vae.device):
            name = str(vae.dtype).removeprefix("torch.")
            raise InvalidOptionError(
                f"dtype: got {name} for a preview on a processor without {name} arithmetic, where its convolutions "
                "take many times the memory and time; load it with dtype='float32'"
            )
        self._vae = vae
        self.memory_limit = memory_limit
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Give a copy everything but the lock; it makes one of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def look(self) -> None:
        """Refuse a model whose weights were taken away since it was given."""
        check_loaded(self._vae, self.way)

    def prepare(self) -> float:
        """Do nothing, as there is nothing to compile; 0 seconds."""
        return 0.0

    def limit(self) -> tuple[int, str]:
        """The bytes that a call may add above the weights now, and what set them."""
        return limit_of(self.memory_limit, lambda: available_memory(self._vae.device))

    def plan(self, height: int, width: int, batch: int = 1) -> Plan:
        """Plan what a call would take. The plan says that the result is approximate.

        Args:
            height, width: the size of what is given: latents to be decoded, or pixels to be encoded.

        Raises:
            MemoryLimitError: it would take more than the limit.
        """
        plan = self._plan(height, width, batch)
        if plan.limit is not None and plan.peak_bytes > plan.limit:
            raise MemoryLimitError(
                f"{plan.limit_source}: got {plan.limit} bytes ({size_in_words(plan.limit)}); a preview of {batch} x "
                f"{plan.width}x{plan.height} needs {plan.peak_bytes} bytes ({size_in_words(plan.peak_bytes)}) above "
                f"the weights. Raise the limit, or {self.way.name} a smaller size or batch"
            )
        return plan

    def smallest_limit(self, height: int, width: int, batch: int = 1) -> int:
        """The smallest ``memory_limit`` that does for this size, in bytes."""
        return self._plan(height, width, batch).peak_bytes

    @property
    def _blocks(self) -> Any:
        """The layers of this half, in their order."""
        return getattr(self._vae, self.way.network).layers

    def _plan(self, height: int, width: int, batch: int) -> Plan:
        config, itemsize = self._vae.config, self._vae.dtype.itemsize
        scale = config["upsampling_scaling_factor"] ** (len(config["num_decoder_blocks"]) - 1)
        latent_height, latent_width = height, width
        if self.way == ENCODE:
            latent_height, latent_width = -(-height // scale), -(-width // scale)
        else:
            height, width = scale * height, scale * width
        channels = config["decoder_block_out_channels"][-1] if self.way == DECODE else self._blocks[0].out_channels
        latents = latent_height * latent_width * config["latent_channels"] * itemsize
        one = height * width * config["out_channels" if self.way == DECODE else "in_channels"] * itemsize
        largest = height * width * channels * itemsize
        live = int((LIVE_MAPS + (HOLES if largest <= MMAP_THRESHOLD else 0)) * largest)
        macs = sum(
            module.weight.numel() * latent_height * latent_width * scale_of**2
            for module, scale_of in self._convolutions(config["upsampling_scaling_factor"], scale)
        )
        step = Step(self.way.name, 0, 0, 0, live + 2 * one, 0, macs, 0, 1)
        limit, source = self.limit()
        return Plan(
            height=height,
            width=width,
            batch=batch,
            kernels="torch",
            kernels_note=PREVIEW_NOTE if self.way == DECODE else PREVIEW_LATENTS_NOTE,
            limit=limit,
            limit_source=source,
            fixed_bytes=batch * (one + 2 * latents) + RUNTIME_BYTES[itemsize],
            layers=(LayerPlan(self.way.network, height, width, channels, None, "memory", False, (step,)),),
            work_ratio=1.0,
            seconds=0.0,
            geometry=Geometry(latent_height, latent_width, itemsize),
        )

    def _convolutions(self, factor: int, whole: int) -> list[tuple[torch.nn.Conv2d, int]]:
        """Every convolution, with how many pixels of its result lie on one latent, each way.

        Args:
            factor: by how much a resampling changes the size.
            whole: the pixels of a picture on one latent, each way.
        """
        found, scale = [], 1 if self.way == DECODE else whole
        for module in self._blocks.modules():
            if isinstance(module, torch.nn.Upsample):
                scale *= factor
            elif isinstance(module, torch.nn.Conv2d):
                scale //= module.stride[0]
                found.append((module, scale))
        return found

    @contextlib.contextmanager
    def _trimmed(self) -> Iterator[None]:
        """Give back what a block freed before the next one, or it stays resident beside the next level's larger maps.

        That takes 8 % of the time at 512 pixels, and a third at 256.
        """
        with contextlib.ExitStack() as hooks:
            if self._vae.device.type == "cpu":
                for module in self._blocks:
                    hooks.callback(module.register_forward_pre_hook(lambda *_: trim_heap()).remove)
            yield

    def _compute(
        self,
        given: torch.Tensor,
        compute: Callable[[torch.Tensor], torch.Tensor],
        progress: Callable[[int, int], None] | None,
        cancel: Callable[[], bool] | None,
    ) -> torch.Tensor:
        way, batch = self.way, given.shape[0]
        if self._vae.use_tiling:
            raise InvalidOptionError("use_tiling: got True; call vae.disable_tiling() before a preview")
        self.look()
        with self._lock, set_aside(given.device):
            self.plan(given.shape[2], given.shape[3], batch)
            made = None
            if progress is not None:
                progress(0, batch)
            for i in range(batch):
                if cancel is not None and cancel():
                    raise DecodeCancelled(f"{way.name}: cancelled after {i} of {batch} images, as its caller asked")
                with self._trimmed():
                    one = compute(given[i : i + 1])[0]
                if made is None:
                    made = torch.empty((batch, *one.shape), dtype=given.dtype, device=given.device)
                made[i] = one
                del one
                if progress is not None:
                    progress(i + 1, batch)
        assert made is not None
        if not bool(torch.isfinite(made).all()):
            raise NonFiniteOutputError(
                f"{way.name}: the {way.made} hold NaN or Inf in {made.dtype}; {way.name} with dtype='float32', or look "
                f"where the {way.given} come from"
            )
        return made


class PreviewDecoder(PreviewEngine):
    """Latents to an approximate image. Arguments as for `PreviewEngine`."""

    way = DECODE

    def decode(
        self,
        raw: torch.Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Decode latents.

        Args:
            raw: (B, C, lh, lw), in the VAE's dtype, on its device.
            progress: called with (done, images) before the first image and after each.
            cancel: asked before every image.

        Returns:
            (B, 3, H, W), the VAE's dtype, nominally [-1, 1], not clamped.

        Raises:
            MemoryLimitError, DecodeCancelled, NonFiniteOutputError.
        """
        return self._compute(raw, lambda raw: self._vae.decode(raw, return_dict=False)[0], progress, cancel)


class PreviewEncoder(PreviewEngine):
    """Pixels to approximate latents. Arguments as for `PreviewEngine`."""

    way = ENCODE

    def encode(
        self,
        pixels: torch.Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Encode pixels. Errors, progress and cancellation are those of `PreviewDecoder.decode`.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], in the VAE's dtype, on its device.

        Returns:
            (B, C, lh, lw), the VAE's dtype. There is no variance: the network gives latents, not a distribution.
        """
        return self._compute(pixels, lambda pixels: self._vae.encode(pixels, return_dict=False)[0], progress, cancel)
