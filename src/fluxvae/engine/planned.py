"""What an exact engine knows of its model, and how it plans: limits, planners, and what is kept between calls."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fluxvae.engine.graphs import Graphs, check_device
from fluxvae.engine.kernels import Kernels
from fluxvae.engine.kernels.choose import check_kernels, make_kernels
from fluxvae.engine.memory import kept
from fluxvae.engine.memory.free import available_memory
from fluxvae.engine.memory.spill import Spill
from fluxvae.engine.network import read_network
from fluxvae.engine.plan import Plan
from fluxvae.engine.planner import Planner, limit_of, make_planner
from fluxvae.engine.records import parameters
from fluxvae.engine.way import DECODE, Way
from fluxvae.errors import InvalidOptionError
from fluxvae.system import FreeMemory

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["PlannedEngine", "dtype_name"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KEPT_PLANNERS = 32


class PlannedEngine:
    """One half of a VAE and the options of its engine, which `bounded.ExactEngine` explains; and its plans."""

    way: ClassVar[Way]

    def __init__(
        self,
        vae: AutoencoderKL,
        *,
        kernels: str = "auto",
        memory_limit: int | None = None,
        spill_dir: str | Path | None = None,
        cuda_graphs: bool = False,
        keep_memory: bool = False,
        block_values: int | None = None,
    ) -> None:
        if memory_limit is not None and memory_limit < 1:
            raise InvalidOptionError(f"memory_limit: got {memory_limit}, expected a positive number of bytes")
        self._vae = vae
        self.network = read_network(vae, self.way)
        check_kernels(kernels)
        self._kernels_name, self.memory_limit, self._spill_dir = kernels, memory_limit, spill_dir
        self._cuda_graphs = cuda_graphs
        if cuda_graphs:
            check_device(None)
        self._keeps = keep_memory
        if keep_memory:
            kept.check_device(self._device)
        self._block_values = block_values
        if spill_dir is not None and self._device.type == "cpu":
            Spill(self._device, spill_dir)
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._prepared = False
        self._planners: dict[Hashable, Planner] = {}
        self._graphs = Graphs()
        self._kept = kept.KeptMemory()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Give a copy the model and the options; it works out for itself what follows from them."""
        left_out = ("_prepared", "_planners", "_graphs", "_kept", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_afresh()

    def look(self) -> None:
        """Read the model anew: its modules may have been replaced, hooked or moved since the last call."""
        network = read_network(self._vae, self.way)
        if network != self.network:
            self.network = network
            self._planners = {}
            self._graphs.clear()

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._weight.device
        return device

    @property
    def _weight(self) -> torch.Tensor:
        return parameters(self.network.first.conv)[0]

    @property
    def _least(self) -> int:
        """The least height and width of what is given: one latent, or the pixels of one."""
        return 1 if self.way == DECODE else self.network.scale

    def plan(self, height: int, width: int, batch: int = 1) -> Plan:
        """Plan how ``batch`` images would be computed now.

        Args:
            height, width: the size of what is given: latents to be decoded, or pixels to be encoded.

        Raises:
            MemoryLimitError: the limit is below the smallest one that works, which the message names.
        """
        planner, spill = self._planner_for(height, width, batch)
        limit, source = self.limit()
        return planner.plan(limit, source=source, spill_free=spill.free(), spill_dir=spill.describe())

    def smallest_limit(self, height: int, width: int, batch: int = 1) -> int:
        """The smallest ``memory_limit`` that does for this size, in bytes."""
        planner, spill = self._planner_for(height, width, batch)
        return planner.smallest_limit(spill.free())

    def limit(self) -> tuple[int, str]:
        """The bytes that a call may add above the weights now, with what is kept between calls; and what set them."""
        return limit_of(self.memory_limit, self._free)

    def _free(self) -> FreeMemory:
        free = available_memory(self._device)
        return free._replace(nbytes=free.nbytes + self._graphs.held_bytes + self._kept.held_bytes)

    def _planner_for(self, height: int, width: int, batch: int) -> tuple[Planner, Spill]:
        least = self._least
        if min(height, width) < least or batch < 1:
            raise InvalidOptionError(
                f"plan: got {self.way.given} {height}x{width}, batch {batch}; expected sizes from {least} on"
            )
        self.look()
        device, dtype = self._device, self._weight.dtype
        kernels = self._kernels(device)
        planner = self._planner((height, width), batch, kernels.compute_dtype(dtype), dtype, kernels)
        return planner, Spill(device, self._spill_dir)

    def _plan_of(
        self, given: torch.Tensor, kernels: Kernels, spill: Spill, limit: int, source: str, dtype: torch.dtype
    ) -> Plan:
        planner = self._planner((given.shape[2], given.shape[3]), given.shape[0], dtype, given.dtype, kernels)
        return planner.plan(limit, source=source, spill_free=spill.free(), spill_dir=spill.describe())

    def _planner(
        self, size: tuple[int, int], batch: int, dtype: torch.dtype, stored: torch.dtype, kernels: Kernels
    ) -> Planner:
        """The planner of one size. Making it takes as long as a small decode, so the last ones are kept."""
        threads = torch.get_num_threads()
        key = size, batch, dtype, stored, kernels.channels_last, self._device, threads, kernels.name, kernels.note
        if key in self._planners:
            return self._planners[key]
        planner = make_planner(
            self.network, kernels, size, batch=batch, computed=dtype.itemsize, stored=stored.itemsize,
            cast=dtype != stored, on_cpu=self._device.type == "cpu", threads=threads, block_values=self._block_values,
            graphs=self._cuda_graphs and dtype == stored, keeps=self._keeps,
        )  # fmt: skip
        while len(self._planners) >= _KEPT_PLANNERS:
            self._planners.pop(next(iter(self._planners)), None)
        self._planners[key] = planner
        return planner

    def _kernels(self, device: torch.device) -> Kernels:
        if self._cuda_graphs:
            check_device(device)
        if self._keeps:
            kept.check_device(device)
        kernels = make_kernels(self._kernels_name, device)
        weight = parameters(self.network.last.conv)[0]
        kernels.channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return kernels

    def _check(self, given: torch.Tensor) -> None:
        weight, channels, least = self._weight, self.network.in_channels, self._least
        name = "raw" if self.way == DECODE else self.way.given
        if given.ndim != 4 or given.shape[1] != channels or given.shape[0] < 1 or min(given.shape[2:]) < least:
            raise InvalidOptionError(
                f"{name}: got shape {tuple(given.shape)}, expected (batch, {channels}, height, width)"
                + (f" of at least {least}x{least}" if least > 1 else "")
            )
        if given.dtype != weight.dtype or given.dtype not in _DTYPES or given.device != weight.device:
            raise InvalidOptionError(
                f"{name}: got {dtype_name(given.dtype)} on {given.device}, expected {dtype_name(weight.dtype)} on "
                f"{weight.device}, as the VAE's weights are"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as messages have it, without ``torch.``."""
    return str(dtype).removeprefix("torch.")
