"""What both halves of the exact engine do with a call: attempts, and what a failed one leads to."""

from __future__ import annotations

import time
import warnings
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import torch

from fluxvae.engine.calls import ALIGN
from fluxvae.engine.clock import Cancel, Clock, Progress
from fluxvae.engine.graphs import addresses
from fluxvae.engine.kernels import Kernels
from fluxvae.engine.memory.free import is_out_of_memory
from fluxvae.engine.memory.pool import ArenaPool
from fluxvae.engine.memory.spill import Spill
from fluxvae.engine.plan import Plan, size_in_words
from fluxvae.engine.planned import PlannedEngine, dtype_name
from fluxvae.engine.runner import Runner
from fluxvae.engine.settings import set_aside
from fluxvae.engine.statistics import NonFiniteMap
from fluxvae.errors import MemoryLimitError, NonFiniteOutputError, UnavailableError

if TYPE_CHECKING:
    pass

__all__ = ["ExactEngine", "OutOfMemoryWarning", "PrecisionRetryWarning"]

_HALF = (torch.bfloat16, torch.float16)


class PrecisionRetryWarning(UserWarning):
    """A decode or an encode in half precision overflowed and was done again in float32, with the same weights."""


class OutOfMemoryWarning(UserWarning):
    """Memory ran out although the limit allowed what was planned; it was done again by a smaller plan."""


class ExactEngine(PlannedEngine):
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
        keep_memory: on a CPU, keep the arena from one call to the next, in large pages where the system has them, with
            the same bits. It counts against the limit from the start of every call: `Plan.kept_bytes`. Where a call
            needs a larger one, or its limit leaves no room for it, another one takes its place.
        block_values: how many values a block of rows has, for tests. Unlike a limit, it changes an image's last bits.

    Raises:
        InvalidOptionError: an option is unknown, or the network has a module that this engine does not know, or
            something was done to the model that its weights do not show. The model is looked at before every call, so
            a later call may raise this too.
    """

    name = "exact"

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
                    f"{way.name}: {error} in {dtype_name(computed)}; the {way.given} or the weights are out of range"
                ) from error
            reason = str(error)
        else:
            return self._checked(made, computed)
        try:
            plan = self._plan_of(given, kernels, spill, limit, source, torch.float32)
        except MemoryLimitError as error:
            raise NonFiniteOutputError(
                f"{way.name}: {reason} in {dtype_name(dtype)}, and the memory limit leaves no room for float32: {error}"
            ) from error
        warnings.warn(
            f"{way.name}: {reason} in {dtype_name(dtype)}; {way.doing} again in float32 (load the model with "
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

    def _less(
        self, given: torch.Tensor, kernels: Kernels, spill: Spill, limit: int, source: str, said: str
    ) -> tuple[int, str]:
        """A limit for the next attempt, when others have taken the memory or it lies in too many pieces.

        ``said``: the error of the last attempt, in words.
        """
        dtype = kernels.compute_dtype(given.dtype)
        tried = self._plan_of(given, kernels, spill, limit, source, dtype).peak_bytes
        self._graphs.clear()
        self._kept.drop()
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
            self._graphs.clear()  # nobody will decode anything of that size
            self._kept.drop()
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
            room = self._kept if plan.keeps else ArenaPool(given.device)
            return Runner(self.network, plan, kernels, room, spill, given.device, dtype, tick, recorded=recorded)

        with kernels.session():
            self._prepared = True  # whatever is computed loads the libraries' code
            if plan.graph_bytes:
                key = (plan.layers, plan.geometry, dtype, given.device, kernels.channels_last, addresses(self.network))
                self._graphs.run(key, plan, images, runner, limit=limit, tick=clock.tick)
                return
            if plan.keeps:
                self._kept.fit(plan.arena_bytes + ALIGN + limit - plan.peak_bytes)
            with closing(runner()) as running:
                for one, result in images:
                    running.run(one, result)

    def _checked(self, made: torch.Tensor, computed: torch.dtype) -> torch.Tensor:
        """The result, if it is finite: rounding finite blocks to a narrower dtype may have made some of it infinite."""
        if made.dtype != computed and not bool(torch.isfinite(made).all()):
            raise NonFiniteOutputError(
                f"{self.way.name}: {self.way.made} overflow {dtype_name(made.dtype)}; "
                f"{self.way.name} with dtype='float32'"
            )
        return made


def _words(error: BaseException) -> str:
    """The class and the first line of an error, which do not keep alive what its traceback does."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
