"""What both halves of the exact engine have in common: limits, plans, attempts, and what a failed one leads to."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Hashable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fluxvae.engine.clock import Cancel, Clock, Progress
from fluxvae.engine.graphs import Graphs, addresses, check_device
from fluxvae.engine.kernels import Kernels
from fluxvae.engine.kernels.choose import check_kernels, make_kernels
from fluxvae.engine.memory.free import available_memory, is_out_of_memory
from fluxvae.engine.memory.spill import Spill
from fluxvae.engine.network import read_network
from fluxvae.engine.plan import Plan, size_in_words
from fluxvae.engine.planner import Planner, limit_of, make_planner
from fluxvae.engine.records import parameters
from fluxvae.engine.runner import Runner
from fluxvae.engine.settings import set_aside
from fluxvae.engine.statistics import NonFiniteMap
from fluxvae.engine.way import DECODE, Way
from fluxvae.errors import InvalidOptionError, MemoryLimitError, NonFiniteOutputError, UnavailableError
from fluxvae.system import FreeMemory

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["ExactEngine", "OutOfMemoryWarning", "PrecisionRetryWarning"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


class PrecisionRetryWarning(UserWarning):
    """A decode or an encode in half precision overflowed and was done again in float32, with the same weights."""


class OutOfMemoryWarning(UserWarning):
    """Memory ran out although the limit allowed what was planned; it was done again by a smaller plan."""


class ExactEngine:
    """One half of a VAE: the function that diffusers computes without tiles, in bounded memory.

    The same image has the same bits for any memory limit and in any batch: every image is computed alone, and every map
    is cut into blocks by layer and image size only. (The memory format of the weights may change the last bits, as it
    does in diffusers: it decides which convolution runs.)

    `exact.ExactDecoder` and `exact.ExactEncoder` are the two halves.

    Args:
        vae: the model. It is read and never copied or changed.
        kernels: ``"torch"`` are PyTorch's own operations. ``"winograd"`` are our kernels for float32 on a CPU, which
            are several times faster. ``"cuda"`` are cuDNN and our kernels on an NVIDIA GPU. ``"auto"`` takes the
            faster ones where they run and PyTorch's elsewhere; `Plan.kernels` says which were taken and why.
        memory_limit: the bytes that a call may add above the loaded weights. None stands for nine tenths of what is
            free when the call starts.
        spill_dir: the folder for feature maps that memory has no room for. None stands for the first of the temporary
            folder, ``/var/tmp`` and the working folder that is not itself memory. A GPU's maps go to host memory.
        cuda_graphs: keep what an image asks of a GPU as a CUDA graph, for each size and plan, and compute later images
            by it, with the same bits. That takes little of the CPU's time. In exchange the memory of a whole decode
            stays allocated between calls, which counts against the limit: `Plan.graph_bytes`. The graphs that were used
            least recently are dropped where the limit has no room for another. Plans that spill have no graph. A model
            that is moved between calls, as pipelines with offloading do, is recorded anew each time.
        block_values: how many values a block of rows has, for tests. Unlike a limit, it changes an image's last bits.

    Raises:
        InvalidOptionError: an option is unknown, or the network has a module that this engine does not know, or
            something was done to the model that its weights do not show. The model is looked at before every call, so
            a later call may raise this too.
    """

    name = "exact"
    way: ClassVar[Way]

    def __init__(
        self,
        vae: AutoencoderKL,
        *,
        kernels: str = "auto",
        memory_limit: int | None = None,
        spill_dir: str | Path | None = None,
        cuda_graphs: bool = False,
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
        self._block_values = block_values
        if spill_dir is not None and self._device.type == "cpu":
            Spill(self._device, spill_dir)
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._prepared = False
        self._planners: dict[Hashable, Planner] = {}
        self._graphs = Graphs()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Give a copy the model and the options; it works out for itself what follows from them."""
        left_out = ("_prepared", "_planners", "_graphs", "_lock")
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
        return parameters(self.network.first.conv.module)[0]

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

    @property
    def _least(self) -> int:
        """The least height and width of what is given: one latent, or the pixels of one."""
        return 1 if self.way == DECODE else self.network.scale

    def _compute(self, given: torch.Tensor, progress: Progress | None, cancel: Cancel | None) -> torch.Tensor:
        """Compute a batch, as `exact.ExactDecoder.decode` and `exact.ExactEncoder.encode` say."""
        self.look()
        self._check(given)
        with self._lock, set_aside(given.device):
            kernels, spill = self._kernels(given.device), Spill(given.device, self._spill_dir)
            limit, source = self.limit()
            clock = Clock(self.way, progress, cancel)
            while True:
                try:
                    return self._attempt(given, kernels, spill, limit, source, clock)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error, given.device):
                        raise
                    said = _words(error)
                # Not within the handler, since the error's traceback holds the maps whose room is needed now.
                limit, source = self._less(given, kernels, spill, limit, source, said)

    def _attempt(
        self, given: torch.Tensor, kernels: Kernels, spill: Spill, limit: int, source: str, clock: Clock
    ) -> torch.Tensor:
        dtype, way = given.dtype, self.way
        computed = kernels.compute_dtype(dtype)
        plan = self._plan_of(given, kernels, spill, limit, source, computed)
        size = self.network.sizes((given.shape[2], given.shape[3]))[-1]
        made = torch.empty((given.shape[0], self.network.out_channels, *size), dtype=dtype, device=given.device)
        clock.attempt(plan.total_blocks)
        try:
            self._run(plan, kernels, spill, given, made, computed, clock, limit)
        except NonFiniteMap as error:
            if not bool(torch.isfinite(given).all()):
                raise NonFiniteOutputError(
                    f"{way.given}: got NaN or Inf, so the {way.made} would hold them too; check where the "
                    f"{way.given} come from"
                ) from error
            if computed not in _HALF:
                raise NonFiniteOutputError(
                    f"{way.name}: {error} in {_name(computed)}; the {way.given} or the weights are out of range"
                ) from error
            reason = str(error)
        else:
            return self._checked(made, computed)
        try:
            plan = self._plan_of(given, kernels, spill, limit, source, torch.float32)
        except MemoryLimitError as error:
            raise NonFiniteOutputError(
                f"{way.name}: {reason} in {_name(dtype)}, and the memory limit leaves no room for float32: {error}"
            ) from error
        warnings.warn(
            f"{way.name}: {reason} in {_name(dtype)}; {way.doing} again in float32 (load the model with "
            "dtype='float32' to avoid the first attempt)",
            PrecisionRetryWarning,
            stacklevel=4,
        )
        clock.attempt(plan.total_blocks)
        try:
            self._run(plan, kernels, spill, given, made, torch.float32, clock, limit)
        except NonFiniteMap as error:
            raise NonFiniteOutputError(
                f"{way.name}: {error} in float32 too; the {way.given} or the weights are out of range"
            ) from error
        return self._checked(made, torch.float32)

    def _plan_of(
        self, given: torch.Tensor, kernels: Kernels, spill: Spill, limit: int, source: str, dtype: torch.dtype
    ) -> Plan:
        planner = self._planner((given.shape[2], given.shape[3]), given.shape[0], dtype, given.dtype, kernels)
        return planner.plan(limit, source=source, spill_free=spill.free(), spill_dir=spill.describe())

    def _less(
        self, given: torch.Tensor, kernels: Kernels, spill: Spill, limit: int, source: str, said: str
    ) -> tuple[int, str]:
        """A limit for the next attempt, when others have taken the memory or it lies in too many pieces.

        ``said``: the error of the last attempt, in words.
        """
        dtype = kernels.compute_dtype(given.dtype)
        tried = self._plan_of(given, kernels, spill, limit, source, dtype).peak_bytes
        self._graphs.clear()
        if given.device.type == "cuda":
            torch.cuda.empty_cache()
        planner = self._planner((given.shape[2], given.shape[3]), given.shape[0], dtype, given.dtype, kernels)
        smallest = planner.smallest_limit(spill.free())
        if smallest >= tried:
            raise UnavailableError(
                f"memory: {given.device} ran out with the smallest plan for {self.way.given} {tuple(given.shape)}, "
                f"{tried} bytes ({size_in_words(tried)}) above the weights; try again when more is free, or "
                f"{self.way.name} a smaller size or batch (the last error was {said})"
            )
        limit, source = max(tried * 3 // 4, smallest), "memory left"
        warnings.warn(
            f"{self.way.name}: {given.device} ran out of memory with a plan for {size_in_words(tried)}; "
            f"{self.way.doing} again within {size_in_words(limit)} (name a memory_limit that is there to avoid the "
            f"first attempt; the error was {said})",
            OutOfMemoryWarning,
            stacklevel=4,
        )
        return limit, source

    def prepare(self) -> float:
        """Compile what the kernels still need compiled, and load the libraries' code by computing something tiny.

        The first call does this if nobody has called it before. It takes some seconds once per machine, and later
        less than one in each process. The code that becomes resident meanwhile is not counted as a call's memory: it
        is 20 MB of PyTorch's, and 65 MB where Numba's is needed too.

        Returns:
            The seconds that it took.
        """
        start = time.perf_counter()
        self._kernels(self._device).prepare()
        if not self._prepared:
            side = 4 * self._least
            with suppress(MemoryLimitError):  # a limit that small is refused when there is something to do
                self._compute(self._weight.new_zeros(1, self.network.in_channels, side, side), None, None)
            self._prepared = True
        return time.perf_counter() - start

    def _run(
        self, plan: Plan, kernels: Kernels, spill: Spill, given: torch.Tensor, made: torch.Tensor,
        dtype: torch.dtype, clock: Clock, limit: int,
    ) -> None:  # fmt: skip
        clock.begin()
        kernels.prepare()
        images = list(zip(given, made, strict=True))

        def runner(recorded: bool = False) -> Runner:
            tick = (lambda: None) if recorded else clock.tick
            return Runner(self.network, plan, kernels, spill, given.device, dtype, tick, recorded=recorded)

        with kernels.session():
            if plan.graph_bytes:
                key = (plan.layers, plan.geometry, dtype, given.device, kernels.channels_last, addresses(self.network))
                self._graphs.run(key, plan, images, runner, limit=limit, tick=clock.tick)
                return
            with closing(runner()) as running:
                for one, result in images:
                    running.run(one, result)

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
            graphs=self._cuda_graphs and dtype == stored,
        )  # fmt: skip
        while len(self._planners) >= _KEPT_PLANNERS:
            self._planners.pop(next(iter(self._planners)), None)
        self._planners[key] = planner
        return planner

    def _kernels(self, device: torch.device) -> Kernels:
        if self._cuda_graphs:
            check_device(device)
        kernels = make_kernels(self._kernels_name, device)
        weight = parameters(self.network.last.conv.module)[0]
        kernels.channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return kernels

    def limit(self) -> tuple[int, str]:
        """The bytes that a call may add above the weights now, those of CUDA graphs included; and what set them."""
        return limit_of(self.memory_limit, self._free)

    def _free(self) -> FreeMemory:
        free = available_memory(self._device)
        return free._replace(nbytes=free.nbytes + self._graphs.held_bytes)

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
                f"{name}: got {_name(given.dtype)} on {given.device}, expected {_name(weight.dtype)} on "
                f"{weight.device}, as the VAE's weights are"
            )

    def _checked(self, made: torch.Tensor, computed: torch.dtype) -> torch.Tensor:
        """The result, if it is finite: rounding finite blocks to a narrower dtype may have made some of it infinite."""
        if made.dtype != computed and not bool(torch.isfinite(made).all()):
            raise NonFiniteOutputError(
                f"{self.way.name}: {self.way.made} overflow {_name(made.dtype)}; {self.way.name} with dtype='float32'"
            )
        return made


_KEPT_PLANNERS = 32


def _words(error: BaseException) -> str:
    """The class and the first line of an error, which do not keep alive what its traceback does."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
