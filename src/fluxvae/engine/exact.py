"""The exact engine: the untiled image, in strips, within the memory its caller names."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from fluxvae.engine.kernels import Kernels, make_kernels
from fluxvae.engine.network import parameters, read_network
from fluxvae.engine.norm import NonFiniteMap
from fluxvae.engine.plan import Geometry, Plan
from fluxvae.engine.plan import block_values as default_block_values
from fluxvae.engine.planner import Planner
from fluxvae.engine.runner import Runner
from fluxvae.engine.storage import Spill, available_memory
from fluxvae.errors import DecodeCancelled, InvalidOptionError, MemoryLimitError, NonFiniteOutputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["ExactEngine", "PrecisionRetryWarning"]

Progress = Callable[[int, int], None]
Cancel = Callable[[], bool]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


class PrecisionRetryWarning(UserWarning):
    """A half-precision decode overflowed and was done again in float32, with the same weights."""


class ExactEngine:
    """Raw latents to pixels: the function diffusers' untiled decode computes, in bounded memory.

    The same image has the same bits for any memory limit and in any batch: every image is decoded alone, and every map
    is cut into blocks by layer and image size only. (The memory format of the weights may change the last bits, as it
    does in diffusers: it decides which convolution runs.)

    Args:
        vae: read, never copied or changed.
        kernels: ``"torch"``: PyTorch's own; ``"winograd"``: ours, float32 on a CPU, several times faster;
            ``"auto"``: Winograd where it runs, else PyTorch's, and `Plan.kernels` says which and why.
        memory_limit: bytes a decode may add above the loaded weights; None: what is free when it starts, less a tenth.
        spill_dir: where feature maps go that memory has no room for; None: the first of the temporary folder,
            ``/var/tmp`` and the working folder that is not itself memory. On a GPU they go to host memory.
        block_values: for tests; values per block of rows, which (unlike a limit) does change the last bits.

    Raises:
        InvalidOptionError: an option that is unknown, or a decoder with a module this engine does not know.
    """

    name = "exact"

    def __init__(
        self,
        vae: AutoencoderKL,
        *,
        kernels: str = "auto",
        memory_limit: int | None = None,
        spill_dir: str | Path | None = None,
        block_values: int | None = None,
    ) -> None:
        if memory_limit is not None and memory_limit < 1:
            raise InvalidOptionError(f"memory_limit: got {memory_limit}, expected a positive number of bytes")
        self._vae = vae
        self.network = read_network(vae)
        # Refuse now what can never be. The model may still move to a GPU, where there is one.
        make_kernels(kernels, torch.device("cuda" if kernels == "cuda" and torch.cuda.is_available() else "cpu"))
        self._kernels_name, self.memory_limit, self._spill_dir = kernels, memory_limit, spill_dir
        self._block_values = block_values
        if spill_dir is not None and self._device.type == "cpu":
            Spill(self._device, spill_dir)
        self._planners: dict[Hashable, Planner] = {}
        self._lock = threading.Lock()

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._weight.device
        return device

    @property
    def _weight(self) -> torch.Tensor:
        return parameters(self.network.conv_in.module)[0]

    def plan(self, latent_height: int, latent_width: int, batch: int = 1) -> Plan:
        """How ``batch`` images of this latent size would be decoded now.

        Raises:
            MemoryLimitError: the limit is below the smallest that works; the message names that.
        """
        planner, spill = self._planner_for(latent_height, latent_width, batch)
        limit, source = self._limit(self._device)
        return planner.plan(limit, source=source, spill_free=spill.free(), spill_dir=spill.describe())

    def smallest_limit(self, latent_height: int, latent_width: int, batch: int = 1) -> int:
        """The smallest ``memory_limit`` that decodes this size, in bytes."""
        planner, spill = self._planner_for(latent_height, latent_width, batch)
        return planner.smallest_limit(spill.free())

    def _planner_for(self, latent_height: int, latent_width: int, batch: int) -> tuple[Planner, Spill]:
        if min(latent_height, latent_width, batch) < 1:
            raise InvalidOptionError(
                f"plan: got latents {latent_height}x{latent_width}, batch {batch}; expected positive numbers"
            )
        device, dtype = self._device, self._weight.dtype
        kernels = self._kernels(device)
        planner = self._planner((latent_height, latent_width), batch, kernels.compute_dtype(dtype), dtype, kernels)
        return planner, Spill(device, self._spill_dir)

    def decode(
        self, raw: torch.Tensor, *, progress: Progress | None = None, cancel: Cancel | None = None
    ) -> torch.Tensor:
        """Decode raw latents.

        Args:
            raw: (B, C, lh, lw), on the VAE's device, in its dtype.
            progress: called with (done, total) at the start and after every block of rows.
            cancel: asked before every block; true stops the decode.

        Returns:
            (B, 3, H, W), the same device and dtype, nominally [-1, 1], not clamped: ``vae.decode(raw).sample``.

        Raises:
            MemoryLimitError: before any work, if the limit is too small for this size.
            NonFiniteOutputError: NaN or Inf in float32. Computed in half precision, the decode is repeated in float32
                instead, with a `PrecisionRetryWarning`.
            DecodeCancelled: cancel() said so.
        """
        self._check(raw)
        with self._lock, torch.no_grad():
            device, dtype = raw.device, raw.dtype
            kernels, spill = self._kernels(device), Spill(device, self._spill_dir)
            limit, source = self._limit(device)
            options: _PlanOptions = {"source": source, "spill_free": spill.free(), "spill_dir": spill.describe()}
            size, batch = (raw.shape[2], raw.shape[3]), raw.shape[0]
            computed = kernels.compute_dtype(dtype)
            plan = self._planner(size, batch, computed, dtype, kernels).plan(limit, **options)
            scale = self.network.scale
            shape = (batch, self.network.out_channels, size[0] * scale, size[1] * scale)
            image = torch.empty(shape, dtype=dtype, device=device)
            clock = _Clock(plan.total_blocks, progress, cancel)
            try:
                self._run(plan, kernels, spill, raw, image, computed, clock)
            except NonFiniteMap as error:
                if not bool(torch.isfinite(raw).all()):
                    raise NonFiniteOutputError(
                        "latents: got NaN or Inf, so the pixels would hold them too; check what made the latents"
                    ) from error
                if computed not in _HALF:
                    raise NonFiniteOutputError(
                        f"decode: {error} in {_name(computed)}; the latents or the weights are out of range"
                    ) from error
                reason = str(error)
            else:
                return _checked(image, computed)
            try:
                plan = self._planner(size, batch, torch.float32, dtype, kernels).plan(limit, **options)
            except MemoryLimitError as error:
                raise NonFiniteOutputError(
                    f"decode: {reason} in {_name(dtype)}, and the memory limit leaves no room for float32: {error}"
                ) from error
            warnings.warn(
                f"decode: {reason} in {_name(dtype)}; decoding again in float32 (load the model with dtype='float32' "
                "to avoid the first attempt)",
                PrecisionRetryWarning,
                stacklevel=2,
            )
            clock.restart(plan.total_blocks)
            try:
                self._run(plan, kernels, spill, raw, image, torch.float32, clock)
            except NonFiniteMap as error:
                raise NonFiniteOutputError(
                    f"decode: {error} in float32 too; the latents or the weights are out of range"
                ) from error
            return _checked(image, torch.float32)

    def prepare(self) -> float:
        """Compile what the kernels still need compiled, or load it from the cache; seconds it took.

        The first decode does it if nobody did: some seconds once per machine, then less than one per process.
        """
        return self._kernels(self._device).prepare()

    def _run(
        self, plan: Plan, kernels: Kernels, spill: Spill, raw: torch.Tensor, image: torch.Tensor,
        dtype: torch.dtype, clock: _Clock,
    ) -> None:  # fmt: skip
        clock.begin()
        kernels.prepare()
        runner = Runner(self.network, plan, kernels, spill, raw.device, dtype, clock.tick)
        try:
            with kernels.session():
                for latents, pixels in zip(raw, image, strict=True):
                    runner.run(latents, pixels)
        finally:
            runner.close()

    def _planner(
        self, size: tuple[int, int], batch: int, dtype: torch.dtype, stored: torch.dtype, kernels: Kernels
    ) -> Planner:
        """The planner of one size, made once: that takes as long as a small decode. The last ones are kept."""
        threads = torch.get_num_threads()
        key = size, batch, dtype, stored, kernels.channels_last, self._device.type, threads
        if key in self._planners:
            return self._planners[key]
        values = self._block_values or kernels.block_values or default_block_values(self.network, *size)
        geometry = Geometry(*size, dtype.itemsize, dtype != stored, kernels.row_multiple, values)
        macs, moved = _RATES["cuda" if self._device.type == "cuda" else "cpu"]
        if self._device.type == "cpu":
            macs *= threads
        planner = Planner(
            self.network, geometry, kernels, batch=batch, output_itemsize=stored.itemsize,
            macs_per_second=macs, spill_bytes_per_second=moved,
        )  # fmt: skip
        while len(self._planners) >= _KEPT_PLANNERS:
            self._planners.pop(next(iter(self._planners)), None)
        self._planners[key] = planner
        return planner

    def _kernels(self, device: torch.device) -> Kernels:
        kernels = make_kernels(self._kernels_name, device)
        weight = parameters(self.network.conv_out.module)[0]
        kernels.channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return kernels

    def _limit(self, device: torch.device) -> tuple[int, str]:
        if self.memory_limit is not None:
            return self.memory_limit, "memory_limit"
        return available_memory(device) * 9 // 10, "free memory"

    def _check(self, raw: torch.Tensor) -> None:
        weight = self._weight
        if raw.ndim != 4 or raw.shape[1] != self.network.latent_channels or min(raw.shape) < 1:
            raise InvalidOptionError(
                f"raw: got shape {tuple(raw.shape)}, expected (batch, {self.network.latent_channels}, height, width)"
            )
        if raw.dtype != weight.dtype or raw.dtype not in _DTYPES or raw.device != weight.device:
            raise InvalidOptionError(
                f"raw: got {_name(raw.dtype)} on {raw.device}, expected {_name(weight.dtype)} on {weight.device}, "
                "as the VAE's weights are (on 'meta' they have been offloaded part by part, which is not supported)"
            )


_RATES = {"cpu": (5e10, 1e9), "cuda": (1e13, 1e10)}
"""Multiply-adds per second (per thread on a CPU) and spill bytes per second: only their ratio matters, to weigh
computing a map again against spilling it."""


_KEPT_PLANNERS = 32


class _PlanOptions(TypedDict):
    source: str
    spill_free: int | None
    spill_dir: str | None


class _Clock:
    """Progress and cancellation, block by block."""

    def __init__(self, total: int, progress: Progress | None, cancel: Cancel | None) -> None:
        self._total, self._progress, self._cancel = total, progress, cancel
        self._done = 0

    def begin(self) -> None:
        """Before the first block."""
        self._ask()
        if self._progress is not None:
            self._progress(self._done, self._total)

    def restart(self, total: int) -> None:
        """A second attempt: done never goes back, so the total grows."""
        self._total = self._done + total

    def tick(self) -> None:
        """After a block."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        if self._done < self._total:
            self._ask()

    def _ask(self) -> None:
        if self._cancel is not None and self._cancel():
            raise DecodeCancelled(f"decode: cancelled after {self._done} of {self._total} blocks, as its caller asked")


def _checked(image: torch.Tensor, computed: torch.dtype) -> torch.Tensor:
    """Blocks were finite as they were computed; rounded to a narrower dtype, they may not be."""
    if image.dtype != computed and not bool(torch.isfinite(image).all()):
        raise NonFiniteOutputError(f"decode: pixels overflow {_name(image.dtype)}; decode with dtype='float32'")
    return image


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
