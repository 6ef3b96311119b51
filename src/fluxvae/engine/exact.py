"""The exact engine: it computes the untiled image strip by strip, within the memory that its caller allows."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fluxvae.engine.clock import Cancel, Clock, Progress
from fluxvae.engine.kernels import Kernels
from fluxvae.engine.kernels.choose import make_kernels
from fluxvae.engine.memory.free import available_memory, is_out_of_memory
from fluxvae.engine.memory.spill import Spill
from fluxvae.engine.network import read_network
from fluxvae.engine.plan import Plan, size_in_words
from fluxvae.engine.planner import Planner, limit_of, make_planner
from fluxvae.engine.records import parameters
from fluxvae.engine.runner import Runner
from fluxvae.engine.settings import set_aside
from fluxvae.engine.statistics import NonFiniteMap
from fluxvae.errors import InvalidOptionError, MemoryLimitError, NonFiniteOutputError, UnavailableError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["ExactEngine", "OutOfMemoryWarning", "PrecisionRetryWarning"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


class PrecisionRetryWarning(UserWarning):
    """A half-precision decode overflowed and was done again in float32, with the same weights."""


class OutOfMemoryWarning(UserWarning):
    """Memory ran out although the limit allowed what was planned; the decode was done again by a smaller plan."""


class ExactEngine:
    """Raw latents to pixels: the function diffusers' untiled decode computes, in bounded memory.

    The same image has the same bits for any memory limit and in any batch: every image is decoded alone, and every map
    is cut into blocks by layer and image size only. (The memory format of the weights may change the last bits, as it
    does in diffusers: it decides which convolution runs.)

    Args:
        vae: the model. It is read and never copied or changed.
        kernels: ``"torch"`` are PyTorch's own operations. ``"winograd"`` are our kernels for float32 on a CPU, which
            are several times faster. ``"cuda"`` are cuDNN and our kernels on an NVIDIA GPU. ``"auto"`` takes the
            faster ones where they run and PyTorch's elsewhere; `Plan.kernels` says which were taken and why.
        memory_limit: the bytes that a decode may add above the loaded weights. None stands for nine tenths of what is
            free when the decode starts.
        spill_dir: the folder for feature maps that memory has no room for. None stands for the first of the temporary
            folder, ``/var/tmp`` and the working folder that is not itself memory. A GPU's maps go to host memory.
        block_values: how many values a block of rows has, for tests. Unlike a limit, it changes an image's last bits.

    Raises:
        InvalidOptionError: an option is unknown, or the decoder has a module that this engine does not know, or
            something was done to the model that its weights do not show. The model is looked at before every decode,
            so a later decode may raise this too.
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
        # Refuse kernels that this machine can never run. Where there is a GPU, the model may still move to it.
        make_kernels(kernels, torch.device("cuda" if kernels == "cuda" and torch.cuda.is_available() else "cpu"))
        self._kernels_name, self.memory_limit, self._spill_dir = kernels, memory_limit, spill_dir
        self._block_values = block_values
        if spill_dir is not None and self._device.type == "cpu":
            Spill(self._device, spill_dir)
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._prepared = False
        self._planners: dict[Hashable, Planner] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Give a copy the model and the options; it works out for itself what follows from them."""
        left_out = ("_prepared", "_planners", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_afresh()

    def look(self) -> None:
        """Read the model anew: its modules may have been replaced, hooked or moved since the last decode."""
        network = read_network(self._vae)
        if network != self.network:
            self.network = network
            self._planners = {}

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._weight.device
        return device

    @property
    def _weight(self) -> torch.Tensor:
        return parameters(self.network.first.conv.module)[0]

    def plan(self, latent_height: int, latent_width: int, batch: int = 1) -> Plan:
        """Plan how ``batch`` images of this latent size would be decoded now.

        Raises:
            MemoryLimitError: the limit is below the smallest one that works, which the message names.
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
        self.look()
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
            UnavailableError: memory ran out although the limit allowed what was planned, as happens on a GPU that
                others use too. The decode is first repeated within three quarters of what was planned, again and again,
                with an `OutOfMemoryWarning` each time; this error means that the smallest plan did not fit either.
            NonFiniteOutputError: the result has NaN or Inf in float32. A decode in half precision is first repeated in
                float32, with a `PrecisionRetryWarning`.
            DecodeCancelled: ``cancel()`` returned true.
        """
        self.look()
        self._check(raw)
        with self._lock, set_aside(raw.device):
            kernels, spill = self._kernels(raw.device), Spill(raw.device, self._spill_dir)
            limit, source = self._limit(raw.device)
            clock = Clock(progress, cancel)
            while True:
                try:
                    return self._decode(raw, kernels, spill, limit, source, clock)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                # Not within the handler, since the error's traceback holds the maps whose room is needed now.
                limit, source = self._less(raw, kernels, spill, limit, source)

    def _decode(
        self, raw: torch.Tensor, kernels: Kernels, spill: Spill, limit: int, source: str, clock: Clock
    ) -> torch.Tensor:
        dtype = raw.dtype
        computed = kernels.compute_dtype(dtype)
        plan = self._plan_of(raw, kernels, spill, limit, source, computed)
        scale = self.network.scale
        shape = (raw.shape[0], self.network.out_channels, raw.shape[2] * scale, raw.shape[3] * scale)
        image = torch.empty(shape, dtype=dtype, device=raw.device)
        clock.attempt(plan.total_blocks)
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
            plan = self._plan_of(raw, kernels, spill, limit, source, torch.float32)
        except MemoryLimitError as error:
            raise NonFiniteOutputError(
                f"decode: {reason} in {_name(dtype)}, and the memory limit leaves no room for float32: {error}"
            ) from error
        warnings.warn(
            f"decode: {reason} in {_name(dtype)}; decoding again in float32 (load the model with dtype='float32' "
            "to avoid the first attempt)",
            PrecisionRetryWarning,
            stacklevel=3,
        )
        clock.attempt(plan.total_blocks)
        try:
            self._run(plan, kernels, spill, raw, image, torch.float32, clock)
        except NonFiniteMap as error:
            raise NonFiniteOutputError(
                f"decode: {error} in float32 too; the latents or the weights are out of range"
            ) from error
        return _checked(image, torch.float32)

    def _plan_of(
        self, raw: torch.Tensor, kernels: Kernels, spill: Spill, limit: int, source: str, dtype: torch.dtype
    ) -> Plan:
        planner = self._planner((raw.shape[2], raw.shape[3]), raw.shape[0], dtype, raw.dtype, kernels)
        return planner.plan(limit, source=source, spill_free=spill.free(), spill_dir=spill.describe())

    def _less(self, raw: torch.Tensor, kernels: Kernels, spill: Spill, limit: int, source: str) -> tuple[int, str]:
        """A limit for the next attempt, when others have taken the memory or it lies in too many pieces."""
        dtype = kernels.compute_dtype(raw.dtype)
        tried = self._plan_of(raw, kernels, spill, limit, source, dtype).peak_bytes
        if raw.device.type == "cuda":
            torch.cuda.empty_cache()
        planner = self._planner((raw.shape[2], raw.shape[3]), raw.shape[0], dtype, raw.dtype, kernels)
        smallest = planner.smallest_limit(spill.free())
        if smallest >= tried:
            raise UnavailableError(
                f"memory: {raw.device} ran out with the smallest plan for latents {tuple(raw.shape)}, "
                f"{tried} bytes ({size_in_words(tried)}) above the weights; try again when more is free, or decode a "
                "smaller size or batch"
            )
        limit, source = max(tried * 3 // 4, smallest), "memory left"
        warnings.warn(
            f"decode: {raw.device} ran out of memory with a plan for {size_in_words(tried)}; decoding again within "
            f"{size_in_words(limit)} (name a memory_limit that is there to avoid the first attempt)",
            OutOfMemoryWarning,
            stacklevel=3,
        )
        return limit, source

    def prepare(self) -> float:
        """Compile what the kernels still need compiled, and load the libraries' code by a tiny decode.

        The first decode does this if nobody has called it before. It takes some seconds once per machine, and later
        less than one in each process. The code that becomes resident meanwhile is not counted as a decode's memory: it
        is 20 MB of PyTorch's, and 65 MB where Numba's is needed too.

        Returns:
            The seconds that it took.
        """
        start = time.perf_counter()
        self._kernels(self._device).prepare()
        if not self._prepared:
            with contextlib.suppress(MemoryLimitError):  # a limit that small is refused when something is to be decoded
                self.decode(self._weight.new_zeros(1, self.network.latent_channels, 4, 4))
            self._prepared = True
        return time.perf_counter() - start

    def _run(
        self, plan: Plan, kernels: Kernels, spill: Spill, raw: torch.Tensor, image: torch.Tensor,
        dtype: torch.dtype, clock: Clock,
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
        """The planner of one size. Making it takes as long as a small decode, so the last ones are kept."""
        threads = torch.get_num_threads()
        key = size, batch, dtype, stored, kernels.channels_last, self._device.type, threads
        if key in self._planners:
            return self._planners[key]
        planner = make_planner(
            self.network, kernels, size, batch=batch, computed=dtype.itemsize, stored=stored.itemsize,
            cast=dtype != stored, on_cpu=self._device.type == "cpu", threads=threads, block_values=self._block_values,
        )  # fmt: skip
        while len(self._planners) >= _KEPT_PLANNERS:
            self._planners.pop(next(iter(self._planners)), None)
        self._planners[key] = planner
        return planner

    def _kernels(self, device: torch.device) -> Kernels:
        kernels = make_kernels(self._kernels_name, device)
        weight = parameters(self.network.last.conv.module)[0]
        kernels.channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return kernels

    def _limit(self, device: torch.device) -> tuple[int, str]:
        return limit_of(self.memory_limit, lambda: available_memory(device))

    def _check(self, raw: torch.Tensor) -> None:
        weight = self._weight
        if raw.ndim != 4 or raw.shape[1] != self.network.latent_channels or min(raw.shape) < 1:
            raise InvalidOptionError(
                f"raw: got shape {tuple(raw.shape)}, expected (batch, {self.network.latent_channels}, height, width)"
            )
        if raw.dtype != weight.dtype or raw.dtype not in _DTYPES or raw.device != weight.device:
            raise InvalidOptionError(
                f"raw: got {_name(raw.dtype)} on {raw.device}, expected {_name(weight.dtype)} on {weight.device}, "
                "as the VAE's weights are"
            )


_KEPT_PLANNERS = 32


def _checked(image: torch.Tensor, computed: torch.dtype) -> torch.Tensor:
    """The image, if it is finite: rounding finite blocks to a narrower dtype may have made some of it infinite."""
    if image.dtype != computed and not bool(torch.isfinite(image).all()):
        raise NonFiniteOutputError(f"decode: pixels overflow {_name(image.dtype)}; decode with dtype='float32'")
    return image


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
